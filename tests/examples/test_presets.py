"""The presets say what the paper says and what they are named for, and `train --dry-run` passes them; docs/variants.md
names settings that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_models import make

from flowrl_mega import cli, objectives
from flowrl_mega.config import Config
from flowrl_mega.config_file import load_config

ROOT = Path(__file__).parents[2]
PRESETS = sorted((ROOT / "examples/presets").glob("*.yaml"))
NAMES = [
    "cispo", "dapo", "dr_grpo", "flowrl-paper", "flowrl-recipe", "flowrl-released", "gflowrl", "grpo", "ppo",
    "reinforce_pp", "rloo",
]  # fmt: skip
# What the machine and the user decide, for a machine with nothing: one rank, no servers.
ELSEWHERE = [
    "--model.dtype=fp32",
    "--parallel={tp: 1}",
    "--data.chat_template=false",
    "--rollout.engine=embedded",
    "--rollout.python=null",
    "--rollout.servers=1",
    "--rollout.server_args={}",
    "--rollout.colocated=false",
    "--rollout.request_timeout_s=1800",
]
FLOWRL = {"name": "flowrl", "beta": 15, "z": "mlp", "length_norm": True, "reward_norm": "group", "tis": "none"}
VERL = {"clip_eps": 0.2, "clip_eps_high": None, "kl_coef": 0, "loss_mean": "token", "tis": "none"}  # 0.4.0's defaults
# The loss of each preset: the paper's Eq. 6-7, the release's and the recipe's code, verl's ppo_trainer.yaml.
LOSS: dict[str, dict[str, Any]] = {
    "flowrl-paper": FLOWRL | {"weight": "paper", "eps": 0.2, "z_prompt": "all", "z_dropout": 0},
    "flowrl-released": FLOWRL | {"weight": "released", "z_prompt": "drop-last", "z_dropout": 0.1},
    "flowrl-recipe": FLOWRL | {"weight": "max10", "z_prompt": "drop-last", "z_dropout": 0.1},
    "grpo": VERL | {"name": "grpo", "std": True},
    "ppo": VERL | {"name": "ppo", "value_clip": 0.5, "gamma": 1, "lam": 1, "normalise": True, "kl_target": None},
    "reinforce_pp": VERL | {"name": "reinforce_pp", "baseline": "none"},
    "cispo": VERL | {"name": "cispo", "clip_eps": None, "clip_eps_high": 0.2},
    "dapo": VERL | {"name": "grpo", "clip_eps_high": 0.28, "std": True},
    "dr_grpo": VERL | {"name": "grpo", "std": False, "loss_mean": "sum"},
    "gflowrl": {"name": "gflowrl", "beta": 4, "weight": "cap", "clip_gap": True, "eps": 0.2, "eps_high": 0.28},
    "rloo": VERL | {"name": "rloo", "kl_coef": 3.3e-5, "loss_mean": "sequence", "baseline": "others"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A tiny model and a file of prompts, as overrides."""
    folder = tmp_path_factory.mktemp("inputs")
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(f'{{"prompt": "{n}:", "target": {n}, "right_answers": ["1+2+3"]}}\n' for n in range(10, 20))
    )
    model = make("qwen2", folder / "model", vocab=15, max_position_embeddings=8448)
    return [f"--model.path={model}", f"--data.path={rows}", f"--run_dir={folder / 'run'}"]


def load(name: str, inputs: list[str]) -> Config:
    return load_config(ROOT / f"examples/presets/{name}.yaml", inputs)


def test_the_presets_are_those_of_the_docs() -> None:
    assert [path.stem for path in PRESETS] == NAMES == sorted(LOSS)


@pytest.mark.parametrize("name", NAMES)
def test_dry_run_passes(name: str, inputs: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    """The command line itself, with nothing replaced but what a preset cannot know or this machine does not have."""
    for variable in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(variable, raising=False)
    preset = str(ROOT / f"examples/presets/{name}.yaml")
    assert cli.main(["train", preset, "--dry-run", *inputs, *ELSEWHERE]) == 0, capsys.readouterr().err
    said = capsys.readouterr().out
    assert f"objective   {LOSS[name]['name']} (" in said
    assert "512 prompts x 8 answers of at most 8192 tokens, 16 update(s), 200 steps" in said


@pytest.mark.parametrize("name", NAMES)
def test_hyper_parameters_are_the_papers(name: str, inputs: list[str]) -> None:
    """arXiv 2509.15207, 7B math: 512 prompts x 8 answers, mini-batches of 32 prompts, 2048 + 8192 tokens, AdamW at 1e-6
    with 10 steps of warm-up, no KL and no entropy term."""
    config = load(name, inputs)
    rollout, optimizer = config.rollout, config.optimizer
    assert (rollout.prompts_per_step, rollout.group_size, config.batch.mini_batch) == (512, 8, 32 * 8)
    assert (config.data.max_prompt_tokens, rollout.max_tokens) == (2048, 8192)
    assert (rollout.temperature, rollout.top_p, rollout.top_k, rollout.drop_uniform) == (1, 1, 0, name == "dapo")
    assert (optimizer.lr, optimizer.log_z_lr, optimizer.betas) == (1e-6, None, (0.9, 0.999))
    assert (optimizer.weight_decay, optimizer.clip_grad, optimizer.decay) == (0.1, 1, "constant")
    assert optimizer.warmup_steps == 10 * 512 // 32
    assert config.steps == 200
    assert config.batch.tokens_per_microbatch >= 2048 + 8192, "the longest sequence is a micro-batch of its own else"


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_the_one_it_is_named_for(name: str, inputs: list[str]) -> None:
    objective = objectives.build(load(name, inputs).objective)
    settings = objective.model_dump()
    assert {field: settings[field] for field in LOSS[name]} == LOSS[name]
    reads = LOSS[name]["name"] in ("flowrl", "gflowrl") or LOSS[name]["kl_coef"] > 0
    assert objective.needs_reference == reads, "a reference costs memory"


def test_only_ppo_has_a_critic_and_it_is_verls(inputs: list[str]) -> None:
    critics = {name: load(name, inputs).critic for name in NAMES}
    critic = critics.pop("ppo")
    assert not any(critics.values()) and critic is not None
    assert (critic.trunk, critic.path, critic.warmup_steps) == ("own", None, 0)
    optimizer = critic.optimizer
    assert (optimizer.lr, optimizer.weight_decay, optimizer.clip_grad) == (1e-5, 0.01, 1)
    assert (optimizer.warmup_steps, optimizer.decay, optimizer.betas) == (0, "constant", (0.9, 0.999))


def test_presets_differ_by_their_loss_alone(inputs: list[str]) -> None:
    """Else a comparison of two of them would compare something else as well; DAPO is more than a loss."""
    own = {"objective": None, "critic": None, "parallel": None, "run_dir": None}
    assert len({str(load(name, inputs).dump() | own) for name in NAMES if name != "dapo"}) == 1
    dapo = load("dapo", [*inputs, "--rollout.drop_uniform=false", "--reward.overlong=null"])
    assert dapo.dump() | own == load("grpo", inputs).dump() | own
    assert len({load(name, inputs).run_dir for name in NAMES}) == 1, "given by the override"
    folders = [re.findall(r"^run_dir: (.*)$", path.read_text(), re.MULTILINE) for path in PRESETS]
    assert folders == [[f"runs/{name}"] for name in NAMES]


READS = {"ppo": objectives.PPO, "grpo": objectives.GRPO, "gflowrl": objectives.GFlowRL}
BESIDE = {"objective.z=frozen": ["objective.reward_norm=none"]}  # what a setting is refused without
DOCS = (ROOT / "docs/variants.md").read_text()
SETTINGS = re.findall(r"`((?:[a-z_]+\.)+[a-z_]+=[^`]*)`", DOCS)


def test_variants_names_enough_settings_to_look_for() -> None:
    assert len(SETTINGS) > 40


@pytest.mark.parametrize("setting", sorted(set(SETTINGS)))
def test_settings_that_the_docs_name_exist(setting: str, inputs: list[str]) -> None:
    """Each alone, or with what it needs, in a preset that reads it, is accepted and becomes the value that is there."""
    field = setting.partition("=")[0].rpartition(".")[2]
    preset = setting.partition("=")[2] if field == "name" else "flowrl-paper"
    if setting.startswith(("critic.", "objective.")) and field not in objectives.FlowRL.model_fields:
        preset = next((name for name, kind in READS.items() if field in kind.model_fields), "ppo")
    config = load_config(ROOT / f"examples/presets/{preset}.yaml", [*inputs, *BESIDE.get(setting, []), setting])
    found: Any = config.dump() | {"objective": objectives.build(config.objective).model_dump()}
    path, _, written = setting.partition("=")
    for part in path.split("."):
        found = found[part]
    assert found == yaml.safe_load(written)
