"""The settings of `rollout`: how answers are generated, by which engine, and how old they may be."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flowrl_mega.settings import PathText, Settings


def server_faults(servers: int | list[str], api_key_file: str | None) -> Iterator[str]:
    """What is wrong with where servers run, and with the file of their key."""
    if servers == []:
        yield "rollout.servers = []: give at least one URL, or how many servers to start"
    for url in servers if isinstance(servers, list) else []:
        if not url.startswith(("http://", "https://")):
            yield f"rollout.servers: {url!r} is no URL; write it as http://HOST:PORT"
    yield from key_faults(api_key_file, "rollout.api_key_file")


def key_faults(file: str | None, setting: str) -> Iterator[str]:
    if file is not None and not os.path.isfile(file):
        yield f"{setting} = {file!r}: no such file; give one that holds the key"


class SyncSettings(Settings):
    transfer: Literal["disk", "tensor", "distributed"] | None = Field(
        None,
        description="Path of the weights to the servers: a folder, shared memory on one host, or broadcast. `null` "
        "takes `tensor` with `rollout.colocated`, else `distributed`.",
    )
    bucket_mb: int = Field(256, ge=1, description="Weights gathered and sent at once, in MB.")
    dtype: Literal["bf16", "fp8"] | None = Field(
        None, description="Data type of the weights in transit; `null` sends them as they are."
    )
    checksum_every: int = Field(
        10,
        ge=0,
        description="Syncs between comparisons of the servers' weights with those sent, from the first on; 0 disables "
        "them.",
    )
    pause: Literal["retract", "in_place", "wait"] = Field(
        "retract",
        description="Treatment of answers under way: continue with the KV cache recomputed (`retract`) or kept "
        "(`in_place`), or finish before the sync (`wait`).",
    )
    folder: PathText | None = Field(
        None, description="Folder that all servers can read, for `transfer: disk`; `null` takes run_dir/weights."
    )
    timeout_s: float = Field(
        300.0,
        gt=0,
        description="Time limit of one sync in seconds; must be less than `parallel.timeout_s`, since the other ranks "
        "wait.",
    )

    def way(self, colocated: bool) -> Literal["tensor", "distributed", "disk"]:
        """`transfer`, or what null stands for."""
        return self.transfer or ("tensor" if colocated else "distributed")


class MismatchSettings(Settings):
    budget: float | None = Field(
        None,
        gt=0,
        description="Largest accepted mean |engine - trainer| log-prob difference, in nats per token; `null` sets no "
        "limit.",
    )
    action: Literal["warn", "stop"] = Field(
        "warn", description="Action when `budget` is exceeded: a warning, or the end of the run."
    )


class ReplaySettings(Settings):
    size: int = Field(ge=1, description="Groups kept for replay: the newest that were trained on.")
    share: float = Field(
        gt=0, lt=1, description="Share of a step's groups that are replayed, rounded down to whole groups."
    )


class RolloutSettings(Settings):
    engine: PathText = Field(
        "embedded",
        description="Engine that generates answers: `embedded`, `sglang`, or a class of your own as module:Class or "
        "path/to/file.py:Class.",
    )
    prompts_per_step: int = Field(16, ge=1, description="Prompts per step.")
    group_size: int = Field(8, ge=1, description="Answers per prompt (G).")
    max_tokens: int = Field(64, ge=1, description="Longest answer in tokens, including the end token.")
    temperature: float = Field(
        1.0, gt=0, description="Sampling temperature, also applied to the log-probs of policy and reference."
    )
    top_p: float = Field(1.0, gt=0, le=1, description="Probability mass of nucleus sampling; 1 disables it.")
    top_k: int = Field(0, ge=0, description="Most likely tokens to sample from; 0 disables the limit.")
    ignore_eos: bool = Field(
        False, description="Continue every answer to `max_tokens`, past end tokens (for benchmarks)."
    )
    allow_truncated_sampling: bool = Field(
        False,
        description="Allow training with `top_p` or `top_k`, whose truncated distribution is not the one that is "
        "scored.",
    )
    ahead: int = Field(
        0, ge=0, description="Later steps whose answers are begun, with the current weights, before this step trains."
    )
    max_staleness: int | None = Field(
        None,
        ge=0,
        description="Largest age of a token in steps; groups with an older one are dropped. `null` sets no limit.",
    )
    replay: ReplaySettings | None = Field(
        None, description="Replay of earlier steps' groups, as {size: .., share: ..}; `null` disables it."
    )
    partial_tokens: int | None = Field(
        None,
        ge=1,
        description="Most tokens that an answer gets in one round; a longer one continues in the next. `null` disables "
        "this.",
    )
    oversample: float = Field(
        1.0,
        ge=1,
        le=16,
        description="Prompts under way per step, as a multiple of `prompts_per_step`, so that few steps wait for long "
        "answers.",
    )
    drop_uniform: bool = Field(
        False, description="Drop and replace groups whose rewards are all equal (FlowRL uses such groups)."
    )
    mismatch: MismatchSettings = Field(
        MismatchSettings(), description="Limit on the difference between the engine's and the trainer's log-probs."
    )
    # what follows is read by engine sglang, and by one of yours as it likes
    servers: Annotated[int, Field(ge=1)] | list[str] = Field(
        1, description="Number of servers to start on every node, or list of URLs of running ones."
    )
    nodes: int = Field(
        0,
        ge=0,
        description="Nodes that run `flowrl-mega serve` for this run, with `servers` servers each; 0 starts servers on "
        "the trainer's nodes.",
    )
    python: PathText | None = Field(None, description="Python interpreter that has SGLang; `null` takes the trainer's.")
    server_args: dict[str, Any] = Field(
        default_factory=dict, description="SGLang's own flags, passed on to the servers."
    )
    colocated: bool = Field(
        False, description="Run servers on the trainer's GPUs and release their memory while it trains."
    )
    api_key_file: PathText | None = Field(None, description="File with the API key that the servers require.")
    concurrency: int = Field(1024, ge=1, description="Most prompts under way at one server.")
    request_timeout_s: float = Field(
        1800.0,
        gt=0,
        description="Time limit of a prompt's answers in seconds, retries included; exceeding it ends the job.",
    )
    hang_s: float = Field(60.0, gt=0, description="Silence of a busy server, in seconds, after which it is probed.")
    start_timeout_s: float = Field(900.0, gt=0, description="Time limit for servers to become ready, in seconds.")
    sync: SyncSettings = Field(SyncSettings(), description="Transfer of the weights to the servers.")

    @property
    def writes_ahead(self) -> bool:
        """Whether answers may be of weights older than the step's: begun ahead, gone on with, kept, or taken again."""
        parts = self.partial_tokens is not None or self.oversample > 1 or self.drop_uniform
        return self.ahead > 0 or parts or self.replay is not None

    @property
    def replayed(self) -> int:
        """Groups of a step that are taken again from earlier ones, once there are so many."""
        return min(int(self.replay.share * self.prompts_per_step), self.replay.size) if self.replay else 0

    @property
    def starts_servers(self) -> bool:
        """Whether the trainer's nodes start servers."""
        return isinstance(self.servers, int) and not self.nodes

    @field_validator("engine")
    @classmethod
    def _named(cls, engine: str) -> str:
        if engine not in ("embedded", "sglang") and ":" not in engine:
            raise ValueError("must be embedded, sglang, or a class of yours as module:Class or path/to/file.py:Class")
        return engine
