"""The engine on real SGLang servers: what they write, and what becomes of it when they die, hang, or are others."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import on_ranks
import psutil
import pytest
import torch
from record import FOLDER, REQUESTS, ask
from sglang_server import SMALL, server_python, start_server
from tiny_models import make
from transformers import AutoModelForCausalLM

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.generation import Sampling
from flowrl_mega.parallel.launch import reserve_port
from flowrl_mega.rollout.engine import Request, Rollout
from flowrl_mega.rollout.sglang.attached import check_attached
from flowrl_mega.rollout.sglang.engine import SglangEngine
from flowrl_mega.rollout.sglang.fleet import Fleet

pytestmark = [pytest.mark.integration, pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(600)]

PROMPTS = [[2 + place, 7, 3 * place + 1] for place in range(12)]
SAMPLING = Sampling(40, temperature=0.7, stop_ids=(1, 17, 40))
KEPT: dict[str, Any] = {}  # in a rank: what lives from one call to the next


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model"), intermediate_size=64)


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A server that others run, as it were: it starts with random weights."""
    fleet = start_server(tmp_path_factory.mktemp("servers"), model, load_format="dummy")
    yield fleet
    fleet.close()


def perturbed(path: Path, amount: float) -> Any:
    policy = on_ranks.build(path)
    with torch.no_grad():
        for place, parameter in enumerate(policy.gpt_parameters().values()):
            parameter.mul_(1 + amount * (1 + place % 5))
    return policy


def engine_of(path: Path, folder: Path, servers: Any, amount: float = 0.0, **rollout: Any) -> SglangEngine:
    """In a rank: an engine whose servers have the model, each parameter changed by its own factor, as version 5."""
    rollout = {
        "engine": "sglang", "servers": servers, "hang_s": 5.0, "python": server_python(), "server_args": SMALL,
        "start_timeout_s": 240, "request_timeout_s": 120, **rollout,
    }  # fmt: skip
    config = on_ranks.config_for(path, rollout=rollout, run_dir=str(folder))
    policy = perturbed(path, amount)
    files = {file.name: file.read_bytes() for file in path.iterdir() if file.suffix == ".json"}
    engine = SglangEngine(config, policy.layout, policy.arch, files, 0)
    engine.sync(policy, version=5)
    return engine


def generated(
    path: Path, folder: Path, servers: Any, requests: list[Request], sampling: Sampling, amount: float, **rollout: Any
) -> tuple[list[list[Rollout]], dict[str, float]]:
    engine = engine_of(path, folder, servers, amount, **rollout)
    try:
        return engine.finish(engine.start(requests, sampling, seed=3)), engine.metrics()
    finally:
        engine.close()


def reference_logp(path: Path, amount: float, prompt: list[int], response: list[int], temperature: float):
    """transformers' log-probs of a response under the perturbed weights, at the sampling temperature."""
    key = str((path, amount))
    if key not in KEPT:
        KEPT[key] = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        KEPT[key].load_state_dict(KEPT[key + "weights"], strict=False)
    with torch.no_grad():
        logits = KEPT[key](torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return (logits / temperature).log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


def weights_of(path: Path, amount: float) -> dict[str, torch.Tensor]:
    from flowrl_mega.model.weights import named_tensors

    return {name: tensor.clone() for name, tensor in named_tensors(perturbed(path, amount))}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_transformers(temperature, model, fleet, ranks1, tmp_path):
    """Of the very weights that were sent, at the temperature that they were drawn with: what training corrects for is
    then rounding, and nothing else."""
    amount, sampling = 0.02, Sampling(40, temperature, stop_ids=(1, 17, 40))
    requests = [Request(prompt, 3, 40) for prompt in PROMPTS]
    ((rollouts, metrics),) = ranks1.run(generated, model, tmp_path, fleet.urls, requests, sampling, amount)
    (KEPT[str((model, amount)) + "weights"],) = ranks1.run(weights_of, model, amount)
    flat = [(prompt, rollout) for prompt, of in zip(PROMPTS, rollouts, strict=True) for rollout in of]
    for prompt, rollout in flat:
        wanted = reference_logp(model, amount, prompt, rollout.response, temperature)
        assert (torch.tensor(rollout.logp) - wanted).abs().max() < 1e-4
        assert rollout.versions == [(5, len(rollout.response))]
        assert not set(rollout.response[:-1]) & {1, 17, 40}
        assert (rollout.finish_reason == "stop") == (rollout.response[-1] in (1, 17, 40))
    assert {rollout.finish_reason for _, rollout in flat} == {"stop", "length"}
    assert len({tuple(rollout.response) for _, rollout in flat}) > 30, "the answers of a group are drawn one by one"
    assert metrics["rollout/failed_requests"] == metrics["rollout/malformed"] == 0


def with_trouble(path: Path, folder: Path) -> tuple[list[list[Rollout]], list[dict[str, float]]]:
    """Two jobs on two servers of our own: in the first, one is killed, in the second, the other is stopped."""
    engine = engine_of(path, folder, 2, concurrency=2)
    rollouts, metrics = [], []
    try:
        assert engine.started and engine.dispatcher
        for url, number in zip(engine.started.urls, (signal.SIGKILL, signal.SIGSTOP), strict=True):
            job = engine.start([Request(prompt, 2, 100) for prompt in PROMPTS * 3], Sampling(100), seed=number)
            time.sleep(1.0)
            for process in listeners(url):
                os.kill(process.pid, number)
            rollouts += engine.finish(job)
            end = time.monotonic() + 180
            while any(server.state != "ready" for server in engine.dispatcher.health.servers):
                assert time.monotonic() < end, "it does not come back"
                engine.finish(engine.start([Request([2, 3], 1, 4)], SAMPLING, seed=1))
                time.sleep(0.1)
            rollouts += engine.finish(engine.start([Request(prompt, 2, 8) for prompt in PROMPTS], SAMPLING, seed=4))
            metrics.append(engine.metrics())
        return rollouts, metrics
    finally:
        engine.close()


def listeners(url: str) -> list[psutil.Process]:
    """The processes that listen at this URL."""
    port = int(url.rsplit(":", 1)[1])
    found = psutil.net_connections("tcp")
    pids = {c.pid for c in found if c.status == psutil.CONN_LISTEN and c.laddr.port == port and c.pid}
    return [psutil.Process(pid) for pid in pids]


def test_a_server_is_lost_in_the_middle_of_a_job(model, ranks1, tmp_path):
    """Killed, or there and silent: it is started again, gets the weights again, and all prompts are answered."""
    ((rollouts, metrics),) = ranks1.run(with_trouble, model, tmp_path, timeout=500)
    assert len(rollouts) == 8 * len(PROMPTS)
    assert all(len(of) == 2 for of in rollouts)
    assert {version for of in rollouts for rollout in of for version, _ in rollout.versions} == {5}
    for of_signal in metrics:
        assert of_signal["rollout/restarts"] == of_signal["rollout/servers_lost"] == 1
        assert of_signal["rollout/stale_answers"] == 0


def behind_its_back(path: Path, folder: Path, urls: list[str], disk: str) -> Any:
    """A job, then one after somebody has loaded other weights into the server."""
    engine = engine_of(path, folder, urls, amount=0.02)
    try:
        requests = [Request(prompt, 2, 20) for prompt in PROMPTS]
        first = engine.finish(engine.start(requests, Sampling(20, 0.0), seed=3))
        post(
            urls[0],
            "/update_weights_from_disk",
            {"model_path": disk, "load_format": "auto", "weight_version": "default"},
        )
        second = engine.finish(engine.start(requests, Sampling(20, 0.0), seed=3))
        return first, second, engine.metrics()
    finally:
        engine.close()


def post(url: str, path: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(url + path, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def test_old_weights_are_caught_by_their_version(model, fleet, ranks1, tmp_path):
    """As a server has them that its owner has restarted: not one of its answers is trained on."""
    ((first, second, metrics),) = ranks1.run(behind_its_back, model, tmp_path, fleet.urls, str(model))
    assert metrics["rollout/stale_answers"] >= 1
    assert {version for of in second for rollout in of for version, _ in rollout.versions} == {5}
    assert [r.response for of in second for r in of] == [r.response for of in first for r in of], "greedy, same weights"


@pytest.fixture
def router(fleet: Fleet, tmp_path: Path) -> Iterator[str]:
    """sglang-router in front of the server."""
    reserved = [reserve_port(), reserve_port()]
    port, metrics_port = (str(holder.getsockname()[1]) for holder in reserved)
    url = f"http://127.0.0.1:{port}"
    command = [server_python(), "-c", ROUTER, "--worker-urls", *fleet.urls, "--host", "127.0.0.1", "--port", port]
    with open(tmp_path / "router.log", "w") as log:
        process = subprocess.Popen(
            [*command, "--prometheus-port", metrics_port], stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        end = time.monotonic() + 120
        while True:
            assert process.poll() is None and time.monotonic() < end, (tmp_path / "router.log").read_text()[-3000:]
            try:
                with urllib.request.urlopen(url + "/workers", timeout=5) as answer:
                    if json.loads(answer.read())["workers"]:
                        break
            except OSError:
                pass
            time.sleep(0.3)
        yield url
    finally:
        process.kill()
        process.wait()
        for holder in reserved:
            holder.close()


# The router's Python imports sglang, which on a machine without GPU finds no operators of torchvision.
ROUTER = """
import sys, torch
library = torch.library.Library("torchvision", "DEF")
for name in ("nms", "qnms"):
    library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
from sglang_router.launch_router import launch_router, parse_router_args
launch_router(parse_router_args(sys.argv[1:]))
"""


def test_through_a_router(model, fleet, router, ranks1, tmp_path):
    """Prompts go to it, weights to what is behind it."""
    arch = read_architecture(model)
    config = on_ranks.config_for(model, rollout={"engine": "sglang", "servers": [router]})
    assert check_attached(config.rollout, arch, 128).endswith(f"through {router}")
    requests = [Request(prompt, 3, 40) for prompt in PROMPTS]
    ((rollouts, metrics),) = ranks1.run(generated, model, tmp_path, [router], requests, SAMPLING, 0.02)
    assert {version for of in rollouts for rollout in of for version, _ in rollout.versions} == {5}
    assert all(len(of) == 3 for of in rollouts)
    assert metrics["rollout/failed_requests"] == 0


def test_a_server_of_another_model_is_refused(model, fleet, tmp_path):
    """By its config where that can be read."""
    other = make("llama", tmp_path, hidden_size=64)
    config = on_ranks.config_for(model, rollout={"engine": "sglang", "servers": fleet.urls})
    assert "SGLang 0.5.23, context 128" in check_attached(config.rollout, read_architecture(model), 128)
    with pytest.raises(ConfigError, match="serves another model.*its hidden_size is 32, that of model.path is 64"):
        check_attached(config.rollout, read_architecture(other), 128)
    with pytest.raises(ConfigError, match="takes 128 tokens, but .* are 129"):
        check_attached(config.rollout, read_architecture(model), 129)


@pytest.mark.parametrize("name", REQUESTS)
def test_the_recordings_are_those_of_this_server(name, fleet):
    """What the fast tests' stand-in is compared with must be what SGLang answers today."""
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    assert ask(fleet.urls[0], REQUESTS[name]) == {"status": recorded["status"], "answer": recorded["answer"]}
