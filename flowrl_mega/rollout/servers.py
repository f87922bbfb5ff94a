"""SGLang servers on this host: how they are started, known to live, restarted, and brought down with us."""

from __future__ import annotations

import http.client
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.rollout.processes import ending, free_ports, is_free, kill, popen

TESTED_WITH = "0.5.23"
CPU_LAUNCHER = Path(__file__).parent / "cpu_server" / "launch.py"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Flags that say what only we can know, and those of a server that is spread over hosts.
RESERVED = ("host", "port", "model", "model-path", "nnodes", "node-rank")
# Of the job that starts a server: they would make it take itself for one of the job's ranks.
OF_THE_JOB = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")
PROGRESS_S = 15.0
GRACE_S = 5.0  # between SIGTERM, at which SGLang also waits for the answers under way, and SIGKILL


def never() -> bool:
    return False


class Fleet:
    """Servers that this process starts, watches and ends. `urls` are fixed from the beginning; calls may come from
    several threads, one a server at a time.

    `model`: folder with config and tokenizer, and weights where `load_format` is not dummy. `folder` gets the logs,
    server_0.log and so on. `dtype`: fp32 or bf16. `trainer_gpus`: how many GPUs of this host the trainer's ranks use.
    A server dies with this process, also when it is killed.
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
        first_port: int | None = None,
    ) -> None:
        assert isinstance(settings.servers, int), settings.servers
        self.settings, self.folder = settings, folder
        ports = list(range(first_port, first_port + settings.servers)) if first_port else free_ports(settings.servers)
        for port in ports:
            if not is_free(host, port):  # the answers of who is there would pass for our server's
                raise ConfigError(f"port {port} of {host}: cannot be listened on, or is in use; name another one")
        near = "127.0.0.1" if host == "0.0.0.0" else host
        self.urls = [f"http://{near}:{port}" for port in ports]
        self._commands = [command(settings, model, dtype, port, load_format, host) for port in ports]
        self._gpus = placement(settings, trainer_gpus)
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._log_starts: dict[str, int] = {}  # bytes of the log that are from before the last start
        # The kernel counts the *thread* that started a process as its parent: it has to live as long as this object.
        self._starter = ThreadPoolExecutor(1, thread_name_prefix="servers")
        self._lock = threading.Lock()
        self._closed = False

    def start(self, stop: Callable[[], bool] = never) -> None:
        """Start all and wait until every one is ready, or until `stop()`; ConfigError for one that does not start."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            for url in self.urls:
                self._start(url)
            self._wait(self.urls, stop)
        except BaseException:
            self.close()
            raise

    def is_alive(self, url: str) -> bool:
        """Whether its process is there; a server that hangs is alive too."""
        process = self._running.get(url)
        return process is not None and process.poll() is None

    def restart(self, url: str, stop: Callable[[], bool] = never) -> None:
        """Kill what is left of a server and start it again; returns when it is ready (its weights: as at the start)."""
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
        return self.folder / f"server_{self.urls.index(url)}.log"

    def close(self) -> None:
        """End all servers and the processes that they started. May be called again."""
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
            self._running[url] = self._starter.submit(popen, self._commands[at], self._environment(at), log).result()

    def _environment(self, at: int) -> dict[str, str]:
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in OF_THE_JOB and not name.startswith("TORCHELASTIC_")
        }
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(self._gpus[at])
        elif (ranks := _ranks(self.settings)) > 1:
            # SGLang asks for a NUMA node a rank unless it is told which cores each one has.
            cores = sorted(os.sched_getaffinity(0))
            environment.setdefault(
                "SGLANG_CPU_OMP_THREADS_BIND", "|".join(f"{cores[r % len(cores)]}" for r in range(ranks))
            )
        return environment

    def _wait(self, urls: list[str], stop: Callable[[], bool]) -> None:
        """Until each answers what model it has."""
        began = time.monotonic()
        told = began
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
            if now - told >= PROGRESS_S:
                told = now
                for url in waiting:
                    self._say(url, f"starting for {now - began:.0f} s: {self._tail(url, 1).strip()}")
            time.sleep(0.5)

    def _is_ready(self, url: str) -> bool:
        """Whether it answers; ConfigError when it has ended."""
        with self._lock:
            process = self._running.get(url)
        if process is None:
            raise ConfigError(f"{url}: ended before it was ready, as the job is ending")
        if process.poll() is not None:
            raise ConfigError(
                f"{url}: the server ended before it was ready ({ending(process)}); {self.log(url)} ends with\n"
                f"{self._tail(url)}\nIf a flag is the reason, see rollout.server_args"
            )
        return answers(url)

    def _tail(self, url: str, lines: int = 15) -> str:
        """The last lines that the server wrote since its last start; SGLang has one of 20,000 characters."""
        with self.log(url).open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_starts[url], size - 65536))
            text = log.read().decode(errors="replace")
        return "\n".join([line[:300] for line in text.splitlines() if line.strip()][-lines:]) or "(nothing yet)"

    def _say(self, url: str, message: str) -> None:
        print(f"server {url} {message}", file=sys.stderr, flush=True)


def answers(url: str) -> bool:
    """Whether a server is up, as far as one question of at most 5 s tells; it may ask for a key."""
    place = urlsplit(url)
    connection = http.client.HTTPConnection(place.hostname or "", place.port, timeout=5)
    try:
        connection.request("GET", "/model_info")
        return connection.getresponse().status in (200, 401)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()


def command(
    settings: RolloutSettings, model: Path, dtype: str, port: int, load_format: str, host: str = "127.0.0.1"
) -> list[str]:
    """The server's command line; rollout.server_args come last and win, but for what is RESERVED."""
    flags: dict[str, Any] = {
        "model-path": str(Path(model).resolve()),
        "host": host,
        "port": port,
        "dtype": DTYPES[dtype],
        "load-format": load_format,
        "log-level-http": "warning",  # a line for each request otherwise
    }
    on_cpu = not on_gpu(settings)
    if on_cpu:
        # An idle scheduler would otherwise spin on a core that the trainer wants.
        flags |= {"device": "cpu", "attention-backend": "torch_native", "sleep-on-idle": True}
    elif settings.colocated:
        flags["enable-memory-saver"] = True
    flags |= _named(settings.server_args)
    program = [str(CPU_LAUNCHER)] if on_cpu else ["-m", "sglang.launch_server"]
    return [settings.python or sys.executable, *program, *_written(flags)]


def _named(server_args: dict[str, Any]) -> dict[str, Any]:
    """With names as on the command line, so that enable_x and enable-x are one."""
    return {name.lstrip("-").replace("_", "-"): value for name, value in server_args.items()}


def _written(flags: dict[str, Any]) -> list[str]:
    """True is the flag alone, False and None are left out, a list is several values, a mapping is JSON."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [json.dumps(part) if isinstance(part, dict) else str(part) for part in values]
    return words


def on_gpu(settings: RolloutSettings) -> bool:
    return settings.server_args.get("device", "cuda") == "cuda" and torch.cuda.is_available()


def _ranks(settings: RolloutSettings) -> int:
    """The processes with a GPU each that one server is made of."""
    flags = _named(settings.server_args)
    size = 1
    for names in (("tp-size", "tp", "tensor-parallel-size"), ("pp-size", "pp", "pipeline-parallel-size")):
        size *= next((int(flags[name]) for name in names if name in flags), 1)
    if not flags.get("enable-dp-attention"):  # there the data-parallel ranks are the tensor-parallel ones
        size *= next((int(flags[name]) for name in ("dp-size", "dp", "data-parallel-size") if name in flags), 1)
    return size


def placement(settings: RolloutSettings, trainer_gpus: int) -> list[list[str]]:
    """For each server its GPUs, as CUDA_VISIBLE_DEVICES names them; none at all on CPU. ConfigError: too few."""
    assert isinstance(settings.servers, int)
    if not on_gpu(settings):
        return []
    count = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
    gpus = visible[:count] if visible != [""] else [str(gpu) for gpu in range(count)]
    size, first = _ranks(settings), 0 if settings.colocated else trainer_gpus
    needed = first + settings.servers * size
    if needed > count:
        others = "" if settings.colocated else f" beside the trainer's {trainer_gpus}"
        raise ConfigError(
            f"rollout.servers = {settings.servers}: {settings.servers * size} GPUs ({size} a server){others}, but this "
            f"host has {count}; take fewer servers, a smaller rollout.server_args.tp_size, or rollout.colocated=true"
        )
    return [gpus[at : at + size] for at in range(first, needed, size)]


def check_servers(settings: RolloutSettings, trainer_gpus: int = 0) -> str:
    """Words about the servers that would be started; ConfigError for what would keep them from it."""
    assert isinstance(settings.servers, int)
    for given, name in zip(settings.server_args, _named(settings.server_args), strict=True):
        if name in RESERVED:
            raise ConfigError(
                f"rollout.server_args.{given} = {settings.server_args[given]!r}: set for each server that we start; "
                "leave it out, or start the servers yourself and give their URLs as rollout.servers"
            )
    placement(settings, trainer_gpus)
    version = sglang_version(settings.python or sys.executable)
    tested = "" if version == TESTED_WITH else f" (tested with {TESTED_WITH})"
    where = f"{_ranks(settings)} GPUs each" if on_gpu(settings) else "on CPU"
    many = "1 server" if settings.servers == 1 else f"{settings.servers} servers"
    return f"{many} of SGLang {version}{tested}, {where}"


def sglang_version(python: str) -> str:
    """The version that an interpreter has, from its metadata: to import sglang takes 10 s and more."""
    show = "import importlib.metadata as m; print(m.version('sglang'))"
    fix = "`make setup-sglang` prints the path of one that has it"
    try:
        result = subprocess.run([python, "-c", show], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.python = {python!r}: cannot be run ({error}); {fix}") from None
    if result.returncode:
        raise ConfigError(f"rollout.python = {python!r}: this interpreter has no sglang; {fix}")
    return result.stdout.strip()


def supervise(fleet: Fleet, stop: Callable[[], bool]) -> None:
    """Start again what ends, until `stop()`; ConfigError when a server does not come back."""
    while not stop():
        for url in fleet.urls:
            if not fleet.is_alive(url):
                fleet.restart(url, stop)
        time.sleep(0.5)
