"""Answers for training and evaluation: the engine protocol and the embedded engine."""

from flowrl_mega.rollout.embedded import EmbeddedEngine
from flowrl_mega.rollout.engine import Engine, Rollout

__all__ = ["EmbeddedEngine", "Engine", "Rollout"]
