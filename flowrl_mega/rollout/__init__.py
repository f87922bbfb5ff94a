"""Answers for training and evaluation: the engine protocol, the embedded engine, and SGLang behind a server."""

from flowrl_mega.config import Config
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.parallel.layout import Layout, ranks_on_host
from flowrl_mega.rollout.embedded import EmbeddedEngine
from flowrl_mega.rollout.engine import Engine, Request, Rollout, generate

__all__ = ["EmbeddedEngine", "Engine", "Request", "Rollout", "build_engine", "generate"]


def build_engine(config: Config, layout: Layout, arch: Architecture, side_files: dict[str, bytes]) -> Engine:
    """The engine that `rollout.engine` names. Collective; `side_files`: config and tokenizer of the model."""
    if config.rollout.engine == "embedded":
        return EmbeddedEngine(layout)
    from flowrl_mega.rollout.sglang import SglangEngine

    return SglangEngine(config, layout, arch, side_files, ranks_on_host())
