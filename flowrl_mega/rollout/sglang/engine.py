"""The engine behind SGLang servers: rank 0 talks to them, all ranks give weights and get answers."""

from __future__ import annotations

import resource
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from flowrl_mega.config import Config, ConfigError, RunError
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rollout.answers import broadcast_answers
from flowrl_mega.rollout.dispatch import Dispatcher, Job
from flowrl_mega.rollout.engine import AnswerCallback, Request, Rollout
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.attached import check_servers, connect, context_of, read_key
from flowrl_mega.rollout.sglang.endpoints import SglangServer
from flowrl_mega.rollout.sglang.fleet import Fleet
from flowrl_mega.rollout.sglang.quantize import with_quantization
from flowrl_mega.rollout.sglang.sync import WeightSync

ORDER_S = 5.0  # longest wait in one collective: ranks that wait for rank 0 hear from it at least this often


class SglangEngine:
    """`Engine` on servers that it starts (`rollout.servers` is a number) or that others run (URLs).

    `side_files`: config and tokenizer files of the model, by name. `trainer_gpus`: how many of this host's GPUs the
    trainer's ranks use. While a job is under way, `finish` gives the policy's current weights to servers that come
    back: the policy must not have changed since the last `sync`.
    """

    def __init__(
        self, config: Config, layout: Layout, arch: Architecture, side_files: dict[str, bytes], trainer_gpus: int
    ) -> None:
        self.config, self.settings, self.layout, self.arch = config, config.rollout, layout, arch
        self.policy: Policy | None = None
        self.version, self.syncs = -1, 0
        self.first = layout.rank == 0
        self.loop = LoopThread() if self.first else None
        self.fleet: Fleet | None = None
        self.dispatcher: Dispatcher | None = None
        run_dir = Path(config.run_dir)
        more = (layout, arch, side_files, run_dir / "weights", self.loop)
        self.weights = WeightSync(self.settings.sync, self.settings.colocated, *more)
        try:
            # A server takes a share of the memory that is free when it starts: all ranks must have loaded their models.
            dist.barrier()
            self.context = self._in_thread(lambda: self._start(run_dir / "servers", side_files, trainer_gpus))
        except BaseException:
            self.close()
            raise

    def _start(self, folder: Path, side_files: dict[str, bytes], trainer_gpus: int) -> int:
        """Rank 0: start servers, or connect to running ones; the longest sequence, in tokens, that all of them take."""
        assert self.loop
        _allow_connections(self.settings.concurrency)
        key = read_key(self.settings)
        urls = self.settings.servers
        if isinstance(urls, int):
            model = folder / "model"
            write_model(model, with_quantization(side_files) if self.settings.sync.dtype == "fp8" else side_files)
            dtype = "bf16" if self.settings.sync.dtype else self.config.model.dtype
            self.fleet = Fleet(self.settings, model, folder, dtype, trainer_gpus)
            self.fleet.start()
            urls, key = self.fleet.urls, self.settings.server_args.get("api_key", key)
        gateways = self.loop.call(connect(urls, key))
        if (
            not self.fleet
        ):  # ranks started by torchrun have not checked them yet; `start` checks the context per request
            self.loop.call(check_servers(gateways, self.arch, 0, key))
        self.dispatcher = Dispatcher(self.settings, gateways, self.arch.vocab, self.fleet)
        self.loop.call(self.dispatcher.open())
        return self.loop.call(context_of(gateways))

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        self.policy, self.version = policy, version
        every = self.settings.sync.checksum_every
        check = bool(every) and self.syncs % every == 0
        self.syncs += 1
        if self.settings.sync.pause == "wait":
            self._on_first(lambda d: d.set_hold(True))
            self._until(lambda d: d.is_idle(), heal=False)
        if self.settings.colocated:
            self._make_room()
        self._push(None, check)
        self._on_first(lambda d: d.set_hold(False))
        self._until(lambda d: d.has_server())
        return self.layout.broadcast_from_rank0(self.weights.metrics)

    def start(
        self, requests: list[Request], sampling: Sampling, seed: int, on_answer: AnswerCallback | None = None
    ) -> Job:
        assert self.policy is not None, "sync() comes first"
        for request in requests:
            check_request(request, self.arch.vocab, self.context)
        job = Job(requests, on_answer)
        self._on_first(lambda d: d.add(job, sampling, seed))
        return job

    def finish(self, job: Job) -> list[list[Rollout]]:
        self._until(lambda d: not job.left)
        return broadcast_answers([of or [] for of in job.answers], job.requests, self.first)

    def release(self) -> None:
        if self.settings.colocated:
            self._on_first(lambda d: d.health.release())
            dist.barrier()  # no rank takes memory that its GPU's server still has

    def _make_room(self) -> None:
        """Give what this rank's allocator keeps in reserve to the server on its GPU, which is about to take its memory
        back: without it a server runs out of memory, and is started again in vain. Collective."""
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        dist.barrier()

    def metrics(self) -> dict[str, float]:
        counts: dict[str, float] = {}
        if self.dispatcher:
            counts = {f"rollout/{name}": float(count) for name, count in self.dispatcher.taken_counts().items()}
        return self.layout.broadcast_from_rank0(counts)

    def close(self) -> None:
        """Stop the servers that were started here; others stay up without work. May be called again."""
        loop, fleet, dispatcher, self.loop, self.fleet, self.dispatcher = (
            self.loop, self.fleet, self.dispatcher, None, None, None,
        )  # fmt: skip
        try:
            if loop and dispatcher:
                self.weights.close()
                loop.call(dispatcher.close())
        finally:
            if fleet:
                fleet.close()
            if loop:
                loop.close()

    def _push(self, urls: list[str] | None, check: bool) -> None:
        """Give the policy's weights to the servers at these URLs (None: all that are up). Collective."""
        assert self.policy is not None
        clients: list[SglangServer] = []
        if self.first:
            assert self.loop and self.dispatcher
            clients = cast(list[SglangServer], self.loop.call(self.dispatcher.before_push(urls, self.version)))
        failures = self.weights.push(self.policy, clients, self.version, check)
        self._on_first(lambda d: d.health.after_push([client.url for client in clients], self.version, failures))

    def _until(self, done: Callable[[Dispatcher], bool], heal: bool = True) -> None:
        """Wait until `done` on rank 0, and meanwhile give weights to servers that need them (`heal`). Collective."""

        def order() -> tuple[str, list[str]]:
            assert self.loop and self.dispatcher
            dispatcher = self.dispatcher
            return self.loop.call(dispatcher.next(lambda: done(dispatcher), ORDER_S, heal))

        while True:
            what, urls = self._ordered(order)
            if what == "done":
                return
            if what == "push":
                self._push(urls, check=self.settings.sync.checksum_every > 0)

    def _in_thread(self, work: Callable[[], Any]) -> Any:
        """Run `work` on rank 0, however long it takes; its result on all ranks. Collective."""
        with ThreadPoolExecutor(1) as pool:
            future: Future[Any] | None = pool.submit(work) if self.first else None

            def order() -> tuple[str, Any]:
                assert future
                try:
                    return "done", future.result(ORDER_S)
                except TimeoutError:
                    return "wait", None

            try:
                while True:
                    what, result = self._ordered(order)
                    if what == "done":
                        return result
            except BaseException:
                if self.fleet:  # else the thread goes on waiting for its servers
                    self.fleet.close()
                raise

    def _ordered(self, order: Callable[[], tuple[str, Any]]) -> tuple[str, Any]:
        """Run `order` on rank 0; its result, ConfigError or RunError on all ranks. Collective."""
        what: tuple[str, Any] = ("", None)
        if self.first:
            try:
                what = order()
            except (ConfigError, RunError) as error:
                what = ("fault", error)
        what = self.layout.broadcast_from_rank0(what)
        if what[0] == "fault":
            raise what[1]
        return what

    def _on_first(self, ask: Callable[[Dispatcher], Any]) -> None:
        """On rank 0, run a coroutine of the dispatcher to its end."""
        if self.first:
            assert self.loop and self.dispatcher
            self.loop.call(ask(self.dispatcher))


def check_request(request: Request, vocab: int, context: int) -> None:
    """ConfigError for a request that a server refuses, or that kills it: too long, empty, or an unknown token id."""
    total = len(request.prompt) + request.max_tokens
    if not request.prompt:
        raise ConfigError("a prompt has no tokens: servers refuse it; leave it out of the data")
    if min(request.prompt) < 0 or max(request.prompt) >= vocab:
        wrong = next(token for token in request.prompt if not 0 <= token < vocab)
        raise ConfigError(
            f"a prompt holds token id {wrong}, outside the model's vocabulary of {vocab}; "
            "give model.path the tokenizer of the model"
        )
    if total > context:
        raise ConfigError(
            f"rollout.max_tokens = {request.max_tokens}: {total} with a prompt of {len(request.prompt)} tokens, but "
            f"the servers take {context}; lower rollout.max_tokens or data.max_prompt_tokens, or give the servers a "
            "longer context (rollout.server_args.context_length)"
        )


def write_model(folder: Path, files: dict[str, bytes]) -> None:
    """Write a model folder without weights, for servers that get them from us."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)


def _allow_connections(count: int) -> None:
    """Raise the limit of open files: each prompt under way needs a connection, and the default is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(most, 1 << 16)), hard))
