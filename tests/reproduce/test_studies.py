"""The published studies: each is read, says what would run with nothing at hand, and has the table of its source."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowrl_mega.benchmark.table import BENCHMARKS, load
from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.reproduce import plan
from flowrl_mega.reproduce.fetch import fetch_benchmark
from flowrl_mega.reproduce.stages import steps
from flowrl_mega.reproduce.study import Shape, read_study

REPO = Path(__file__).parents[2]
STUDIES = sorted((REPO / "examples" / "studies").glob("*.yaml"))


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where studies name their presets from."""
    monkeypatch.chdir(REPO)


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_a_dry_run_needs_nothing(path: Path) -> None:
    """Every step with its command, memory, hours and disk, before anything is there."""
    study = read_study(str(path))
    found = [(step.stage, step.name) for step in steps(study, None)]
    for name in study.evaluations():
        assert ("evaluate", name) in found
    assert [name for stage, name in found if stage == "train"] == list(study.trained())
    assert [name for stage, name in found if stage == "convert"] == list(study.trained())
    order = ["fetch", "data", "train", "convert", "evaluate", "report"]
    stages = [stage for stage, _ in found]
    assert stages == sorted(stages, key=order.index) and stages[-1] == "report"
    said = plan.describe(study)
    assert ("GPU hours" in said) == (study.hardware.gpus > 0) and f"{plan.disk_gb(study):,.0f} GB" in said


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_the_published_table_is_of_what_is_evaluated(path: Path) -> None:
    """Columns are benchmarks of the study, rows its methods; a mean is that of its row, as the source prints it."""
    study = read_study(str(path))
    if study.published is None:
        return
    assert study.published.rows.keys() <= set(study.evaluations())
    for row in study.published.rows.values():
        assert {column.partition("/")[0] for column in row} - {"mean"} <= set(study.eval_config("base").benchmarks)
        if "mean" in row:
            others = [value for column, value in row.items() if column != "mean"]
            assert row["mean"] == pytest.approx(sum(others) / len(others), abs=0.02)
    benchmarks = set(study.eval_config("base").benchmarks)
    assert benchmarks <= BENCHMARKS.keys() | {"codeforces"}, "a name of the table"


def test_parameters_are_those_of_the_models() -> None:
    """By the models' cards: Qwen2.5-7B has 7.61e9 (without its biases of attention), 32B 32.5e9, SmolLM2 134.5e6."""
    shapes = {path.stem: read_study(str(path)).base.shape for path in STUDIES}
    assert shapes["flowrl-7b-math"].parameters == pytest.approx(7.6156e9, rel=1e-3)
    assert shapes["flowrl-32b-math"].parameters == pytest.approx(32.76e9, rel=1e-3)
    assert shapes["smoke"].parameters == 134_515_008


def test_parameters_against_transformers(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    arch = read_architecture(tiny_llama)
    shape = Shape(
        layers=arch.layers, hidden=arch.hidden, heads=arch.heads, kv_heads=arch.kv_heads, ffn=arch.ffn,
        vocab=arch.vocab, tied=True,
    )  # fmt: skip
    assert shape.parameters == AutoModelForCausalLM.from_pretrained(tiny_llama).num_parameters()


def test_too_little_memory_is_told() -> None:
    study = read_study(str(REPO / "examples" / "studies" / "flowrl-7b-math.yaml"))
    assert "TOO LITTLE" not in plan.describe(study)
    small = study.model_copy(update={"hardware": study.hardware.model_copy(update={"memory_gb": 24.0})})
    assert "25.6 GiB a rank of a GPU's 22.4, WHICH IS TOO LITTLE" in plan.describe(small)


def test_a_benchmark_is_taken_from_a_folder_as_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a study evaluates later has the problems of the file that was given, whatever form that had."""
    monkeypatch.setitem(BENCHMARKS, "aime24", BENCHMARKS["aime24"]._replace(rows=2, sum=None))
    given = [{"Problem": "1+1?", "Answer": 2.0}, {"Problem": "Is \u00b5 > 0?", "Answer": "yes"}]
    (tmp_path / "aime24.jsonl").write_text("".join(json.dumps(row) + "\n" for row in given))
    fetch_benchmark("aime24", str(tmp_path), tmp_path / "run" / "aime24.jsonl")
    (before,), (after,) = (load(["aime24"], str(folder), None, 0) for folder in (tmp_path, tmp_path / "run"))
    assert before.rows == after.rows and before.sum == after.sum


PLAIN = """
title: t
run_dir: run
base: {hub: a/b, shape: {layers: 1, hidden: 8, heads: 2, kv_heads: 1, ffn: 8, vocab: 9}}
methods: {m: {config: examples/smollm2.yaml}}
evaluate: {benchmarks: [aime24]}
"""


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("title: t", "titel: t"), "titel: no such setting; did you mean 'title'?"),
        (("hub: a/b", "hub: a/b, command: make"), "set exactly one of hub and command"),
        (("config: examples/smollm2.yaml", ""), "set exactly one of config and published"),
        (("{m: {config: examples/smollm2.yaml}}", "{}"), "methods = {}"),
        (("layers: 1", "layers: 0"), "base.shape.layers = 0"),
    ],
)
def test_a_wrong_study_is_refused_by_name(tmp_path: Path, change: tuple[str, str], said: str) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(PLAIN.replace(*change))
    with pytest.raises(ConfigError) as refusal:
        read_study(str(file))
    assert said in str(refusal.value) and str(refusal.value).startswith(str(file))


def test_an_evaluation_is_checked_before_anything_runs(tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(PLAIN.replace("[aime24]", "[aime24], kk: 3"))
    with pytest.raises(ConfigError, match=r"evaluate.kk: no such setting; did you mean 'k'\?"):
        steps(read_study(str(file)), None)
