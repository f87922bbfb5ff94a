"""From a YAML file and `--section.field=value` flags to checked settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import yaml

from flowrl_mega.config import Config, ConfigError, ModelSettings, OptimizerSettings, RolloutSettings
from flowrl_mega.config_moves import is_earlier_run, refuse_moved, translated
from flowrl_mega.settings import validated


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The checked settings of a YAML file with `section.field=value` overrides (values are read as YAML)."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file of settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not a mapping of settings")
    if is_earlier_run(tree):
        tree = translated(tree)
    if isinstance(tree.get("reward"), str):
        tree["reward"] = {"function": tree["reward"]}
    for override in overrides:
        _apply(tree, override)
    refuse_moved(tree)
    config = validated(Config, tree, "")
    _check_together(config)
    return config


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in the tree."""
    name, found, text = override.lstrip("-").partition("=")
    if not found or not name:
        raise ConfigError(f"{override!r}: not a setting; write --section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if name == "reward" and isinstance(value, str):
        name = "reward.function"  # the short form sets the function, and its settings stay
    *sections, field = name.split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            place = ".".join(sections[: depth + 1])
            raise ConfigError(f"{name} = {text!r}: {place} is a value, not a section; set {place} itself")
    tree[field] = _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _check_together(config: Config) -> None:
    """What one field alone cannot know."""
    data, rollout, batch = config.data, config.rollout, config.batch
    if (data.path is None) == (data.task is None):
        raise ConfigError(f"data.path = {data.path!r}, data.task = {data.task!r}: set exactly one of the two")
    for name, path in (("path", data.path), ("held_out", data.held_out)):
        if isinstance(path, str) and not Path(path).exists():
            share = "" if name == "path" else "a share (0.1), "
            raise ConfigError(
                f"data.{name} = {path!r}: no such file; give {share}a JSON lines file, or a prompt store that "
                "tools/prepare_data.py has made"
            )
    if data.loader == "dali" and not (data.path and Path(data.path).is_dir()):
        raise ConfigError(
            "data.loader = dali: reads prompt stores only; make one with tools/prepare_data.py and name it with "
            "data.path, or set data.loader=mmap"
        )
    if isinstance(data.held_out, float) and not 0 < data.held_out < 1:
        raise ConfigError(f"data.held_out = {data.held_out}: a share must lie between 0 and 1")
    if config.evaluation.every and data.held_out is None:
        raise ConfigError(f"evaluation.every = {config.evaluation.every}: needs prompts; set data.held_out (0.1)")
    total = config.sequences_per_step
    if batch.mini_batch is not None and total % batch.mini_batch:
        raise ConfigError(
            f"batch.mini_batch = {batch.mini_batch}: does not divide the {total} sequences of a step "
            f"(rollout.prompts_per_step x rollout.group_size); take a divisor of {total}"
        )
    updates = config.steps * config.updates_per_step
    _check_decay("optimizer", config.optimizer, updates)
    if config.critic:
        _check_decay("critic.optimizer", config.critic.optimizer, updates)
    _check_fp8(config.model, config.optimizer.distributed)
    _check_rollout(rollout)
    if (rollout.top_p < 1 or rollout.top_k) and not rollout.allow_truncated_sampling:
        raise ConfigError(
            f"rollout.top_p = {rollout.top_p}, rollout.top_k = {rollout.top_k}: answers would be drawn from another "
            "distribution than the one scored; use 1.0 and 0, or set rollout.allow_truncated_sampling=true"
        )


def _check_decay(section: str, settings: OptimizerSettings, updates: int) -> None:
    if settings.decay != "constant" and settings.warmup_steps >= updates:
        raise ConfigError(
            f"{section}.warmup_steps = {settings.warmup_steps}: leaves none of the {updates} updates to "
            f"{section}.decay = {settings.decay}; take fewer"
        )


def _check_fp8(model: ModelSettings, distributed: bool) -> None:
    """What does not go together in the model section; what the machine lacks is found in model/checks.py."""
    for field in ("fp8", "reference_fp8"):
        recipe = getattr(model, field)
        if recipe == "off":
            continue
        if model.dtype != "bf16":
            raise ConfigError(f"model.{field} = {recipe}: needs bf16 weights beside it; set model.dtype=bf16")
        if model.spec == "local":
            raise ConfigError(
                f"model.{field} = {recipe}: only Transformer Engine's layers compute in FP8; set model.spec=te"
            )
    if model.fp8_params and (model.fp8 == "off" or not distributed):
        raise ConfigError(
            f"model.fp8_params = True: needs a recipe (model.fp8 = {model.fp8}) and the distributed optimizer, which "
            "alone makes FP8 weights of fp32 ones; set model.fp8=tensorwise and optimizer.distributed=true, or leave "
            "this out (bf16 weights are then quantised as they are multiplied)"
        )
    if model.fp8 == "delayed" and model.fp8_first_last_bf16:
        raise ConfigError(
            "model.fp8_first_last_bf16 = True: the recipe delayed updates its scales once for all layers together, so "
            "none can be left out; leave this out, or set model.fp8=tensorwise"
        )


def _check_rollout(rollout: RolloutSettings) -> None:
    """What does not go together in the rollout section."""
    if rollout.engine == "embedded":
        used = {name: getattr(rollout, name) for name in ("ahead", "partial_tokens", "colocated")}
        for name, value in used.items():
            if value:
                raise ConfigError(f"rollout.{name} = {value}: needs servers; set rollout.engine=sglang")
    if rollout.partial_tokens is not None and rollout.partial_tokens >= rollout.max_tokens:
        raise ConfigError(
            f"rollout.partial_tokens = {rollout.partial_tokens}: no answer is longer than rollout.max_tokens = "
            f"{rollout.max_tokens}; take fewer, or leave it out"
        )
    attached = isinstance(rollout.servers, list)
    if rollout.servers == []:
        raise ConfigError("rollout.servers = []: give at least one URL, or how many servers to start")
    for url in rollout.servers if isinstance(rollout.servers, list) else []:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"rollout.servers: {url!r} is no URL; write it as http://HOST:PORT")
        if rollout.sync.transfer == "tensor" and urlsplit(url).hostname not in ("127.0.0.1", "localhost", "::1"):
            raise ConfigError(
                f"rollout.sync.transfer = tensor: shares memory, and {url} is another host; take distributed or disk"
            )
    if rollout.colocated and rollout.ahead:
        raise ConfigError("rollout.ahead = 1: servers that share the trainer's GPUs sleep while it trains; set ahead=0")
    if rollout.colocated and attached:
        raise ConfigError("rollout.colocated = True: only for servers that are started here; give rollout.servers=1")
    if rollout.api_key_file is not None and not Path(rollout.api_key_file).is_file():
        raise ConfigError(f"rollout.api_key_file = {rollout.api_key_file!r}: no such file; give one that holds the key")
