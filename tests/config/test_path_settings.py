"""Settings that are texts get the text that is written, and those that are paths may begin with ~."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowrl_mega.ablation.grid import read_axis
from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_file import load_config, with_texts
from flowrl_mega.settings import Settings, kinds_of, section_of

TREE: dict[str, Any] = {
    "run_dir": "runs/x",
    "steps": 1,
    "model": {"path": "model"},
    "data": {"task": "sums"},
    "reward": {"function": "r:score"},
}
CODE = ("reward.function=flowrl_mega.rewards.code:score",)
SGLANG = ("rollout.engine=sglang",)
# every setting that names a file or a folder -> what must be set beside it, and the end of a value
PATHS: dict[str, tuple[tuple[str, ...], str]] = {
    "run_dir": ((), ""),
    "model.path": ((), ""),
    "data.path": (("data.task=null",), ""),
    "data.held_out": ((), ""),
    "data.task": ((), ".py:Task"),
    "critic.path": (("objective.name=ppo",), ""),
    "rollout.engine": ((), ".py:Engine"),
    "rollout.python": (SGLANG, ""),
    "rollout.api_key_file": (SGLANG, ".key"),
    "rollout.sync.folder": ((*SGLANG, "rollout.sync.transfer=disk"), ""),
    "reward.function": ((), ".py:score"),
    "reward": ((), ".py:score"),
    "reward.code.python": (CODE, ""),
    "evaluation.benchmarks.data": (("evaluation.every=1", "evaluation.benchmarks.names=[amc23]"), ""),
    "objective.name": ((), ".py:Own"),
}
TEXTS = {"monitor.wandb_project", "reward.code.url"}  # and no paths
BESIDE = {name: beside for name, (beside, _) in PATHS.items()} | {
    "monitor.wandb_project": ("monitor.wandb=offline",),
    "rollout.servers": SGLANG,
}
# as it is written: YAML takes these for a date, a time, numbers, truth values, or what follows a # for a comment
WRITTEN = "2024-01-01 007 1e5 1_000 12:30:00 yes off 0x10 1.5 .inf 2024-13-45 runs/#3 2024-01-01T10:00:00Z".split()
FLAGS = [*WRITTEN, "#3", "run #3", "[1]", "{a: 1}", "a: b: c", "@home", "%a", "true #1", "&a", "*a", "!x", "- 3"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for name in (*FLAGS, "mine"):
        Path(name).mkdir(parents=True, exist_ok=True)  # what must be there
    for name in ("mine.key", "~mine.key"):
        Path(name).touch()
    return tmp_path


def value(config: Config, name: str) -> Any:
    found: Any = config
    for part in ("reward.function" if name == "reward" else name).split("."):
        found = found[part] if isinstance(found, dict) else getattr(found, part)
    return found


def by_flag(name: str, text: str) -> Any:
    Path("settings.yaml").write_text(yaml.safe_dump(TREE))
    return value(load_config("settings.yaml", [*BESIDE.get(name, ()), f"--{name}={text}"]), name)


def by_file(name: str, text: str) -> Any:
    """With the value as it is in the place of the last setting."""
    *sections, field = name.split(".")
    tree = yaml.safe_load(yaml.safe_dump(TREE))
    place = tree
    for section in sections:
        place = place.setdefault(section, {})
    place[field] = "HERE"
    Path("settings.yaml").write_text(yaml.safe_dump(tree).replace("HERE", text))
    return value(load_config("settings.yaml", BESIDE.get(name, ())), name)


def texts(model: type[Settings], place: str = "") -> list[str]:
    found = []
    for name in model.model_fields:
        section = section_of(model, name)
        if section:
            found += texts(section, f"{place}{name}.")
        elif str in kinds_of(model, name):
            found.append(f"{place}{name}")
    return found


def test_no_text_is_left_out() -> None:
    assert set(texts(Config)) | {"reward", "objective.name"} == PATHS.keys() | TEXTS


@pytest.mark.parametrize("read", [by_flag, by_file])
@pytest.mark.parametrize("name", PATHS)
def test_the_home_folder(name: str, read: Any, home: Path) -> None:
    end = PATHS[name][1]
    assert read(name, f"~/mine{end}") == f"{home}/mine{end}"
    assert read(name, f"./~mine{end}" if end else "~root") == (f"./~mine{end}" if end else os.path.expanduser("~root"))


@pytest.mark.parametrize("name", PATHS)
def test_of_nobody(name: str, home: Path) -> None:
    end = PATHS[name][1]
    with pytest.raises(ConfigError, match=rf"no such user has a home folder; .* write \./~nobody-here/x{end}"):
        by_flag(name, f"~nobody-here/x{end}")


@pytest.mark.parametrize("name", ["run_dir", "model.path", "reward.function"])
def test_an_empty_path(name: str, home: Path) -> None:
    """It would be the current folder."""
    for text in ('""', "''"):
        with pytest.raises(ConfigError, match=f"{name} = '': must not be empty"):
            by_flag(name, text)
        with pytest.raises(ConfigError, match=f"{name} = '': must not be empty"):
            by_file(name, text)
    for text in ("", "null", "~"):
        with pytest.raises(ConfigError, match=f"{name} = None: "):
            by_flag(name, text)


@pytest.mark.parametrize("name", ["run_dir", "model.path", "data.path", "rollout.python", "monitor.wandb_project"])
def test_a_text_is_what_is_written(name: str, home: Path) -> None:
    for text in FLAGS:
        assert by_flag(name, text) == text
    for text in WRITTEN:
        assert by_file(name, text) == text
        assert by_file(name, f"'{text}'") == text and by_flag(name, f'"{text}"') == text


@pytest.mark.parametrize("read", [by_flag, by_file])
def test_a_number_of_prompts_or_their_file(read: Any, home: Path) -> None:
    for text, wanted in {
        "0.25": 0.25,
        "1e-1": 0.1,
        "2024-01-01": "2024-01-01",
        "yes": "yes",
        "runs/#3": "runs/#3",
    }.items():
        if (text, read) != ("1e-1", by_file):  # YAML 1.1 has it as a text there
            assert read("data.held_out", text) == wanted
    for text in ("007", "2"):
        with pytest.raises(ConfigError, match="a share must lie between 0 and 1"):
            read("data.held_out", text)
    assert read("data.held_out", "./007") == "./007"


@pytest.mark.parametrize("read", [by_flag, by_file])
@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("steps", "007", 7), ("monitor.progress", "off", False), ("optimizer.lr", "1.5", 1.5),
        ("rollout.servers", "3", 3), ("model.fp8", "off", "off"), ("parallel.dp", "null", None),
        ("megatron.num_query_groups", "3", 3),
    ],
)  # fmt: skip
def test_what_is_no_text_is_read_as_before(name: str, text: str, wanted: Any, read: Any, home: Path) -> None:
    assert read(name, text) == wanted


def test_sections_given_whole(home: Path) -> None:
    assert by_flag("model", "{path: 2024-01-01, logits_budget_mb: 007}").path == "2024-01-01"
    assert by_flag("model", "{path: 2024-01-01, logits_budget_mb: 007}").logits_budget_mb == 7
    assert by_flag("reward", "{function: ~/x.py:score, timeout_s: 9}") == f"{home}/x.py:score"
    assert by_flag("reward", "my #3.py:score") == "my #3.py:score"


def test_anchors_and_merges(home: Path) -> None:
    lines = yaml.safe_dump(TREE).replace("path: model", "<<: &m {path: 2024-01-01}\n  dtype: fp32")
    Path("settings.yaml").write_text(lines)
    assert load_config("settings.yaml").model.path == "2024-01-01"


def test_it_reads_back(home: Path) -> None:
    """What is written to config.yaml is the same settings."""
    Path("settings.yaml").write_text(yaml.safe_dump(TREE))
    for text in [*FLAGS, "~/mine"]:
        config = load_config("settings.yaml", [f"--run_dir={text}"])
        Path("again.yaml").write_text(yaml.safe_dump(config.dump()))
        assert load_config("again.yaml") == config


def test_values_of_a_grid() -> None:
    assert read_axis("model.path=2024-01-01,007") == [{"model.path": "2024-01-01"}, {"model.path": "007"}]
    assert read_axis("steps=2,007") == [{"steps": 2}, {"steps": 7}]
    assert read_axis("model.path+steps=[[1e5, 2], [yes, 3]]") == [
        {"model.path": "1e5", "steps": 2}, {"model.path": "yes", "steps": 3},
    ]  # fmt: skip
    assert read_axis("model=[{path: 007, logits_budget_mb: 007}]") == [
        {"model": {"path": "007", "logits_budget_mb": 7}}
    ]
    assert with_texts("data.held_out", 0.1, "0.1") == 0.1
