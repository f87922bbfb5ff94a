"""Answers for training and evaluation: the engine protocol, the embedded engine, SGLang, and the choice among them."""

from collections.abc import Callable

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.imports import load
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.parallel.layout import Layout, ranks_on_host
from flowrl_mega.rollout.embedded import EmbeddedEngine
from flowrl_mega.rollout.engine import ENGINE_METHODS, Engine, EngineSetup, Request, Rollout, generate

__all__ = ["EmbeddedEngine", "Engine", "EngineSetup", "Request", "Rollout", "build_engine", "generate", "load_engine"]


def build_engine(config: Config, layout: Layout, arch: Architecture, side_files: dict[str, bytes]) -> Engine:
    """The engine that `rollout.engine` names. Collective. `side_files`: the model's config and tokenizer, by name."""
    if config.rollout.engine == "embedded":
        return EmbeddedEngine(layout)
    if config.rollout.engine == "sglang":
        from flowrl_mega.rollout.sglang.engine import SglangEngine

        return SglangEngine(config, layout, arch, side_files, ranks_on_host())
    return load_engine(config.rollout.engine)(EngineSetup(config, layout, arch, side_files))


def load_engine(spec: str) -> Callable[[EngineSetup], Engine]:
    """The class from outside the package that `rollout.engine` = `spec` names: module:Class or path/to/file.py:Class.

    Raises ConfigError if it cannot be imported, is no class, or lacks methods of `Engine`.
    """
    found = load(spec, "rollout.engine")
    if not isinstance(found, type):
        raise ConfigError(
            f"rollout.engine = {spec!r}: is no class; name one with the methods of Engine in "
            "flowrl_mega/rollout/engine.py"
        )
    if lacking := [name for name in ENGINE_METHODS if not callable(getattr(found, name, None))]:
        raise ConfigError(
            f"rollout.engine = {spec!r}: lacks {', '.join(lacking)}; see Engine in flowrl_mega/rollout/engine.py"
        )
    return found
