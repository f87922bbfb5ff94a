"""What one setting alone cannot know: settings that contradict each other, and settings that nothing reads."""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

from flowrl_mega.config import Config, ConfigError, ModelSettings, RolloutSettings
from flowrl_mega.config_rollout import server_faults
from flowrl_mega.settings import Needs, refuse_unread

# Read by the engine of SGLang; one from outside the package may read them too.
SERVERS = """rollout.partial_tokens rollout.servers rollout.nodes rollout.python rollout.server_args
    rollout.colocated rollout.api_key_file rollout.concurrency rollout.request_timeout_s rollout.hang_s
    rollout.start_timeout_s rollout.sync"""
# What a remote sandbox decides itself.
OWN_SANDBOX = """reward.code.isolation reward.code.python reward.code.packages reward.code.cpu_s reward.code.disk_mb
    reward.code.processes reward.code.open_files"""
OWN_TRUNK = """critic.path critic.warmup_steps critic.optimizer.betas critic.optimizer.eps critic.optimizer.weight_decay
    critic.optimizer.clip_grad critic.optimizer.warmup_steps critic.optimizer.decay critic.optimizer.distributed
    critic.optimizer.offload"""
GATE = "model.fp8_first_last_bf16 model.fp8_check_every model.fp8_budget model.fp8_action"

NEEDS = (
    Needs("data.task_args", "data.task", lambda c: c.data.task is not None),
    Needs("data.template_date", "data.chat_template", lambda c: c.data.chat_template),
    Needs("data.dali", "data.loader=dali", lambda c: c.data.loader == "dali"),
    Needs("data.dali.buffer", "data.dali.shuffle=reader", lambda c: c.data.dali.shuffle == "reader"),
    Needs(GATE, "a recipe in model.fp8", lambda c: c.model.fp8 != "off"),
    Needs(OWN_SANDBOX, "reward.code.url=null", lambda c: c.reward.code.url is None),
    Needs("reward.code.packages", "reward.code.python=null", lambda c: c.reward.code.python is None),
    Needs(SERVERS, "rollout.engine=sglang", lambda c: c.rollout.engine != "embedded"),
    Needs("rollout.sync.folder", "rollout.sync.transfer=disk", lambda c: c.rollout.sync.transfer == "disk"),
    Needs("rollout.mismatch.action", "rollout.mismatch.budget", lambda c: c.rollout.mismatch.budget is not None),
    Needs(
        "rollout.allow_truncated_sampling",
        "rollout.top_p below 1 or rollout.top_k above 0",
        lambda c: c.rollout.top_p < 1 or c.rollout.top_k > 0,
    ),
    Needs(OWN_TRUNK, "critic.trunk=own", lambda c: c.critic is None or c.critic.trunk == "own"),
    Needs("critic.value_coef", "critic.trunk=shared", lambda c: c.critic is None or c.critic.trunk == "shared"),
    Needs(
        "evaluation.samples evaluation.distinct_at evaluation.benchmarks",
        "evaluation.every",
        lambda c: c.evaluation.every > 0,
    ),
    Needs("evaluation.benchmarks", "evaluation.benchmarks.names", lambda c: len(c.evaluation.benchmarks.names) > 0),
    Needs("monitor.wandb_checkpoints", "monitor.wandb", lambda c: c.monitor.wandb != "off"),
    Needs(
        "monitor.wandb_project",
        "monitor.wandb or monitor.trackio",
        lambda c: c.monitor.wandb != "off" or c.monitor.trackio,
    ),
)


def check_together(config: Config) -> None:
    """Raises ConfigError for settings that contradict each other, all at once, or else for those that nothing reads."""
    faults = [*_data(config), *_steps(config), *_precision(config.model, config.optimizer.distributed is not False)]
    faults += [*_ahead(config.rollout), *_replay(config), *_servers(config.rollout), *_sampling(config.rollout)]
    if faults:
        raise ConfigError("\n".join(faults))
    refuse_unread(config, NEEDS)


def _data(config: Config) -> Iterator[str]:
    data = config.data
    if (data.path is None) == (data.task is None):
        yield f"data.path = {data.path!r}, data.task = {data.task!r}: set exactly one of the two"
    elif data.path is not None and not os.path.exists(data.path):
        yield (
            f"data.path = {data.path!r}: no such file; give a JSON lines file, or a prompt store that "
            "tools/prepare_data.py has made"
        )
    elif data.loader == "dali" and not (data.path and os.path.isdir(data.path)):
        yield (
            "data.loader = dali: reads prompt stores only; make one with tools/prepare_data.py and name it with "
            "data.path, or set data.loader=mmap"
        )
    if isinstance(data.held_out, str) and not os.path.exists(data.held_out):
        yield (
            f"data.held_out = {data.held_out!r}: no such file; give a share (0.1), a JSON lines file, or a prompt "
            "store that tools/prepare_data.py has made"
        )
    if isinstance(data.held_out, float) and not 0 < data.held_out < 1:
        yield f"data.held_out = {data.held_out}: a share must lie between 0 and 1"
    if config.evaluation.every and data.held_out is None and not config.evaluation.benchmarks.names:
        yield (
            f"evaluation.every = {config.evaluation.every}: needs prompts; set data.held_out (0.1), or "
            "evaluation.benchmarks.names"
        )


def _steps(config: Config) -> Iterator[str]:
    total, mini_batch = config.sequences_per_step, config.batch.mini_batch
    if mini_batch is not None and total % mini_batch:
        yield (
            f"batch.mini_batch = {mini_batch}: does not divide the {total} sequences of a step "
            f"(rollout.prompts_per_step x rollout.group_size); take a divisor of {total}"
        )
        return
    updates = config.steps * config.updates_per_step
    optimizers = {"optimizer": config.optimizer}
    if config.critic:
        optimizers["critic.optimizer"] = config.critic.optimizer
        if (rate := config.critic.optimizer.log_z_lr) is not None:
            yield f"critic.optimizer.log_z_lr = {rate}: a critic has no log Z; leave it out, or set optimizer.log_z_lr"
    for section, settings in optimizers.items():
        if settings.decay != "constant" and settings.warmup_steps >= updates:
            yield (
                f"{section}.warmup_steps = {settings.warmup_steps}: leaves none of the {updates} updates to "
                f"{section}.decay = {settings.decay}; take fewer"
            )


def _precision(model: ModelSettings, distributed: bool) -> Iterator[str]:
    """What the machine lacks is found in model/checks.py."""
    for field in ("fp8", "reference_fp8"):
        recipe = getattr(model, field)
        if recipe != "off" and model.dtype != "bf16":
            yield f"model.{field} = {recipe}: needs bf16 weights beside it; set model.dtype=bf16"
        if recipe != "off" and model.spec == "local":
            yield f"model.{field} = {recipe}: only Transformer Engine's layers compute in FP8; set model.spec=te"
    if model.fp8_params and (model.fp8 == "off" or not distributed):
        yield (
            f"model.fp8_params = True: needs a recipe (model.fp8 = {model.fp8}) and the distributed optimizer, which "
            "alone makes FP8 weights of fp32 ones; set model.fp8=tensorwise and optimizer.distributed=true, or leave "
            "this out (bf16 weights are then quantised as they are multiplied)"
        )
    if model.fp8 == "delayed" and model.fp8_first_last_bf16:
        yield (
            "model.fp8_first_last_bf16 = True: the recipe delayed updates its scales once for all layers together, so "
            "none can be left out; leave this out, or set model.fp8=tensorwise"
        )


def _ahead(rollout: RolloutSettings) -> Iterator[str]:
    if rollout.ahead > 1 and rollout.partial_tokens is not None:
        yield (
            f"rollout.ahead = {rollout.ahead}: with rollout.partial_tokens an answer would go on so many steps later "
            "only; take ahead=1, or leave rollout.partial_tokens out"
        )
    if rollout.max_staleness is not None and rollout.ahead > rollout.max_staleness:
        yield (
            f"rollout.ahead = {rollout.ahead}: all answers would be beyond rollout.max_staleness = "
            f"{rollout.max_staleness}; take fewer, or allow more"
        )


def _replay(config: Config) -> Iterator[str]:
    rollout = config.rollout
    if rollout.replay is None:
        return
    if not rollout.replayed:
        yield (
            f"rollout.replay.share = {rollout.replay.share:g}: less than one of rollout.prompts_per_step = "
            f"{rollout.prompts_per_step} groups; take more, or leave rollout.replay out"
        )
    whole = config.steps * rollout.prompts_per_step
    if rollout.replay.size > whole:
        yield (
            f"rollout.replay.size = {rollout.replay.size}: the run has {whole} groups (steps x "
            "rollout.prompts_per_step); take fewer"
        )
    if rollout.max_staleness == 0:
        yield "rollout.replay: no earlier group is young enough with rollout.max_staleness = 0; allow more"


def _servers(rollout: RolloutSettings) -> Iterator[str]:
    if rollout.engine == "embedded":
        return
    if rollout.partial_tokens is not None and rollout.partial_tokens >= rollout.max_tokens:
        yield (
            f"rollout.partial_tokens = {rollout.partial_tokens}: no answer is longer than rollout.max_tokens = "
            f"{rollout.max_tokens}; take fewer, or leave it out"
        )
    yield from server_faults(rollout.servers, rollout.api_key_file)
    for url in rollout.servers if isinstance(rollout.servers, list) and rollout.sync.transfer == "tensor" else []:
        if urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            yield f"rollout.sync.transfer = tensor: shares memory, and {url} is another host; take distributed or disk"
    if rollout.colocated and rollout.ahead:
        yield (
            f"rollout.ahead = {rollout.ahead}: servers that share the trainer's GPUs sleep while it trains; set ahead=0"
        )
    if rollout.colocated and isinstance(rollout.servers, list):
        yield "rollout.colocated = True: only for servers that are started here; give rollout.servers=1"
    if rollout.nodes and isinstance(rollout.servers, list):
        yield f"rollout.nodes = {rollout.nodes}: servers are found in run_dir; set rollout.servers=1, how many each"
    if rollout.nodes and rollout.colocated:
        yield f"rollout.nodes = {rollout.nodes}: nodes without a trainer; set rollout.colocated=false"
    if rollout.nodes and rollout.sync.transfer == "tensor":
        yield "rollout.sync.transfer = tensor: shares memory, and rollout.nodes are others; take distributed or disk"


def _sampling(rollout: RolloutSettings) -> Iterator[str]:
    if (rollout.top_p < 1 or rollout.top_k) and not rollout.allow_truncated_sampling:
        yield (
            f"rollout.top_p = {rollout.top_p}, rollout.top_k = {rollout.top_k}: answers would be drawn from another "
            "distribution than the one scored; use 1.0 and 0, or set rollout.allow_truncated_sampling=true"
        )
