"""Answers of SGLang's servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowrl_mega.benchmark.writer import Done, Stop, Work, answer_of, dtype_of, sampling_of, seed_of
from flowrl_mega.config_eval import EvalConfig
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.rollout.dispatch import Dispatcher, Job
from flowrl_mega.rollout.engine import Request
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.attached import check_servers, connect, context_of, read_key
from flowrl_mega.rollout.sglang.engine import ORDER_S, allow_connections, check_request
from flowrl_mega.rollout.sglang.fleet import Fleet


class ServersWriter:
    """SGLang servers, started here with the model's own weights or found at their URLs. On one rank."""

    def __init__(
        self, config: EvalConfig, arch: Architecture, tokenizer: Any, ends: tuple[int, ...], model: Path | None
    ) -> None:
        """`model`: a Hugging Face folder, for servers that are started here."""
        self.arch, self.tokenizer, self.seed = arch, tokenizer, config.seed
        self.sampling, settings = sampling_of(config, ends), config.rollout.of_servers()
        self.loop, self.fleet = LoopThread(), None
        self.dispatcher: Dispatcher | None = None
        try:
            key, urls = read_key(settings), settings.servers
            if isinstance(urls, int):
                assert model is not None
                folder = Path(config.run_dir) / "servers"
                self.fleet = Fleet(settings, model, folder, dtype_of(config), 0, load_format="auto")
                self.fleet.start()
                key, urls = settings.server_args.get("api_key", key), self.fleet.urls
            allow_connections(settings.concurrency)
            gateways = self.loop.call(connect(urls, key))
            self.dispatcher = Dispatcher(settings, gateways, arch.vocab, self.fleet, any_weights=True)
            if not self.fleet:  # `write` checks the context per request
                self.loop.call(check_servers(gateways, arch, 0, key))
            self.context = self.loop.call(context_of(gateways))
            self.loop.call(self.dispatcher.open())
            self._take(None)
        except BaseException:
            self.close()
            raise

    def write(self, work: Work, done: Done, stop: Stop) -> bool:
        dispatcher, places = self.dispatcher, work.places
        assert dispatcher
        requests = [Request(work.prompts[place.problem], 1, self.sampling.max_tokens) for place in places]
        for request in requests:
            check_request(request, self.arch.vocab, self.context)
        seeds = [[seed_of(self.seed, *place) >> 1] for place in places]
        job = Job(requests, lambda i, _, rollout: done(places[i], answer_of(rollout, self.tokenizer, self.sampling)))
        self.loop.call(dispatcher.add(job, self.sampling, seeds))
        while not stop():
            what, urls = self.loop.call(dispatcher.next(lambda: not job.left, ORDER_S))
            if what == "done":
                return True
            if what == "push":
                self._take(urls)
        return False

    def close(self) -> None:
        """May be called again."""
        dispatcher, self.dispatcher = self.dispatcher, None
        if dispatcher:
            self.loop.call(dispatcher.close())
        if self.fleet:
            self.fleet.close()
        self.loop.close()

    def _take(self, urls: list[str] | None) -> None:
        """Send prompts to these servers (None: all): they have their weights from their model's folder."""
        assert self.dispatcher
        chosen = self.loop.call(self.dispatcher.before_push(urls, 0))
        self.loop.call(self.dispatcher.health.after_push([client.url for client in chosen], 0, {}))
