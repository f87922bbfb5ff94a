"""From checked settings to a job: find what is wrong with the input, say what would run, start the ranks or be one."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import torch

from flowrl_mega import objectives, ops
from flowrl_mega.checkpoint import check_checkpoint, check_model, find_checkpoint, is_megatron, step_of
from flowrl_mega.config import Config, ConfigError
from flowrl_mega.data.inputs import kinds_of, load_prompts
from flowrl_mega.model.architecture import Architecture, read_architecture
from flowrl_mega.model.checks import check_layers, check_layout, check_megatron, check_pipeline
from flowrl_mega.model.precision import describe_fp8, describe_layers, row_alignment
from flowrl_mega.monitor import check_wandb
from flowrl_mega.monitor.run_folder import METRICS
from flowrl_mega.parallel import backends
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.launch import free_port, launch, rank_environment, started_by_launcher
from flowrl_mega.parallel.optimizer import check_optimizer
from flowrl_mega.rewards.registry import load_reward
from flowrl_mega.train import Trainer

DONE, STOPPED = 0, 75


def train(
    config: Config, arguments: list[str], resume: str, dry_run: bool, checked: bool, stop_requested: Callable[[], bool]
) -> int:
    """The `train` command; returns the exit code. `arguments` are the command line's, for ranks that we start.

    `checked`: this is a rank whose parent has already checked everything.
    """
    is_rank = started_by_launcher()
    world = int(os.environ["WORLD_SIZE"]) if is_rank else layouts.world_size(config.parallel)
    checkpoint = find_checkpoint(Path(config.run_dir), resume)
    first_rank = os.environ.get("RANK", "0") == "0"
    if not checked:
        rewards = check(config, world, resume, checkpoint, one_of_many=is_rank)
        if rewards and not dry_run:
            _say(f"rewards: {rewards}", first_rank)
    if dry_run:
        _say(describe(config, world, checkpoint), first_rank)
        return DONE
    if checkpoint and step_of(checkpoint) >= config.steps:
        done = f"{checkpoint} is of step {step_of(checkpoint)} of {config.steps}: this run is finished"
        _say(f"{done}; raise steps to go on", first_rank)
        return DONE
    if is_rank or world == 1:
        return run_rank(config, checkpoint, stop_requested)
    if stop_requested():
        return STOPPED
    found = ["--checked", f"--resume={checkpoint or 'never'}"]
    return launch([sys.executable, "-m", "flowrl_mega.cli", *arguments, *found], world)


def run_rank(config: Config, checkpoint: Path | None, stop_requested: Callable[[], bool]) -> int:
    """Train as one rank of a job, in torchrun's environment or alone."""
    if "RANK" not in os.environ:
        os.environ.update(rank_environment(0, 1, free_port()))
    layout = layouts.init(config.parallel, config.seed, row_alignment(config.model))
    trainer = Trainer(config, layout, checkpoint)
    try:
        finished = trainer.run(stop_requested)
    finally:
        trainer.close()
    layouts.shutdown()
    return DONE if finished else STOPPED


def check(config: Config, world: int, resume: str, checkpoint: Path | None, one_of_many: bool = False) -> str:
    """Everything that can be wrong with the input, found before a rank starts and before anything is written. Returns
    what the reward says of itself, such as the isolation that programs get here.

    Ranks that torchrun or srun started (`one_of_many`) all find the same here, so that none waits for another that
    has given up; a checkpoint's bytes they check together when they load it.
    """
    objective = objectives.build(config.objective)
    check_critic(config, objective.needs_critic)
    check_ops(config.ops.backend)
    layouts.check_world(config.parallel, world)
    arch = read_architecture(config.model.path)
    check_layout(arch, config.parallel.tp)
    check_pipeline(arch, config.parallel.pp, config.parallel.vpp)
    check_megatron(config.megatron)
    check_layers(config.model, arch, config.parallel.tp, config.parallel.cp)
    check_optimizer(config.optimizer)
    if config.critic:
        check_optimizer(config.critic.optimizer, "critic.optimizer")
    check_model(config.model.path, arch)
    rewards = check_reward(config)
    check_wandb(config.monitor.wandb)
    _check_sequences(config, world // config.parallel.model_ranks)
    if not one_of_many:
        check_engine(config, arch, world)
    _check_run_dir(Path(config.run_dir), resume, checkpoint)
    if checkpoint and not one_of_many:
        check_checkpoint(checkpoint, arch, objective.log_z, config.critic.trunk if config.critic else None)
    return rewards


def check_reward(config: Config) -> str:
    """The reward can be loaded, and works with this machine and the data's rows; what it says of itself."""
    reward = load_reward(config.reward, config.rewards)
    store, held_out, _, _ = load_prompts(config)
    return reward.describe(kinds_of(store) | (kinds_of(held_out) if held_out else set()))


def check_critic(config: Config, needed: bool) -> None:
    """A critic where the objective needs one and only there, and a model that fits beside the policy."""
    critic, name = config.critic, config.objective["name"]
    if needed and critic is None:
        raise ConfigError(
            f"critic = None: objective {name} takes its advantages from a critic; set critic={{}} (a second model like "
            "model.path) or critic={trunk: shared}, or choose an objective without one, such as reinforce_pp"
        )
    if critic is None:
        return
    if not needed:
        raise ConfigError(f"critic: objective {name} has none; leave the section out, or set objective.name=ppo")
    if critic.trunk == "shared":
        for field in ("path", "warmup_steps"):
            if value := getattr(critic, field):
                raise ConfigError(
                    f"critic.{field} = {value!r}: the trunk is the policy's, which learns with it; leave this out, or "
                    "set critic.trunk=own"
                )
        return
    if critic.warmup_steps >= config.steps:
        raise ConfigError(
            f"critic.warmup_steps = {critic.warmup_steps}: leaves none of steps = {config.steps} to the policy; take "
            "fewer"
        )
    if critic.path is not None:
        arch, policy = read_architecture(critic.path, "critic.path"), read_architecture(config.model.path)
        if arch.vocab != policy.vocab:
            raise ConfigError(
                f"critic.path = {critic.path!r}: has a vocabulary of {arch.vocab}, and model.path one of "
                f"{policy.vocab}; take a model with the same tokenizer"
            )
        check_layout(arch, config.parallel.tp)
        check_pipeline(arch, config.parallel.pp, config.parallel.vpp)
        check_model(critic.path, arch)


def describe_critic(config: Config) -> str:
    critic = config.critic
    if critic is None:
        return "none"
    if critic.trunk == "shared":
        return f"a second head on the policy's trunk, value_coef {critic.value_coef:g}"
    warm = f", {critic.warmup_steps} steps before the policy learns" if critic.warmup_steps else ""
    return f"a model of its own from {critic.path or 'model.path'}, lr {critic.optimizer.lr:g}{warm}"


def check_ops(backend: Literal["auto", "native", "torch", "liger"]) -> str:
    """Builds csrc before any rank waits for it; what will run, in words."""
    try:
        return ops.describe(backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ops.BuildError as error:
        raise ConfigError(f"ops.backend = {backend}: {error}") from None


def check_engine(config: Config, arch: Architecture, world: int) -> str:
    """What will write the answers, in words; refuses servers that cannot be started, or are not of this model."""
    if config.rollout.engine == "embedded":
        return "embedded: the policy's own weights, in the trainer's processes"
    from flowrl_mega.rollout.servers import check_servers
    from flowrl_mega.rollout.sglang import check_attached

    if isinstance(config.rollout.servers, int):
        return check_servers(config.rollout, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    store, held_out, _, _ = load_prompts(config)
    prompts = [*store, *(held_out or [])]
    longest = max(len(prompt.token_ids) for prompt in prompts)
    return check_attached(config.rollout, arch, longest + config.rollout.max_tokens)


def serve(config: Config, host: str, port: int | None, stop_requested: Callable[[], bool]) -> int:
    """The `serve` command: the fleet alone, with the weights of model.path, until it is told to stop."""
    from flowrl_mega.rollout.servers import Fleet, check_servers, supervise

    rollout = config.rollout
    if not isinstance(rollout.servers, int):
        raise ConfigError(f"rollout.servers = {rollout.servers}: says where servers run; to start some, give how many")
    if is_megatron(config.model.path):
        raise ConfigError(
            f"model.path = {config.model.path!r}: a Megatron checkpoint, which servers cannot read; convert it first: "
            "python tools/convert_ckpt.py mcore2hf --ckpt ... --out ..."
        )
    read_architecture(config.model.path)
    print(check_servers(rollout), flush=True)
    model, folder = Path(config.model.path), Path(config.run_dir) / "servers"
    fleet = Fleet(rollout, model, folder, config.model.dtype, 0, load_format="auto", host=host, first_port=port)
    try:
        fleet.start(stop_requested)
        print(f"ready; to train with them: --rollout.servers='[{', '.join(fleet.urls)}]'", flush=True)
        supervise(fleet, stop_requested)
    finally:
        fleet.close()
    return DONE


def _check_sequences(config: Config, dp: int) -> None:
    sequences, parallel = config.batch.mini_batch or config.sequences_per_step, config.parallel
    least = parallel.pp if parallel.vpp > 1 else 1
    if sequences < dp * least:
        each = f" x {least} that an interleaved pipeline (parallel.vpp) needs" if least > 1 else ""
        raise ConfigError(
            f"batch.mini_batch = {sequences}: fewer sequences than the {dp} data-parallel ranks{each}; "
            "take more sequences or fewer ranks"
        )


def _check_run_dir(run_dir: Path, resume: str, checkpoint: Path | None) -> None:
    """A run folder holds one run: only that run may go on in it.

    With --resume auto, a run that was ended before its first checkpoint starts over and its records are replaced.
    """
    place = run_dir
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ConfigError(f"run_dir = {str(run_dir)!r}: {place} is no folder that can be written; choose another")
    newest = find_checkpoint(run_dir, "auto")
    records = run_dir / METRICS
    goes_on = resume == "auto" or (newest and checkpoint and newest.resolve() == checkpoint.resolve())
    if not goes_on and (newest or (records.is_file() and records.stat().st_size)):
        raise ConfigError(
            f"run_dir = {str(run_dir)!r}: holds a run already, and --resume {resume} would mix another one into it; "
            "choose another run_dir, remove this one, or go on from its newest checkpoint with --resume auto"
        )


def describe(config: Config, world: int, checkpoint: Path | None) -> str:
    """What would run where."""
    arch, objective = read_architecture(config.model.path), objectives.build(config.objective)
    store, held_out, _, stop_ids = load_prompts(config)
    rollout, parallel = config.rollout, config.parallel
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (gloo)"
    sizes = {name: getattr(parallel, name) for name in ("tp", "pp", "cp")} | {"dp": world // parallel.model_ranks}
    ranks = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("tp", "dp"))
    ranks += f", {parallel.vpp} pieces of the model each" if parallel.vpp > 1 else ""
    ranks += ", sequence parallel" if parallel.sequence_parallel else ""
    settings = ", ".join(f"{name}={value}" for name, value in objective.model_dump().items() if name != "name")
    size = f"{arch.layers} layers of {arch.hidden}, vocabulary {arch.vocab}"
    kind = "Megatron checkpoint" if is_megatron(config.model.path) else "Hugging Face folder"
    lines = {
        "model": f"{config.model.path} ({kind}): {arch.model_type}, {size}",
        "ranks": f"{world} = {ranks}, on {device}",
        "layers": describe_layers(config.model),
        "FP8": describe_fp8(config.model),
        "optimizer": backends.optimizer(),
        "log-probs": check_ops(config.ops.backend),
        "engine": check_engine(config, arch, world),
        "objective": f"{config.objective['name']} ({settings})",
        "log Z": objective.log_z.kind if objective.log_z else "none",
        "critic": describe_critic(config),
        "reference": "frozen copy of model.path" if objective.needs_reference else "not needed",
        "prompts": f"{len(store)} to train on, {len(held_out) if held_out else 0} held out",
        "reward": "; ".join(filter(None, [config.reward, check_reward(config)])),
        "step": f"{rollout.prompts_per_step} prompts x {rollout.group_size} answers of at most {rollout.max_tokens} "
        f"tokens, {config.updates_per_step} update(s), {config.steps} steps; answers end at ids {list(stop_ids)}",
        "run folder": f"{config.run_dir}, " + (f"resuming {checkpoint}" if checkpoint else "from the start"),
    }
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def _say(text: str, first_rank: bool) -> None:
    if first_rank:
        print(text)
