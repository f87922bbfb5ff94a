"""The command line: `flowrl-mega train CONFIG.yaml [--section.field=value ...]`.

Exit codes: 0 done; 2 the input or the settings are wrong (one message, no traceback); 75 stopped on request with a
checkpoint saved; anything else is a fault.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from flowrl_mega.config import Config, ConfigError, load_config

BAD_INPUT, STOPPED = 2, 75


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    parser = argparse.ArgumentParser(prog="flowrl-mega", description="FlowRL on Megatron-core.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train from a YAML file of settings")
    train.add_argument("config", help="YAML file of settings")
    train.add_argument("--resume", default="auto", help="auto (the run folder's newest checkpoint), never, or a folder")
    train.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and stop")
    options, overrides = parser.parse_known_args(arguments)
    try:
        return _train(options, overrides, arguments)
    except ConfigError as error:
        if _first_rank():
            print(f"flowrl-mega: {error}", file=sys.stderr)
        return BAD_INPUT


def _train(options: argparse.Namespace, overrides: list[str], arguments: list[str]) -> int:
    from flowrl_mega.parallel.launch import launch, started_by_launcher

    config = load_config(options.config, overrides)
    is_rank = started_by_launcher()
    world = _world(config, is_rank)
    resume = None
    if not is_rank or _first_rank() or options.dry_run:
        resume = check(config, world, options.resume)
    if options.dry_run:
        if _first_rank():
            print(describe(config, world, resume))
        return 0
    if is_rank or world == 1:
        return run_rank(config, options.resume)
    return launch([sys.executable, "-m", "flowrl_mega.cli", *arguments], world)


def _world(config: Config, is_rank: bool) -> int:
    import os

    parallel = config.parallel
    return int(os.environ["WORLD_SIZE"]) if is_rank else parallel.tp * (parallel.dp or 1)


def _first_rank() -> bool:
    import os

    return os.environ.get("RANK", "0") == "0"


def check(config: Config, world: int, resume: str) -> Path | None:
    """Everything that can be wrong with the input, found before a rank starts; returns the checkpoint to resume."""
    from flowrl_mega import objectives
    from flowrl_mega.checkpoint.folder import find_checkpoint, verify_checkpoint
    from flowrl_mega.data.inputs import load_prompts
    from flowrl_mega.model.architecture import check_layout, check_megatron, read_architecture
    from flowrl_mega.monitor import check_wandb
    from flowrl_mega.parallel.layout import check_world
    from flowrl_mega.rewards.registry import load_reward

    objectives.build(config.objective)
    load_reward(config.reward)
    check_world(config.parallel, world)
    check_layout(read_architecture(config.model.path), config.parallel.tp)
    check_megatron(config.megatron)
    load_prompts(config)
    check_wandb(config.monitor.wandb)
    sequences = config.batch.mini_batch or config.rollout.prompts_per_step * config.rollout.group_size
    if sequences < world // config.parallel.tp:
        raise ConfigError(
            f"batch.mini_batch = {sequences}: fewer sequences than the {world // config.parallel.tp} data-parallel "
            "ranks; take more sequences or fewer ranks"
        )
    checkpoint = find_checkpoint(Path(config.run_dir), resume)
    if checkpoint is not None:
        verify_checkpoint(checkpoint)
    return checkpoint


def describe(config: Config, world: int, resume: Path | None) -> str:
    """What would run where."""
    import torch

    from flowrl_mega import objectives
    from flowrl_mega.data.inputs import load_prompts
    from flowrl_mega.model.architecture import read_architecture

    arch, objective = read_architecture(config.model.path), objectives.build(config.objective)
    store, held_out, _, stop_ids = load_prompts(config)
    tp, rollout = config.parallel.tp, config.rollout
    total = rollout.prompts_per_step * rollout.group_size
    updates = total // (config.batch.mini_batch or total)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (gloo)"
    settings = ", ".join(f"{name}={value}" for name, value in objective.model_dump().items() if name != "name")
    lines = {
        "model": f"{arch.model_type}, {arch.layers} layers of {arch.hidden}, vocabulary {arch.vocab}, {config.model.path}",
        "ranks": f"{world} = tp {tp} x dp {world // tp}"
        + (", sequence parallel" if config.parallel.sequence_parallel else "")
        + f", on {device}",
        "layers": "Megatron-core local spec, packed attention through scaled_dot_product_attention",
        "objective": f"{config.objective['name']} ({settings})",
        "log Z": objective.log_z or "none",
        "reference": "frozen copy of model.path" if objective.needs_reference else "not needed",
        "prompts": f"{len(store)} to train on, {len(held_out) if held_out else 0} held out",
        "reward": config.reward,
        "step": f"{rollout.prompts_per_step} prompts x {rollout.group_size} answers of at most {rollout.max_tokens} "
        f"tokens, {updates} update(s), {config.steps} steps; answers end at ids {list(stop_ids)}",
        "run folder": f"{config.run_dir}, " + (f"resuming {resume}" if resume else "from the start"),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def run_rank(config: Config, resume: str) -> int:
    """Train as one rank of a job (torchrun's environment, or alone)."""
    import os

    from flowrl_mega.parallel.launch import rank_environment

    if "RANK" not in os.environ:
        from flowrl_mega.parallel.launch import free_port

        os.environ.update(rank_environment(0, 1, free_port()))
    stop = StopRequest()
    from flowrl_mega.checkpoint.folder import find_checkpoint
    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.train import Trainer

    layout = layouts.init(config.parallel, config.seed)
    trainer = Trainer(config, layout, find_checkpoint(Path(config.run_dir), resume))
    finished = trainer.run(stop.requested)
    layouts.shutdown()
    return 0 if finished else STOPPED


class StopRequest:
    """Remembers SIGTERM, which means: save at the end of this step, and stop."""

    def __init__(self) -> None:
        self.received = False
        signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True

    def requested(self) -> bool:
        return self.received


if __name__ == "__main__":
    sys.exit(main())
