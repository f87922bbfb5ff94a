"""Runs that are resumed with other settings: in another layout with groups carried over, and with another critic."""

from __future__ import annotations

from pathlib import Path

import pytest
from jobs import Job, records, write_config
from megatron.core import dist_checkpointing
from tiny_models import make

from flowrl_mega.cli import main

pytestmark = pytest.mark.ranks

CARRYING = {"prompts_per_step": 4, "group_size": 4, "max_tokens": 8, "oversample": 1.75}


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_carried_groups_go_on_in_another_layout(model: Path, tmp_path: Path) -> None:
    """Three groups are carried over step 2 to the next one, and are part of the checkpoint. In another layout they are
    trained on with the same answers as in this one, among the same prompts; numbers are the same up to rounding."""
    config = str(write_config(tmp_path, model, rollout=CARRYING))

    def train(name: str, *settings: str) -> Path:
        arguments = ["train", config, "--steps=4", f"--run_dir={tmp_path / name}", *settings]
        Job(arguments, tmp_path / f"{name} log").run(120)
        return tmp_path / name

    origin = train("origin", "--parallel.tp=2")
    checkpoint = origin / "checkpoints" / "step_2"
    assert len(dist_checkpointing.load_common_state_dict(str(checkpoint))["trainer"]["rollout"]["groups"]) == 3
    found = train("found", "--parallel.tp=1", "--parallel.dp=2", f"--resume={checkpoint}")
    assert records(found, "samples") == [row for row in records(origin, "samples") if row["step"] > 2]
    for ours, theirs in zip(records(found, "metrics"), records(origin, "metrics")[2:], strict=True):
        for name in ("step", "rollout/carried_groups", "reward/mean"):
            assert ours[name] == theirs[name], name
        for name in ("loss/policy", "policy/grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3), name


PPO = "--objective={name: ppo}"


@pytest.fixture(scope="module")
def critics(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings of PPO with a critic of its own, and a run of two steps. Not to be changed."""
    folder = tmp_path_factory.mktemp("ppo")
    config = write_config(folder, model)
    Job(["train", str(config), PPO, "--critic={}", "--parallel.tp=1", "--steps=2"], folder / "log", world=1).run(120)
    return config


# the objective and the critic that the run is resumed with -> what is said, or nothing where it goes on
RESUMED: dict[str, tuple[list[str], list[str]]] = {
    "the same": ([PPO, "--critic={}"], []),
    "another rate": ([PPO, "--critic.optimizer.lr=1e-3"], []),
    "another model of the same sizes": ([PPO, "--critic.path=SAME"], []),
    "a smaller one": ([PPO, "--critic.path=SMALL"], ["critic.path = ", "of another model", "(2, 32)", "(2, 16)"]),
    "one of fewer layers": ([PPO, "--critic.path=SHALLOW"], ["critic.path = ", "(2, 32)", "(1, 32)"]),
    "one on the policy's trunk": ([PPO, "--critic={trunk: shared}"], ["its critic is 'own'", "'shared'"]),
    "none": (["--objective={name: grpo}"], ["its critic is 'own'", "None", "another run_dir"]),
    "moments in shares": (
        [PPO, "--critic={}", "--optimizer.distributed=true"],
        ["optimizer.distributed = True: needs Transformer Engine's FusedAdam", "Set optimizer.distributed=false"],
    ),
    "the critic's in shares": (
        [PPO, "--critic={}", "--critic.optimizer.distributed=true"],
        ["critic.optimizer.distributed = True: needs Transformer Engine's FusedAdam"],
    ),
    "moments whole, as they were": ([PPO, "--critic={}", "--optimizer.distributed=false"], []),
    "log Z instead": ([], ["its log_z is None", "'mlp'"]),
}  # fmt: skip


@pytest.mark.parametrize("case", RESUMED)
def test_another_critic(case: str, critics: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What cannot go on is told before a rank starts, not by the load."""
    settings, parts = RESUMED[case]
    sizes = {"SAME": {}, "SMALL": {"hidden_size": 16}, "SHALLOW": {"num_hidden_layers": 1}}
    for name, changes in sizes.items():
        if any(name in setting for setting in settings):
            other = make("llama", tmp_path / "other", vocab=15, seed=3, **changes)
            settings = [setting.replace(name, str(other)) for setting in settings]
    code = main(["train", str(critics), "--parallel.tp=1", "--steps=4", "--dry-run", *settings])
    said = capsys.readouterr()
    assert code == (2 if parts else 0), said.err
    assert all(part in said.err for part in parts), said.err
    assert said.err.count("\n") == 1 if parts else "resuming" in said.out
