"""Everything that can be wrong with a run's input, found before a rank starts; and what would run, in words."""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch

from flowrl_mega import objectives, ops
from flowrl_mega.benchmark.in_training import Asked, asked_by, describe_graders
from flowrl_mega.checkpoint import check_checkpoint, check_model, critic_in_checkpoint, find_checkpoint, is_megatron
from flowrl_mega.config import Config, ConfigError, ModelSettings, OptimizerSettings, RolloutSettings
from flowrl_mega.data.digest import digest
from flowrl_mega.data.fit import check_positions, check_prompts, check_vocabulary
from flowrl_mega.data.load_prompts import PromptData, kinds_of, load_prompts, modules_of
from flowrl_mega.host_checks import check_allocator, check_disk, check_shared_memory
from flowrl_mega.model.architecture import Architecture, read_architecture
from flowrl_mega.model.checks import check_head, check_layers, check_layout, check_megatron, check_pipeline
from flowrl_mega.model.precision import describe_fp8, describe_layers
from flowrl_mega.monitor import check_tensorboard, check_trackio, check_wandb
from flowrl_mega.monitor.run_folder import CONFIG, DISTRIBUTIONS, EVALUATION, METRICS, SAMPLES, STARTS
from flowrl_mega.objectives import Objective
from flowrl_mega.parallel import backends
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.optimizer import check_optimizer, decided
from flowrl_mega.resume import Resumption, resumption
from flowrl_mega.rewards.load import Reward, load_reward
from flowrl_mega.rollout import load_engine

# In a run folder: what a run writes to, and what it goes on from, and replaces.
FOLDERS = ("checkpoints", "faults", "servers", "tensorboard", "trackio", "wandb", "weights")
RECORDS = (CONFIG, METRICS, EVALUATION, SAMPLES, DISTRIBUTIONS, STARTS)


class Inputs:
    """What the settings name, each loaded once, when it is first asked for: the checks, the plan and the run share it.

    Each property raises ConfigError where its setting is wrong.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.resumed: Resumption | None = None  # what `check` found of a checkpoint to go on from

    @cached_property
    def arch(self) -> Architecture:
        return read_architecture(self.config.model.path)

    @cached_property
    def objective(self) -> Objective:
        return objectives.build(self.config.objective)

    @cached_property
    def data(self) -> PromptData:
        """The prompts, tokenized."""
        return load_prompts(self.config)

    @cached_property
    def data_digest(self) -> dict[str, Any]:
        """The training data as a checkpoint knows them."""
        return digest(self.data.prompts)

    @cached_property
    def benchmarks(self) -> list[Asked]:
        """Those of evaluation.benchmarks, tokenized."""
        return asked_by(self.config, self.data.tokenizer)

    @cached_property
    def reward(self) -> Reward:
        return load_reward(self.config.reward)

    @cached_property
    def reward_description(self) -> str:
        """What the reward says of itself and the data's rows, such as the isolation that programs get here; it may
        refuse them."""
        reward, data = self.reward, self.data  # a wrong name is told before data are read
        every = [prompts for prompts in (data.prompts, data.held_out) if prompts]
        own = reward.describe(set().union(*map(kinds_of, every)), set().union(*map(modules_of, every)))
        return "; of benchmarks ".join(filter(None, [own, describe_graders(self.config, self.benchmarks)]))


def ranks_to_start(config: Config) -> int:
    """Ranks of a job that nobody has started yet. Without parallel.dp they take the host's GPUs that servers leave."""
    gpus, rollout, parallel = None, config.rollout, config.parallel
    if torch.cuda.is_available():
        gpus = torch.cuda.device_count()
        if rollout.engine == "sglang" and rollout.starts_servers and not rollout.colocated:
            from flowrl_mega.rollout.sglang.flags import on_gpu, ranks_per_server

            assert isinstance(rollout.servers, int)
            left = gpus - (rollout.servers * ranks_per_server(rollout) if on_gpu(rollout) else 0)
            gpus = max(left, min(gpus, parallel.model_ranks))  # check_servers says what is wrong with too many servers
    return layouts.world_size(parallel, gpus, config.batch.mini_batch or config.sequences_per_step)


def check(inputs: Inputs, world: int, resume: str, checkpoint: Path | None, one_of_many: bool = False) -> None:
    """Raises ConfigError for anything wrong with the input, before a rank starts and before anything is written.

    Ranks that torchrun or srun started (`one_of_many`) all find the same here, so that none waits for another that
    has given up; each host's disk and memory, and a checkpoint's bytes, they check together once they have met.
    """
    config, objective = inputs.config, inputs.objective
    check_critic(inputs)
    check_frozen(objective, config.rollout)
    check_ops(config.ops.backend)
    layouts.check_world(config.parallel, world)
    arch = inputs.arch
    check_layout(arch, config.parallel.tp)
    check_pipeline(arch, config.parallel.pp, config.parallel.vpp)
    check_head(config.ops.backend, arch, config.parallel.tp)
    check_layers(config.model, arch, config.parallel.tp, config.parallel.cp)
    check_megatron(config, arch)
    for section, settings in optimizers(config, world).items():
        check_optimizer(settings, section)
    check_model(config.model.path, arch)
    _ = inputs.reward_description
    check_prompts(inputs.data, config, arch.vocab, arch.max_positions)
    check_benchmarks(inputs)
    check_wandb(config.monitor.wandb)
    check_tensorboard(config.monitor.tensorboard)
    check_trackio(config.monitor.trackio)
    check_sequences(config, world // config.parallel.model_ranks)
    check_allocator(config)
    if not one_of_many:
        check_engine(inputs, world)
        check_shared_memory(config)
        check_disk(config, arch)
    _check_run_dir(Path(config.run_dir), resume, checkpoint)
    if checkpoint and not one_of_many:
        state = check_checkpoint(checkpoint, arch, objective.log_z, config.critic.trunk if config.critic else None)
        if config.critic and config.critic.trunk == "own":
            path = config.critic.path or config.model.path
            critic_in_checkpoint(checkpoint, read_architecture(path, "critic.path"), f"critic.path = {path!r}")
        inputs.resumed = resumption(state, config, inputs.data.prompts, inputs.data_digest)


def check_benchmarks(inputs: Inputs) -> None:
    config, arch = inputs.config, inputs.arch
    for problems, prompts in inputs.benchmarks:
        check_vocabulary(f"benchmark {problems.name}", prompts, arch.vocab, inputs.data.tokenizer)
        if config.rollout.engine == "embedded":
            most = config.evaluation.benchmarks.max_tokens or config.rollout.max_tokens
            check_positions(f"benchmark {problems.name}", prompts, arch.max_positions, most)


def optimizers(config: Config, world: int) -> dict[str, OptimizerSettings]:
    """Each model's by their section, decided for so many ranks."""
    copies = world // (config.parallel.tp * config.parallel.pp)
    found = {"optimizer": decided(config.optimizer, copies, config.model.fp8_params)}
    if config.critic and config.critic.trunk == "own":
        found["critic.optimizer"] = decided(config.critic.optimizer, copies)
    return found


def check_critic(inputs: Inputs) -> None:
    """A critic where the objective needs one and only there, and a model that fits beside the policy."""
    config, needed = inputs.config, inputs.objective.needs_critic
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
        return
    if critic.warmup_steps >= config.steps:
        raise ConfigError(
            f"critic.warmup_steps = {critic.warmup_steps}: leaves none of steps = {config.steps} to the policy; take "
            "fewer"
        )
    if critic.path is not None:
        arch, policy = read_architecture(critic.path, "critic.path"), inputs.arch
        if arch.vocab != policy.vocab:
            raise ConfigError(
                f"critic.path = {critic.path!r}: has a vocabulary of {arch.vocab}, and model.path one of "
                f"{policy.vocab}; take a model with the same tokenizer"
            )
        check_layout(arch, config.parallel.tp)
        check_pipeline(arch, config.parallel.pp, config.parallel.vpp)
        check_megatron(config, arch)
        check_model(critic.path, arch)


def check_frozen(objective: Objective, rollout: RolloutSettings) -> None:
    if objective.reference_answers and (rollout.top_p < 1 or rollout.top_k):
        raise ConfigError(
            f"objective.z = frozen: log Z is a mean over the reference's whole distribution, which rollout.top_p = "
            f"{rollout.top_p} and rollout.top_k = {rollout.top_k} cut; use 1.0 and 0, or another objective.z"
        )


def check_ops(backend: Literal["auto", "native", "torch", "liger"]) -> str:
    """Builds csrc before any rank waits for it; what will run, in words."""
    try:
        return ops.describe(backend, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    except ops.BuildError as error:
        raise ConfigError(f"ops.backend = {backend}: {error}") from None


def check_ops_of_ranks(backend: Literal["auto", "native", "torch", "liger"], layout: layouts.Layout) -> None:
    """Refuses a job whose tensor-parallel ranks have unlike kernels, a node without a compiler say; called by all."""
    try:
        ops.check_ranks(backend, layout.device, layout.tp_group)
    except ops.UnlikeRanks as error:
        raise ConfigError(str(error)) from None


def check_engine(inputs: Inputs, world: int) -> str:
    """What will generate, in words. Refuses an engine that cannot be loaded, and servers that cannot be started or
    serve another model."""
    config = inputs.config
    if config.rollout.engine == "embedded":
        return "embedded: the policy's own weights, in the trainer's processes"
    if config.rollout.engine != "sglang":
        load_engine(config.rollout.engine)
        return f"{config.rollout.engine}, from outside the package"
    from flowrl_mega.rollout.sglang.attached import check_attached
    from flowrl_mega.rollout.sglang.flags import check_servers, on_gpu

    if config.rollout.starts_servers:
        given = {name.replace("-", "_") for name in config.rollout.server_args}
        if config.model.dtype == "fp32" and on_gpu(config.rollout) and "attention_backend" not in given:
            raise ConfigError(
                "model.dtype = fp32: the attention that SGLang takes on a GPU (FlashAttention) computes in 16 bits "
                "alone; set model.dtype=bf16, or rollout.server_args.attention_backend=torch_native, which is slow"
            )
        return check_servers(config.rollout, int(os.environ.get("LOCAL_WORLD_SIZE", world)))
    if config.rollout.nodes:
        return f"SGLang on {config.rollout.nodes} other nodes, {config.rollout.servers} server(s) each"
    prompts = [*inputs.data.prompts, *(inputs.data.held_out or [])]
    needed = max(len(prompt.token_ids) for prompt in prompts) + config.rollout.max_tokens
    for _, asked in inputs.benchmarks:
        most = config.evaluation.benchmarks.max_tokens or config.rollout.max_tokens
        needed = max(needed, max(len(prompt.token_ids) for prompt in asked) + most)
    return check_attached(config.rollout, inputs.arch, needed)


def check_sequences(config: Config, dp: int) -> None:
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
    while not os.path.exists(place):  # as seen from here: a folder above may be closed
        place = place.parent
    folders = [place, *(run_dir / name for name in FOLDERS if os.path.lexists(run_dir / name))]
    for place in folders:
        if not os.path.isdir(place) or not os.access(place, os.R_OK | os.W_OK | os.X_OK):
            raise ConfigError(f"run_dir = {str(run_dir)!r}: {place} is no folder that can be written; choose another")
    for file in (run_dir / name for name in RECORDS if os.path.lexists(run_dir / name)):
        if not os.path.isfile(file) or not os.access(file, os.R_OK):
            raise ConfigError(f"run_dir = {str(run_dir)!r}: {file} is no file that can be read; choose another")
    newest = find_checkpoint(run_dir, "auto")
    records = run_dir / METRICS
    goes_on = resume == "auto" or (newest and checkpoint and newest.resolve() == checkpoint.resolve())
    if not goes_on and (newest or (records.is_file() and records.stat().st_size)):
        raise ConfigError(
            f"run_dir = {str(run_dir)!r}: holds a run already, and --resume {resume} would mix another one into it; "
            "choose another run_dir, remove this one, or go on from its newest checkpoint with --resume auto"
        )


def describe(inputs: Inputs, world: int, checkpoint: Path | None) -> str:
    """What would run where."""
    config, arch, objective = inputs.config, inputs.arch, inputs.objective
    prompts, held_out, _, stop_ids = inputs.data
    rollout, parallel = config.rollout, config.parallel
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU (gloo)"
    sizes = {name: getattr(parallel, name) for name in ("tp", "pp", "cp")} | {"dp": world // parallel.model_ranks}
    ranks = " x ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name in ("tp", "dp"))
    ranks += f", {parallel.vpp} virtual stages each" if parallel.vpp > 1 else ""
    ranks += ", sequence parallel" if parallel.sequence_parallel else ""
    reference = "frozen copy of model.path" + (", in CPU memory between uses" if config.model.reference_offload else "")
    settings = ", ".join(f"{name}={value}" for name, value in objective.model_dump().items() if name != "name")
    size = f"{arch.layers} layers of {arch.hidden}, vocabulary {arch.vocab}"
    kind = "Megatron checkpoint" if is_megatron(config.model.path) else "Hugging Face folder"
    lines = {
        "model": f"{config.model.path} ({kind}): {arch.model_type}, {size}",
        "ranks": f"{world} = {ranks}, on {device}; a collective may take {parallel.timeout_s} s",
        "layers": describe_layers(config.model),
        "FP8": describe_fp8(config.model),
        "optimizer": describe_optimizers(config, world),
        "log-probs": f"{check_ops(config.ops.backend)}; {logits_kept(config.model)}",
        "engine": check_engine(inputs, world),
        "objective": f"{config.objective['name']} ({settings})",
        "ratios": f"against {describe_old(objective, rollout.writes_ahead)}",
        "log Z": describe_log_z(objective, config, len(prompts), checkpoint),
        "critic": describe_critic(config),
        "reference": reference if objective.needs_reference else "not needed",
        "prompts": f"{len(prompts)} to train on, {len(held_out) if held_out else 0} held out",
        "reward": "; ".join(filter(None, [config.reward.function, inputs.reward_description])),
        "step": f"{rollout.prompts_per_step} prompts x {rollout.group_size} answers of at most {rollout.max_tokens} "
        f"tokens, {config.updates_per_step} update(s), {config.steps} steps; answers end at ids {list(stop_ids)}",
        "run folder": f"{config.run_dir}, " + (f"resuming {checkpoint}" if checkpoint else "from the start"),
    }
    if inputs.benchmarks:
        lines["benchmarks"] = describe_benchmarks(inputs)
    if inputs.resumed:
        said = inputs.resumed.lines or ["settings and data are those of the checkpoint"]
        lines["compared"] = f"\n{' ' * 12}".join(said)
    return "\n".join(f"{name:<12}{text}" for name, text in lines.items())


def describe_benchmarks(inputs: Inputs) -> str:
    settings, config = inputs.config.evaluation.benchmarks, inputs.config
    every = ", ".join(f"{problems.title} ({len(prompts)} problems)" for problems, prompts in inputs.benchmarks)
    return (
        f"{every} x {settings.k} answers of at most {settings.max_tokens or config.rollout.max_tokens} tokens at "
        f"temperature {settings.temperature:g}, top_p {settings.top_p:g}, every {config.evaluation.every} steps"
    )


def describe_old(objective: Objective, stale: bool) -> str:
    """Which policy the ratios of an update are against, in words."""
    if objective.is_old_behaviour(stale):
        return "the policy that wrote each token (behaviour), by the engine's log-probs"
    tis = f"; weighed by {objective.tis} to the engine's log-probs (decoupled)" if objective.tis != "none" else ""
    return f"the policy before the step's first update, scored by the trainer{tis}"


def describe_log_z(objective: Objective, config: Config, prompts: int, checkpoint: Path | None) -> str:
    """Where log Z comes from, and what its estimate costs, in words."""
    answers = objective.reference_answers
    if objective.log_z is None:
        return "none"
    if objective.log_z.learned:
        return f"{objective.log_z.kind}, lr {config.optimizer.log_z_lr or config.optimizer.lr:g}"
    if not answers:
        return objective.log_z.kind
    if checkpoint:
        return f"{objective.log_z.kind}, as estimated before the first step"
    return (
        f"{objective.log_z.kind}, estimated before the first step from {answers} answers of the reference to each of "
        f"{prompts} prompts: as many as {answers * prompts / config.sequences_per_step:.3g} steps generate"
    )


def logits_kept(model: ModelSettings) -> str:
    measured = model.logits_budget_mb == "auto" and torch.cuda.is_available()
    later = ", and from the second update on half of what it left free" if measured else ""
    return f"{model.first_logits_budget_mb} MB of logits kept{later}"


def describe_optimizers(config: Config, world: int) -> str:
    kept = [section for section, settings in optimizers(config, world).items() if settings.shares]
    copies = world // (config.parallel.tp * config.parallel.pp)
    shares = f"; {' and '.join(kept)}: moments in {copies} shares" if kept else ""
    early = config.parallel.overlap_grad_reduce and copies > 1
    return backends.optimizer() + shares + ("; gradients are summed during the backward pass" if early else "")


def describe_critic(config: Config) -> str:
    critic = config.critic
    if critic is None:
        return "none"
    if critic.trunk == "shared":
        return f"a second head on the policy's trunk, value_coef {critic.value_coef:g}"
    warm = f", {critic.warmup_steps} steps before the policy learns" if critic.warmup_steps else ""
    return f"a model of its own from {critic.path or 'model.path'}, lr {critic.optimizer.lr:g}{warm}"
