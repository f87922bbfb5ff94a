"""The processes of SGLang servers on this host: starts, watches, restarts and stops them."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.rollout.processes import ending, free_ports, is_free, kill, popen
from flowrl_mega.rollout.sglang.endpoints import is_up
from flowrl_mega.rollout.sglang.flags import command, on_gpu, placement, ranks_per_server

# Variables of the job's ranks, which would make a server take itself for one of them.
OF_THE_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
              "CUDA_DEVICE_MAX_CONNECTIONS")  # fmt: skip
PROGRESS_S = 15.0
GRACE_S = 5.0  # between SIGTERM, on which SGLang also waits for the answers under way, and SIGKILL


def never() -> bool:
    return False


class Fleet:
    """Servers that this process starts, watches and stops. `urls` never change. Methods may be called from several
    threads, but for one server by one thread at a time.

    `model`: folder with config and tokenizer files, and with weights unless `load_format` is dummy. `folder` gets the
    logs, server_0.log and so on. `dtype`: fp32 or bf16. `trainer_gpus`: how many GPUs of this host the trainer's ranks
    use. Servers die with this process, also when it is killed.
    """

    def __init__(
        self,
        settings: RolloutSettings,
        model: Path,
        folder: Path,
        dtype: str,
        trainer_gpus: int,
        load_format: str = "dummy",
        host: str = "127.0.0.1",
        ports: list[int] | None = None,
    ) -> None:
        assert isinstance(settings.servers, int), settings.servers
        self.settings, self.folder = settings, folder
        ports = ports or free_ports(settings.servers)
        for port in ports:
            if not is_free(host, port):  # whoever listens there would be taken for our server
                raise ConfigError(f"port {port} of {host}: cannot be listened on, or is in use; name another one")
        near = "127.0.0.1" if host == "0.0.0.0" else host
        self.urls = [f"http://{near}:{port}" for port in ports]
        gpus: list[int] | list[None] = placement(settings, trainer_gpus) or [None] * len(ports)
        self._commands = [
            command(settings, model, dtype, port, load_format, host, gpu) for port, gpu in zip(ports, gpus, strict=True)
        ]
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._log_starts: dict[str, int] = {}  # size of each log at the last start
        # The kernel counts the *thread* that started a process as its parent: it must live as long as this object.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="servers")
        self._lock = threading.Lock()
        self._closed = False

    def start(self, stop: Callable[[], bool] = never) -> None:
        """Start all servers and wait until they are ready, or until `stop()`. ConfigError if one does not start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for url in self.urls:
                self._start(url)
            self._wait(self.urls, stop)
        except BaseException:
            self.close()
            raise

    def is_alive(self, url: str) -> bool:
        """Whether the server's process exists; one that hangs is alive, too."""
        process = self._running.get(url)
        return process is not None and process.poll() is None

    def restart(self, url: str, stop: Callable[[], bool] = never) -> None:
        """Kill what is left of a server, start it again and wait until it is ready, with weights as at first."""
        process = self._running.get(url)
        if process:
            state = "runs but does not do its work" if process.poll() is None else f"ended ({ending(process)})"
            self._say(url, f"{state}; starting it again")
            with self.log(url).open("a") as log:
                print(f"=== {state}; starting it again", file=log)
            kill(process)
        self._start(url)
        self._wait([url], stop)

    def log(self, url: str) -> Path:
        """The server's log file."""
        return self.folder / f"server_{self.urls.index(url)}.log"

    def close(self) -> None:
        """Stop all servers and the processes that they started. May be called again."""
        with self._lock:
            self._closed = True
            running, self._running = list(self._running.values()), {}
        for process in running:
            if process.poll() is None:
                process.terminate()
        end = time.monotonic() + GRACE_S
        while time.monotonic() < end and any(process.poll() is None for process in running):
            time.sleep(0.02)
        for process in running:
            kill(process)
        self._starter.shutdown()

    def _start(self, url: str) -> None:
        at = self.urls.index(url)
        with self._lock, self.log(url).open("a") as log:
            if self._closed:
                raise ConfigError(f"{url}: not started again, the job is ending")
            print(f"=== {time.strftime('%F %T')} {shlex.join(self._commands[at])}", file=log, flush=True)
            self._log_starts[url] = log.tell()
            self._running[url] = self._starter.submit(popen, self._commands[at], self._environment(), log).result()

    def _environment(self) -> dict[str, str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_THE_JOB and not name.startswith("TORCHELASTIC_")
        }
        if not on_gpu(self.settings) and (ranks := ranks_per_server(self.settings)) > 1:
            # SGLang wants a NUMA node per rank unless it is told which cores each rank has.
            cores = sorted(os.sched_getaffinity(0))
            environment.setdefault(
                "SGLANG_CPU_OMP_THREADS_BIND", "|".join(f"{cores[r % len(cores)]}" for r in range(ranks))
            )
        return environment

    def _wait(self, urls: list[str], stop: Callable[[], bool]) -> None:
        """Wait until these servers answer, or until `stop()`. ConfigError after `rollout.start_timeout_s`."""
        began = time.monotonic()
        reported = began
        waiting = list(urls)
        while not stop():
            waiting = [url for url in waiting if not self._is_ready(url)]
            if not waiting:
                return
            now = time.monotonic()
            if now - began > self.settings.start_timeout_s:
                raise ConfigError(
                    f"rollout.start_timeout_s = {self.settings.start_timeout_s:g}: {', '.join(waiting)} not ready in "
                    f"this time; allow more, or see {self.log(waiting[0])}, which ends with\n{self._tail(waiting[0])}"
                )
            if now - reported >= PROGRESS_S:
                reported = now
                for url in waiting:
                    self._say(url, f"starting for {now - began:.0f} s: {self._tail(url, 1).strip()}")
            time.sleep(0.5)

    def _is_ready(self, url: str) -> bool:
        """Whether a server answers; ConfigError if its process has ended."""
        with self._lock:
            process = self._running.get(url)
        if process is None:
            raise ConfigError(f"{url}: ended before it was ready, as the job is ending")
        if process.poll() is not None:
            raise ConfigError(
                f"{url}: the server ended before it was ready ({ending(process)}); {self.log(url)} ends with\n"
                f"{self._tail(url)}\nIf a flag is the reason, see rollout.server_args"
            )
        return is_up(url)

    def _tail(self, url: str, lines: int = 15) -> str:
        """The last lines of the log since the last start, cut at 300 characters: SGLang writes one of 20,000."""
        with self.log(url).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_starts[url], size - 65536))
            text = log.read().decode(errors="replace")
        return "\n".join([line[:300] for line in text.splitlines() if line.strip()][-lines:]) or "(nothing yet)"

    def _say(self, url: str, message: str) -> None:
        print(f"server {url} {message}", file=sys.stderr, flush=True)


def supervise(fleet: Fleet, stop: Callable[[], bool]) -> None:
    """Restart servers that end, until `stop()`. ConfigError if one does not come back."""
    while not stop():
        for url in fleet.urls:
            if not fleet.is_alive(url):
                fleet.restart(url, stop)
        time.sleep(0.5)
