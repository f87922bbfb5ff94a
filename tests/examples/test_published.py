"""The YAMLs of published runs can be loaded, say what the paper says, and fit the model and the machines they name.

Their model, data and reward are not here: only config.json, with the sizes that Qwen published for the model.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flowrl_mega import objectives
from flowrl_mega.config import Config
from flowrl_mega.config_file import load_config
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.checks import check_layout, check_megatron, check_pipeline
from flowrl_mega.parallel.layout import check_world
from flowrl_mega.preflight import check_sequences

EXAMPLES = Path(__file__).parents[2] / "examples"
# name: (GPUs, hidden, layers, heads, key-value heads, feed-forward), from the models' config.json
RUNS = {
    "qwen2.5_1.5b": (8, 1536, 28, 12, 2, 8960),
    "qwen2.5_7b": (8, 3584, 28, 28, 4, 18944),
    "qwen2.5_32b": (32, 5120, 64, 40, 8, 27648),
}
# The presets, too, are laid out for Qwen2.5-7B on 8 GPUs.
LAYOUTS = RUNS | {f"presets/{path.stem}": RUNS["qwen2.5_7b"] for path in sorted(EXAMPLES.glob("presets/*.yaml"))}
SIZES = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "intermediate_size")


def load(name: str, folder: Path) -> Config:
    rows = folder / "rows.jsonl"
    rows.write_text('{"prompt": "1+1="}\n')
    return load_config(EXAMPLES / f"{name}.yaml", [f"--data.path={rows}", f"--model.path={folder}"])


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_layout_divides_the_model_and_the_machines(name: str, tmp_path: Path) -> None:
    gpus, *sizes = LAYOUTS[name]
    config = load(name, tmp_path)
    about = dict(zip(SIZES, sizes, strict=True)) | {"model_type": "qwen2", "vocab_size": 152064}
    (tmp_path / "config.json").write_text(json.dumps(about))
    check_world(config.parallel, gpus)
    arch = read_architecture(tmp_path)
    check_layout(arch, config.parallel.tp)
    check_pipeline(arch, config.parallel.pp, config.parallel.vpp)
    check_megatron(config, arch)
    check_sequences(config, gpus // config.parallel.model_ranks)
    server = config.rollout.server_args.get("tp_size", 1)
    assert config.rollout.servers * server == 8, "all GPUs of the first node"
    assert config.model.dtype == "bf16" and config.rollout.colocated


@pytest.mark.parametrize("name", RUNS)
def test_the_settings_are_those_of_the_paper(name: str, tmp_path: Path) -> None:
    """arXiv 2509.15207: 512 prompts x 8 answers, mini-batches of 32 prompts, 2048 + 8192 tokens, AdamW at 1e-6."""
    config = load(name, tmp_path)
    rollout, optimizer = config.rollout, config.optimizer
    assert (rollout.prompts_per_step, rollout.group_size, config.updates_per_step) == (512, 8, 16)
    assert (config.data.max_prompt_tokens, rollout.max_tokens, rollout.temperature, rollout.top_p) == (2048, 8192, 1, 1)
    assert (optimizer.lr, optimizer.betas, optimizer.weight_decay, optimizer.clip_grad) == (1e-6, (0.9, 0.999), 0.1, 1)
    assert (optimizer.warmup_steps, optimizer.decay) == (10 * config.updates_per_step, "constant")
    objective = objectives.build(config.objective)
    assert (config.objective["name"], objective.model_dump()["beta"]) == ("flowrl", 15)
    assert config.batch.tokens_per_microbatch >= 2048 + 8192, "the longest sequence is a micro-batch of its own else"
