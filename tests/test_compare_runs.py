"""tools/compare_runs.py: equal runs are equal under old and new names, and nothing that differs passes."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowrl_mega.monitor.run_folder import RunFolder

TOOL = Path(__file__).resolve().parents[1] / "tools" / "compare_runs.py"
OLD = {"loss": 1 / 3, "reward": 0.5, "seconds/step": 2.0, "tokens_per_second": 9.0, "memory_gb": 1.0, "kl": None}
NEW = {"loss/policy": 1 / 3, "reward/mean": 0.5, "perf/step_seconds": 3.0, "perf/tokens_per_second": 8.0}
NEW |= {"perf/memory_gb": 2.0, "policy/kl_to_ref": None}
PER_RUN = 2 * 4 + 2 + 3  # lines of metrics, an evaluation, a sample; their steps count, too


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("compare_runs", TOOL)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def write(folder: Path, metrics: dict[str, Any], evaluation: float = 0.25, sample: str = "a") -> None:
    run = RunFolder(folder)
    for step in (1, 2):
        run.log(step, metrics)
    run.evaluation(2, {"reward": evaluation})
    run.samples(2, [{"response": sample, "reward": 1.0}])


def test_equal_runs_of_both_versions(tool, tmp_path, capsys):
    """Old names are the new ones; times, rates and memory may differ. A tree is compared folder by folder."""
    for name in ("one/seed_0", "two"):
        write(tmp_path / "old" / name, OLD)
        write(tmp_path / "new" / name, NEW)
    assert tool.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said == [
        f"one/seed_0: {PER_RUN} values, equal", f"two: {PER_RUN} values, equal",
        f"{2 * PER_RUN} values compared: equal",
    ]  # fmt: skip
    assert tool.main([str(tmp_path / "old" / "two"), str(tmp_path / "new" / "two")]) == 0


@pytest.mark.parametrize(
    ("metrics", "others", "words"),
    [
        (
            {"loss/policy": math.nextafter(1 / 3, 1)},
            {},
            "loss/policy: 0.3333333333333333 -> 0.33333333333333337",
        ),
        ({"policy/kl_to_ref": -0.0}, {}, "metrics.jsonl, line 1, policy/kl_to_ref: null -> -0.0"),
        ({"loss/policy": ...}, {}, "metrics.jsonl, line 1, loss/policy: missing in the new run"),
        ({"loss/more": 1.0}, {}, "metrics.jsonl, line 1, loss/more: missing in the old run"),
        ({}, {"evaluation": 0.5}, "evaluation.jsonl, line 1, reward: 0.25 -> 0.5"),
        ({}, {"sample": "b"}, 'samples.jsonl, line 1, response: "a" -> "b"'),
    ],
)
def test_what_differs_is_told(metrics, others, words, tool, tmp_path, capsys):
    """One digit, one name, one word."""
    write(tmp_path / "old", OLD)
    write(tmp_path / "new", {name: value for name, value in (NEW | metrics).items() if value is not ...}, **others)
    assert tool.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    said = capsys.readouterr().out
    assert words in said and "NOT equal" in said


def test_a_name_that_only_the_new_version_logs(tool, tmp_path, capsys):
    """It must be said, and excuses nothing that the old run has."""
    folders = [str(tmp_path / "old"), str(tmp_path / "new")]
    write(tmp_path / "old", OLD)
    write(tmp_path / "new", NEW | {"loss/more": 1.0})
    assert tool.main([*folders, "--added", "loss/more", "loss/policy"]) == 0
    assert f"{PER_RUN} values, equal" in capsys.readouterr().out
    assert tool.main([*folders, "--added", "more"]) == 1
    RunFolder(tmp_path / "new").truncate(0)
    write(tmp_path / "new", NEW | {"loss/more": 1.0, "loss/policy": 0.5})
    assert tool.main([*folders, "--added", "loss/more", "loss/policy"]) == 1


def test_a_missing_step_and_a_missing_run(tool, tmp_path, capsys):
    """A run that stopped early, or was not made, is no equal one."""
    for name in ("a", "b"):
        write(tmp_path / "old" / name, OLD)
    write(tmp_path / "new" / "a", NEW)
    assert tool.main([str(tmp_path / "old"), str(tmp_path / "new")]) == 1
    assert f"b: only in {tmp_path / 'old'}" in capsys.readouterr().out
    RunFolder(tmp_path / "new" / "a").truncate(1)
    assert tool.main([str(tmp_path / "old" / "a"), str(tmp_path / "new" / "a")]) == 1
    assert "metrics.jsonl, line 2, step: missing in the new run" in capsys.readouterr().out


def test_nothing_to_compare(tool, tmp_path, capsys):
    """Two wrong paths must not look like two equal runs."""
    assert tool.main([str(tmp_path), str(tmp_path)]) == 2
    assert "no run folder" in capsys.readouterr().err


def test_help_is_quick():
    """It says how to use it, and does not import torch, which takes seconds."""
    code = (
        "import runpy, sys; tool = sys.argv[1]; sys.argv[1:] = ['--help']\n"
        "try: runpy.run_path(tool, run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    said = subprocess.run([sys.executable, "-c", code, TOOL], capture_output=True, text=True, timeout=60)
    assert said.returncode == 0 and "old new" in said.stdout, said.stderr
