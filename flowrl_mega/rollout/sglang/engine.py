"""The engine behind SGLang servers: rank 0 sends them prompts, all ranks give weights and get answers."""

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
from flowrl_mega.parallel.layout import Layout, is_first_on_host
from flowrl_mega.rollout.answers import broadcast_answers
from flowrl_mega.rollout.dispatch import Dispatcher, Job
from flowrl_mega.rollout.engine import AnswerCallback, Request, Rollout
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang import announced
from flowrl_mega.rollout.sglang.attached import check_servers, connect, context_of, read_key
from flowrl_mega.rollout.sglang.endpoints import SglangServer
from flowrl_mega.rollout.sglang.started import StartedServers
from flowrl_mega.rollout.sglang.sync import WeightSync

ORDER_S = 5.0  # longest wait in one collective: ranks that wait for rank 0 hear from it at least this often


class SglangEngine:
    """`Engine` on servers that it starts on every node (`rollout.servers` is a number) or that others run (URLs).

    Rank 0 gives them their weights; where they are started and take them by memory, each node's first rank those of its
    node. `side_files`: config and tokenizer files of the model, by name. `trainer_gpus`: how many of this host's GPUs
    the trainer's ranks use. While a job is under way, `finish` gives the policy's current weights to servers that come
    back: the policy must not have changed since the last `sync`.
    """

    def __init__(
        self, config: Config, layout: Layout, arch: Architecture, side_files: dict[str, bytes], trainer_gpus: int
    ) -> None:
        self.config, self.settings, self.layout, self.arch = config, config.rollout, layout, arch
        self.policy: Policy | None = None
        self.version, self.syncs = -1, 0
        self.first = layout.rank == 0
        self.started: StartedServers | None = None
        self.dispatcher: Dispatcher | None = None
        self.own: dict[str, SglangServer] = {}  # servers of this node, where its first rank gives them their weights
        by_nodes = self.settings.starts_servers and self.settings.sync.way(self.settings.colocated) != "disk"
        self.loop = LoopThread() if self.first or (by_nodes and is_first_on_host()) else None
        more = (layout, arch, side_files, Path(config.run_dir) / "weights", self.loop)
        self.weights = WeightSync(self.settings.sync, self.settings.colocated, *more)
        try:
            # A server takes a share of the memory that is free when it starts: all ranks must have loaded their models.
            dist.barrier()
            if self.settings.starts_servers:
                self.started = StartedServers(config, layout, side_files, trainer_gpus)
            fleet = self.started and self.started.fleet
            self._in_threads(fleet.start if fleet else None)
            if fleet and by_nodes:
                self.own = {url: SglangServer(url, self._key()) for url in fleet.urls}
            self.context = self._in_threads(self._connect if self.first else None)[0]
        except BaseException:
            self.close()
            raise

    def _key(self) -> str | None:
        key = read_key(self.settings)
        return self.settings.server_args.get("api_key", key) if self.started else key

    def _connect(self) -> int:
        """Rank 0: connect to all servers; the longest sequence, in tokens, that all of them take."""
        assert self.loop
        allow_connections(self.settings.concurrency)
        urls = self.started.urls if self.started else self.settings.servers
        if isinstance(urls, int):
            urls = announced.find(self.settings, Path(self.config.run_dir))
        gateways = self.loop.call(connect(urls, self._key()))
        if not self.started:  # nobody may have checked them yet; `start` checks the context per request
            self.loop.call(check_servers(gateways, self.arch, 0, self._key()))
        restarter = self.started.restarter() if self.started else None
        self.dispatcher = Dispatcher(self.settings, gateways, self.arch.vocab, restarter)
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
        loop, dispatcher, own = self.loop, self.dispatcher, self.own
        self.loop, self.dispatcher, self.own = None, None, {}
        try:
            if loop and (dispatcher or own):
                self.weights.close()
            if loop and dispatcher:
                loop.call(dispatcher.close())
            for client in own.values():
                assert loop
                loop.call(client.close())
        finally:
            if self.started:
                self.started.close()
            if loop:
                loop.close()

    def _push(self, urls: list[str] | None, check: bool) -> None:
        """Give the policy's weights to the servers at these URLs (None: all that are up). Collective."""
        assert self.policy is not None
        clients: list[SglangServer] = []
        if self.first:
            assert self.loop and self.dispatcher
            clients = cast(list[SglangServer], self.loop.call(self.dispatcher.before_push(urls, self.version)))
        chosen = self.layout.broadcast_from_rank0([client.url for client in clients])
        if self.own:
            clients = [client for url, client in self.own.items() if url in chosen]
        failed = self.layout.gather_objects(self.weights.push(self.policy, clients, self.version, check))
        failures = {url: why for of_rank in failed for url, why in of_rank.items()}
        self._on_first(lambda d: d.health.after_push(chosen, self.version, failures))

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

    def _in_threads(self, work: Callable[[], Any] | None) -> list[Any]:
        """Run `work` on the ranks that have any, however long it takes; each rank's result, on all. ConfigError and
        RunError of one are raised on all. Collective."""
        with ThreadPoolExecutor(1) as pool:
            future = pool.submit(work) if work else None
            try:
                while True:
                    found = self.layout.gather_objects(_result(future))
                    for what, result in found:
                        if what == "fault":
                            raise result
                    if all(what == "done" for what, _ in found):
                        return [result for _, result in found]
            except BaseException:
                if self.started:  # else the thread goes on waiting for its servers
                    self.started.close()
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


def _result(future: Future[Any] | None) -> tuple[str, Any]:
    """What has become of a thread's work, after ORDER_S at the latest: "done", "wait" or "fault"."""
    try:
        return "done", future.result(ORDER_S) if future else None
    except TimeoutError:
        return "wait", None
    except (ConfigError, RunError) as error:
        return "fault", error


def allow_connections(count: int) -> None:
    """Raise the limit of open files: each prompt under way needs a connection, and the default is often 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = hard if hard != resource.RLIM_INFINITY else 1 << 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(most, 1 << 16)), hard))
