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
        None, description="weights to the servers; null: tensor (same host) where colocated, else distributed"
    )
    bucket_mb: int = Field(256, ge=1, description="weights gathered and sent at a time")
    dtype: Literal["bf16", "fp8"] | None = Field(None, description="sent as; null: as they are")
    checksum_every: int = Field(
        10, ge=0, description="what servers hold is compared at the first and every N-th sync; 0: never"
    )
    pause: Literal["retract", "in_place", "wait"] = Field(
        "retract",
        description="answers under way: go on with keys and values made anew, with the old ones, or are waited for",
    )
    folder: PathText | None = Field(
        None, description="transfer disk: where all servers can read; null: run_dir/weights"
    )
    timeout_s: float = Field(300.0, gt=0, description="for one sync; less than parallel.timeout_s: other ranks wait")

    def way(self, colocated: bool) -> Literal["tensor", "distributed", "disk"]:
        """`transfer`, or what null stands for."""
        return self.transfer or ("tensor" if colocated else "distributed")


class MismatchSettings(Settings):
    budget: float | None = Field(None, gt=0, description="mean |engine - trainer| log-prob a token, nats; null: none")
    action: Literal["warn", "stop"] = Field("warn", description="beyond the budget")


class ReplaySettings(Settings):
    size: int = Field(ge=1, description="groups kept: the newest that were trained on")
    share: float = Field(gt=0, lt=1, description="of a step's groups, rounded down, that are kept ones")


class RolloutSettings(Settings):
    engine: PathText = Field("embedded", description="embedded, sglang, or a class of yours as module:Class")
    prompts_per_step: int = Field(16, ge=1, description="prompts of a step, over all ranks")
    group_size: int = Field(8, ge=1, description="answers a prompt (G)")
    max_tokens: int = Field(64, ge=1, description="longest answer, the end token included")
    temperature: float = Field(1.0, gt=0, description="log-probs of policy and reference use it too")
    top_p: float = Field(1.0, gt=0, le=1, description="nucleus sampling; 1: off")
    top_k: int = Field(0, ge=0, description="0: off")
    ignore_eos: bool = Field(False, description="answers go on to max_tokens (for benchmarks)")
    allow_truncated_sampling: bool = Field(False, description="train although top_p or top_k cut the distribution")
    ahead: int = Field(0, ge=0, description="batches that are begun before this one trains, by the weights of then")
    max_staleness: int | None = Field(
        None, ge=0, description="updates of the weights since a token was written; groups beyond it are dropped"
    )
    replay: ReplaySettings | None = Field(
        None, description="train on earlier steps' groups again; {size: .., share: ..}"
    )
    partial_tokens: int | None = Field(None, ge=1, description="longer answers go on in the next step; null: never")
    oversample: float = Field(1.0, ge=1, le=16, description="prompts started a step, as a multiple of prompts_per_step")
    drop_uniform: bool = Field(False, description="leave out groups whose rewards are all equal (FlowRL uses them)")
    mismatch: MismatchSettings = MismatchSettings()
    # what follows is read by engine sglang, and by one of yours as it likes
    servers: Annotated[int, Field(ge=1)] | list[str] = Field(
        1, description="how many to start on every node, or the URLs of others'"
    )
    nodes: int = Field(
        0, ge=0, description="nodes that run `flowrl-mega serve` for this run, `servers` each; 0: the trainer's own do"
    )
    python: PathText | None = Field(None, description="interpreter that has sglang; null: this one")
    server_args: dict[str, Any] = Field(default_factory=dict, description="SGLang's own flags, passed on")
    colocated: bool = Field(False, description="servers on the trainer's GPUs, memory released while it trains")
    api_key_file: PathText | None = Field(None, description="file with the key that the servers ask for")
    concurrency: int = Field(1024, ge=1, description="prompts under way at a server")
    request_timeout_s: float = Field(1800.0, gt=0, description="a prompt without answer in this time ends the job")
    hang_s: float = Field(60.0, gt=0, description="a server silent for so long is asked whether it lives")
    start_timeout_s: float = Field(900.0, gt=0, description="for servers to be ready")
    sync: SyncSettings = SyncSettings()

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
