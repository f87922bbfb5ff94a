"""Settings: what a file and flags make together. (What is refused, and how, is in tests/cli/test_bad_input.py.)"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flowrl_mega.config import CheckpointSettings, Config, ConfigError, RewardSettings
from flowrl_mega.config_file import load_config
from flowrl_mega.settings import Settings, validated

SMALLEST = {
    "run_dir": "run",
    "steps": 3,
    "model": {"path": "model"},
    "data": {"task": "sums"},
    "reward": "module:function",
}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "settings.yaml"
    path.write_text(yaml.safe_dump(SMALLEST))
    return path


def test_the_smallest_file_and_its_defaults(path: Path) -> None:
    config = load_config(path)
    assert (config.run_dir, config.steps, config.seed) == ("run", 3, 0)
    assert config.objective == {"name": "flowrl"}
    assert (config.rollout.temperature, config.rollout.top_p, config.rollout.top_k) == (1.0, 1.0, 0)
    assert (config.ops.backend, config.optimizer.decay) == ("auto", "constant")


@pytest.mark.parametrize("service", ["--monitor.wandb=offline", "--monitor.trackio=true"])
def test_a_projects_name_is_for_wandb_and_trackio(path: Path, service: str) -> None:
    """Either reads it; checkpoints as artifacts are wandb's alone."""
    assert load_config(path, ["--monitor.wandb_project=mine", service]).monitor.wandb_project == "mine"
    with pytest.raises(ConfigError, match="monitor.wandb or monitor.trackio only"):
        load_config(path, ["--monitor.wandb_project=mine"])
    if "trackio" in service:
        with pytest.raises(ConfigError, match="wandb_checkpoints = True: is read with monitor.wandb only"):
            load_config(path, ["--monitor.wandb_checkpoints=true", service])


def test_overrides_are_read_as_yaml(path: Path) -> None:
    overrides = [
        "--steps=7",
        "--optimizer.lr=1e-6",  # a string to YAML 1.1, a number to people
        "--optimizer.betas=[0.8, 0.9]",
        "--objective.beta=2",
        "--megatron.recompute_granularity=full",
        "--parallel.dp=null",
        "--model.path=a=b",
        "data.chat_template=true",
    ]
    config = load_config(path, overrides)
    assert config.steps == 7 and config.optimizer.lr == 1e-6 and config.optimizer.betas == (0.8, 0.9)
    assert config.objective == {"name": "flowrl", "beta": 2}
    assert config.megatron == {"recompute_granularity": "full"}
    assert config.parallel.dp is None and config.model.path == "a=b" and config.data.chat_template


def test_the_last_word_counts(path: Path) -> None:
    assert load_config(path, ["steps=4", "steps=5"]).steps == 5
    assert load_config(path, ["rollout={group_size: 3}", "rollout.max_tokens=9"]).rollout.group_size == 3


@pytest.mark.parametrize("form", ["own:score", {"function": "own:score"}])
def test_a_reward_is_a_function_or_a_section(path: Path, form: str | dict[str, str]) -> None:
    path.write_text(yaml.safe_dump({**SMALLEST, "reward": form}))
    assert load_config(path).reward == RewardSettings(function="own:score")
    changed = load_config(path, ["--reward.workers=0", "--reward.code.wall_s=5", "--reward=other:score"]).reward
    assert (changed.function, changed.workers, changed.code.wall_s) == ("other:score", 0, 5.0)
    changed = load_config(path, ["--reward=other:score", "--reward.workers=0"]).reward
    assert (changed.function, changed.workers) == ("other:score", 0)
    assert load_config(path, ["--reward={function: other:score}"]).reward == RewardSettings(function="other:score")


def test_a_reward_without_a_function(path: Path) -> None:
    path.write_text(yaml.safe_dump({**SMALLEST, "reward": {"workers": 0}}))
    with pytest.raises(ConfigError, match=r"^reward\.function: missing; set it .* --reward\.function=VALUE$"):
        load_config(path)


def test_a_decay_needs_an_update_after_the_warm_up(path: Path) -> None:
    """Counted in updates, of which a step can have several."""
    sizes = ["rollout={prompts_per_step: 2, group_size: 6}", "batch.mini_batch=4", "optimizer.decay=cosine"]
    config = load_config(path, [*sizes, "optimizer.warmup_steps=8"])
    assert (config.sequences_per_step, config.updates_per_step) == (12, 3)
    with pytest.raises(ConfigError, match=r"warmup_steps = 9: leaves none of the 9 updates to .*decay = cosine"):
        load_config(path, [*sizes, "optimizer.warmup_steps=9"])
    assert load_config(path, [*sizes, "optimizer.warmup_steps=9", "optimizer.decay=constant"])


def test_what_is_written_reads_back(path: Path, tmp_path: Path) -> None:
    config = load_config(path, ["optimizer.lr=1.2345678901234567e-7", "data.held_out=0.1"])
    again = tmp_path / "config.yaml"
    again.write_text(yaml.safe_dump(config.dump()))
    assert load_config(again) == config


def test_settings_do_not_change(path: Path) -> None:
    with pytest.raises(ValueError, match="frozen"):
        load_config(path).steps = 4  # type: ignore[misc]


def test_every_fault_is_told_at_once_each_on_a_line() -> None:
    with pytest.raises(ConfigError) as refused:
        validated(Config, {**SMALLEST, "steps": 0, "data": {"held_out": [1]}, "sead": 1}, "")
    lines = str(refused.value).split("\n")
    assert [line.split()[0].rstrip(":") for line in lines] == ["steps", "data.held_out", "sead"]
    assert "a valid number, or" in lines[1] and "'seed'" in lines[2]


def test_a_section_inside_the_tree_names_its_place() -> None:
    class Section(Settings):
        rate: float = 1.0

    with pytest.raises(ConfigError, match=r"^objective\.rat: no such setting; did you mean 'rate'\?$"):
        validated(Section, {"rat": 1}, "objective")
    with pytest.raises(ConfigError, match=r"^objective = 3: must be a mapping"):
        validated(Section, 3, "objective")


@pytest.mark.parametrize(
    ("settings", "due"),
    [
        ({}, [3]), ({"minutes": 0}, []), ({"minutes": 1e-9}, [1, 2, 3, 4]), ({"every": 2}, [2, 4]),
        ({"minutes": 0, "every": 2}, [2, 4]), ({"minutes": 10}, [1, 2, 3, 4]), ({"minutes": 10.1}, [2, 4]),
        ({"minutes": 20.5, "every": 2}, [2, 4]), ({"minutes": 20, "every": 3}, [2, 3]), ({"minutes": 30}, [3]),
    ],
)  # fmt: skip
def test_when_a_checkpoint_is_due(settings: dict[str, float], due: list[int]) -> None:
    """Of four steps of ten minutes each; the time counts from the last checkpoint."""
    checkpoint, saved, found = CheckpointSettings(**settings), 0, []
    for step in (1, 2, 3, 4):
        if checkpoint.is_due(step, 600.0 * (step - saved)):
            found.append(step)
            saved = step
    assert found == due
