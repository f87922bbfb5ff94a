"""The real SGLang server as a process of ours: it starts, is what it says, and is brought back and down whatever
happens to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from sglang_server import SMALL, server_python, server_settings, start_server
from tiny_models import make

from flowrl_mega.config import ConfigError
from flowrl_mega.rollout.processes import family
from flowrl_mega.rollout.sglang.flags import check_servers
from flowrl_mega.rollout.sglang.fleet import Fleet

pytestmark = [pytest.mark.integration, pytest.mark.servers, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    started = start_server(tmp_path_factory.mktemp("servers"), model)
    yield started
    started.close()


def ask(url: str, path: str, **body: Any) -> Any:
    request = urllib.request.Request(
        url + path, json.dumps(body).encode() if body else None, {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.load(answer)


def processes(fleet: Fleet) -> list[psutil.Process]:
    found = family(fleet._running[fleet.urls[0]])
    assert len(found) >= 3, found  # the server, its scheduler, its detokenizer
    return found


def generate(fleet: Fleet) -> list[int]:
    body = {"input_ids": [1, 2, 3], "sampling_params": {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}}
    return ask(fleet.urls[0], "/generate", **body)["output_ids"]


def test_the_server_is_sglang_itself(fleet: Fleet):
    """Not a stand-in: who listens on the port is the process that we started, with the version that we pin."""
    url = fleet.urls[0]
    assert ask(url, "/server_info")["version"] == "0.5.23"
    assert check_servers(fleet.settings) == "1 server of SGLang 0.5.23, on CPU"
    port = int(url.rsplit(":", 1)[1])
    listening = [
        process
        for process in processes(fleet)
        for place in process.net_connections("tcp")
        if place.status == psutil.CONN_LISTEN and place.laddr.port == port
    ]
    assert [process.pid for process in listening] == [fleet._running[url].pid]
    assert listening[0].cmdline()[0] == server_python()
    names = {process.name().split("_")[0] for process in processes(fleet)}
    assert {"sglang::scheduler", "sglang::detokenizer"} <= {process.cmdline()[0] for process in processes(fleet)}, names
    assert len(generate(fleet)) == 4


@pytest.mark.parametrize("fault", ["server killed", "scheduler killed", "stopped"])
def test_it_comes_back_at_the_same_address(fleet: Fleet, fault: str):
    """After death, also of the part that computes, and after a hang; nothing of the first life is left."""
    url, before = fleet.urls[0], processes(fleet)
    expected = generate(fleet)
    if fault == "stopped":
        for process in before:
            process.suspend()
        assert fleet.is_alive(url)
    else:
        who = before if fault == "server killed" else [p for p in before if "scheduler" in p.cmdline()[0]]
        who[0].kill()
        for _ in range(600):
            if not fleet.is_alive(url):
                break
            psutil.wait_procs(before[1:], timeout=0.1)
        assert not fleet.is_alive(url)
    fleet.restart(url)
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in before)
    assert generate(fleet) == expected


def test_nothing_is_left_after_close(model: Path, tmp_path: Path):
    """Two ranks (tensor-parallel) and dummy weights, as a job starts them: the weights are not the model's."""
    fleet = start_server(tmp_path, model, load_format="dummy", tp_size=2)
    try:
        assert ask(fleet.urls[0], "/server_info")["tp_size"] == 2
        assert ask(fleet.urls[0], "/model_info")["weight_version"] == "default"
        parts = processes(fleet)
    finally:
        fleet.close()
    assert not any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in parts)
    with pytest.raises(urllib.error.URLError):
        ask(fleet.urls[0], "/model_info")


def test_a_flag_that_sglang_does_not_know_is_told(model: Path, tmp_path: Path):
    """SGLang reads its flags minutes before it could serve: its own words must reach the user."""
    fleet = Fleet(server_settings(no_such_flag=1), model, tmp_path, "fp32", 0)
    with pytest.raises(ConfigError) as error:
        fleet.start()
    assert "no-such-flag" in str(error.value) and "rollout.server_args" in str(error.value)


def test_it_dies_with_a_killed_trainer(model: Path, tmp_path: Path):
    """kill -9 of the trainer ends the server and all its parts: the kernel tells each that its parent is gone."""
    program = f"""
import sys, time
from pathlib import Path
from flowrl_mega.config import RolloutSettings
from flowrl_mega.rollout.processes import family
from flowrl_mega.rollout.sglang.fleet import Fleet
settings = RolloutSettings(python={server_python()!r}, server_args={SMALL!r}, start_timeout_s=600)
fleet = Fleet(settings, Path({str(model)!r}), Path({str(tmp_path)!r}), "fp32", 0)
fleet.start()
print(*(process.pid for process in family(fleet._running[fleet.urls[0]])), flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as trainer:
        try:
            parts = [psutil.Process(int(pid)) for pid in trainer.stdout.readline().split()]
        finally:
            trainer.send_signal(signal.SIGKILL)
    assert len(parts) >= 3
    _, alive = psutil.wait_procs(parts, timeout=60)
    alive = [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]
    for process in alive:
        os.kill(process.pid, signal.SIGKILL)
    assert not alive


def test_the_environment_lacks_only_what_a_gpu_needs():
    """It is installed with --no-deps: what a package needs and nobody lists would be missing at run time, perhaps only
    in one request of many."""
    program = """
import importlib.metadata as m, json
from packaging.requirements import Requirement
missing = []
for found in m.distributions():
    if found.name in ("sglang", "torch"):
        continue  # SGLang asks for its CUDA kernels; torch's CPU build for nothing that is not there
    for text in found.requires or []:
        needed = Requirement(text)
        if needed.marker is None or needed.marker.evaluate({"extra": ""}):
            try:
                met = needed.specifier.contains(m.version(needed.name), prereleases=True)
            except m.PackageNotFoundError:
                met = False
            if not met:
                missing.append(f"{found.name} needs {text}")
print(json.dumps(missing))
"""
    output = subprocess.run([server_python(), "-c", program], capture_output=True, text=True, check=True).stdout
    assert json.loads(output) == []
