"""trackio's own reader finds what was logged, also of a run that was interrupted and goes on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl_mega.monitor import Monitor

pytest.importorskip("trackio", reason="the extra trackio is not installed")
pytestmark = pytest.mark.integration

RUN = """
import sys
from pathlib import Path
from flowrl_mega.monitor import Monitor

first, last, resume_step = map(int, sys.argv[2:])
monitor = Monitor(Path(sys.argv[1]), {"seed": 3}, 4, resume_step, project="trial", progress=False, trackio=True)
for step in range(first, last + 1):
    monitor.log(step, {"reward/mean": step / 8, "loss/policy": float("nan")})
monitor.distributions(last, {"residual": {"edges": [-1.0, 0.0, 3.0], "counts": [2, 5]}, "prompts": []})
monitor.evaluation(last, {"pass_rate": 0.75})
monitor.close()
"""
READ = """
import json, math
from trackio import Api, SQLiteStorage

runs = list(Api().runs("trial"))
logs = {run.name: SQLiteStorage.get_logs("trial", run.name) for run in runs}
print(json.dumps([{"name": run.name, "config": run.config, "logs": logs[run.name]} for run in runs]))
"""


def test_what_trackio_shows_is_what_was_logged(tmp_path: Path) -> None:
    """A process each, as trackio fixes its folder when it is imported. A run that goes on is one run there."""
    environment = os.environ | {"TRACKIO_DIR": str(tmp_path / "store"), "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)

    def python(code: str, *arguments: str) -> str:
        command = [sys.executable, "-c", code, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    folder = str(tmp_path / "mine")
    assert python(RUN, folder, "1", "3", "0") == "", "trackio's own lines are no output of a run"
    python(RUN, folder, "3", "4", "2")
    (run,) = json.loads(python(READ))
    assert run["name"].startswith("mine-") and run["config"]["seed"] == 3
    logs = run["logs"]
    rewards = [(line["step"], line["reward/mean"]) for line in logs if "reward/mean" in line]
    assert rewards == [(1, 0.125), (2, 0.25), (3, 0.375), (3, 0.375), (4, 0.5)]
    histogram = next(line["loss/residual_histogram"] for line in logs if "loss/residual_histogram" in line)
    assert (histogram["values"], histogram["bins"]) == ([2, 5], [-1.0, 0.0, 3.0])
    assert [line["step"] for line in logs if "evaluation/pass_rate" in line] == [3, 4]
    python(RUN, folder, "1", "3", "0")  # from its start again
    assert len(json.loads(python(READ))) == 2, "a run that starts over is another one"


def test_without_it_nothing_is_imported(tmp_path: Path) -> None:
    Monitor(tmp_path, {}, 1, progress=False).close()
    assert not (tmp_path / "trackio").exists()
