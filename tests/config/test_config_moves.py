"""Settings that moved: the old name says the new one, and what an earlier trainer wrote still loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from flowrl_mega.config import ConfigError, RewardSettings
from flowrl_mega.config_file import load_config

EARLIER = Path(__file__).parent / "config_of_cef29d0.yaml"  # written by that commit into a run folder


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text("")
    path = tmp_path / "settings.yaml"
    path.write_text(EARLIER.read_text())
    return path


def held(old: Any, new: Any) -> bool:
    """Whether all that was there is there; settings that have come since may be."""
    if isinstance(old, dict):
        return all(name in new and held(value, new[name]) for name, value in old.items())
    return old == new


def test_an_earlier_runs_config_loads(path: Path) -> None:
    """Every value is where it belongs now, and all that did not move is as it was."""
    old, new = yaml.safe_load(EARLIER.read_text()), load_config(path).dump()
    reward = new.pop("reward")
    assert reward["function"] == "flowrl_mega.rewards.by_kind:score", "rewards.tasks then"
    assert reward["math"] == {"timeout_s": 7} and held(old["rewards"]["code"], reward["code"])
    assert reward["code"]["wall_s"] == 3.0 and reward["overlong"] == {"buffer": 4, "penalty": 1.0}
    assert (reward["workers"], reward["timeout_s"]) == (0, 60.0)
    assert reward.keys() == RewardSettings.model_fields.keys()
    for name, value in old.items():
        if name not in ("reward", "rewards"):
            assert held(value, new[name]), name


def test_flags_on_top_of_it_have_todays_names(path: Path) -> None:
    assert load_config(path, ["--reward.workers=2"]).reward.workers == 2
    with pytest.raises(ConfigError, match=r"^rewards\.workers: is now reward\.workers$"):
        load_config(path, ["--rewards.workers=2"])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("rewards.workers=0", "reward.workers"),
        ("rewards.timeout_s=5", "reward.timeout_s"),
        ("rewards.math_timeout_s=5", "reward.math.timeout_s"),
        ("rewards.overlong={buffer: 4}", "reward.overlong.buffer"),
        ("rewards.overlong.penalty=2", "reward.overlong.penalty"),
        ("rewards.code.wall_s=5", "reward.code.wall_s"),
        ("rewards.code={}", "reward.code"),
        ("rewards={}", "reward"),
        ("reward=flowrl_mega.rewards.tasks:score", "'flowrl_mega.rewards.by_kind:score'"),
    ],
)
def test_an_old_name_says_the_new_one(path: Path, old: str, new: str) -> None:
    """A file that a person wrote is not translated: there would be two ways to say one thing."""
    tree = yaml.safe_load(EARLIER.read_text())
    del tree["rewards"]
    path.write_text(yaml.safe_dump({**tree, "reward": "module:function"}))
    with pytest.raises(ConfigError, match=f"is now {new}$") as refused:
        load_config(path, [f"--{old}"])
    assert str(refused.value).startswith(old.partition("=")[0])


@pytest.mark.parametrize("missing", ["ops", "rewards.overlong"])
def test_what_is_not_complete_was_not_written_by_a_trainer(path: Path, missing: str) -> None:
    tree = yaml.safe_load(EARLIER.read_text())
    section, _, field = missing.partition(".")
    if field:
        del tree[section][field]
    else:
        del tree[section]
    path.write_text(yaml.safe_dump(tree))
    with pytest.raises(ConfigError, match=r"rewards\.math_timeout_s: is now reward\.math\.timeout_s"):
        load_config(path)
