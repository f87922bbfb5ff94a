"""Weights to a real SGLang server: what it then computes, against transformers, and what it says that it holds."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from sglang_server import start_server
from sync_ranks import push
from tiny_models import make
from transformers import AutoModelForCausalLM

from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.names import hf_shapes
from flowrl_mega.rollout.sglang.checksums import Expected
from flowrl_mega.rollout.sglang.fleet import Fleet

pytestmark = [pytest.mark.integration, pytest.mark.servers, pytest.mark.ranks, pytest.mark.timeout(900)]
# Three buckets of 1 MiB. The server pads vocabulary and feed-forward size, Megatron at tp = 2 the vocabulary.
SIZE = {"hidden_size": 128, "intermediate_size": 240, "num_hidden_layers": 4}
TOKENS = [(7 * place + place**2) % 101 for place in range(40)]
TRANSFERS = ["disk", "tensor", "distributed"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("model"), **SIZE)


@pytest.fixture(scope="module")
def fleet(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    """A server that starts with random weights: what it knows, it was given."""
    fleet = start_server(tmp_path_factory.mktemp("servers"), model, load_format="dummy")
    yield fleet
    fleet.close()


def ask(url: str, path: str, body: dict[str, Any] | None = None) -> Any:
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(url + path, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=200) as answer:
        return json.loads(answer.read())


def pushed(ranks: RankPool, *args: Any, **kwargs: Any) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """What failed and what was sent. Checksums are compared unless `check` is false."""
    failures, weights, _ = ranks.run(push, *args, **{"check": True, **kwargs})[0]
    return failures, weights


def server_logp(url: str, tokens: list[int]) -> torch.Tensor:
    """The server's log-probs of all tokens but the first."""
    sampling = {"max_new_tokens": 1, "temperature": 1.0}
    body = {"input_ids": tokens, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    found = ask(url, "/generate", body)["meta_info"]["input_token_logprobs"]
    return torch.tensor([logp for logp, *_ in found[1:]])


def reference_logp(model: Path, weights: dict[str, torch.Tensor], tokens: list[int]) -> torch.Tensor:
    """transformers', in single precision."""
    reference = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    reference.load_state_dict({"lm_head.weight": weights["model.embed_tokens.weight"], **weights})  # where it is tied
    with torch.no_grad():
        logp = reference(torch.tensor([tokens])).logits[0].log_softmax(-1)
    return logp[:-1].gather(1, torch.tensor(tokens)[1:, None])[:, 0]


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_the_server_computes_with_the_policys_weights(transfer, tp, model, fleet, ranks1, ranks2, tmp_path):
    """Whichever way they go, and from however many shards; every tensor is compared on the way."""
    (url,), version, amount = fleet.urls, 10 * TRANSFERS.index(transfer) + tp, 0.01 * tp
    before = server_logp(url, TOKENS)
    failures, weights = pushed(
        ranks1 if tp == 1 else ranks2, model, [url], version, tmp_path, amount, tp, transfer=transfer
    )
    assert failures == {}
    assert ask(url, "/model_info")["weight_version"] == str(version)
    found, wanted = server_logp(url, TOKENS), reference_logp(model, weights, TOKENS)
    assert (found - wanted).abs().max() < 1e-4 < (found - before).abs().max()


def difference(url: str, model: Path, weights: dict[str, torch.Tensor]) -> str:
    arch = read_architecture(model)
    expected = Expected(arch, 1, torch.float32, cuda=False)
    expected.add([(name, weights[name]) for name in hf_shapes(arch)])
    return expected.difference(ask(url, "/weights_checker", {"action": "checksum"})["ranks"])


def test_one_changed_element_is_seen(model, fleet, ranks1, tmp_path):
    """On the server's side, by a load that changes no version."""
    (url,) = fleet.urls
    failures, weights = pushed(ranks1, model, [url], 50, tmp_path, 0.01, transfer="disk", keep=True)
    assert failures == {} and difference(url, model, weights) == ""
    name = "model.layers.2.self_attn.v_proj.weight"
    (file,) = [file for file in tmp_path.glob("version_50/*.safetensors") if name.encode() in file.read_bytes()[:10000]]
    change(file, name)
    ask(url, "/update_weights_from_disk", {"model_path": str(file.parent), "load_format": "auto"})
    assert ask(url, "/model_info")["weight_version"] == "50"
    assert "values in model.layers.2.self_attn.qkv_proj.weight, 1 of" in difference(url, model, weights)


def change(file: Path, name: str) -> None:
    """One element, in the last place of its mantissa."""
    from safetensors.torch import load_file, save_file

    tensors = {key: tensor.clone() for key, tensor in load_file(file).items()}
    tensors[name].view(torch.int32)[5, 7] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("pause", ["retract", "in_place"])
def test_an_answer_goes_on_with_the_new_weights(pause, model, fleet, ranks1, tmp_path):
    """Its spans say which tokens are of which version. After `retract` all that it goes on from is made anew: the
    log-probs are those of the new weights alone; `in_place` goes on from the old keys and values."""
    (url,), answers = fleet.urls, []
    given = dict(transfer="tensor", pause=pause, keep=True)
    old = 60 if pause == "retract" else 70
    assert pushed(ranks1, model, [url], old, tmp_path, 0.01, **given)[0] == {}
    sampling = {"max_new_tokens": 80, "temperature": 1.0, "ignore_eos": True}
    body = {"input_ids": TOKENS, "sampling_params": sampling, "return_logprob": True, "stream": False}
    ask(url, "/slow_down", {"forward_sleep_time": 0.05})
    try:
        thread = threading.Thread(target=lambda: answers.append(ask(url, "/generate", body)))
        thread.start()
        time.sleep(1.0)
        failures, weights = pushed(ranks1, model, [url], old + 1, tmp_path, 0.03, **given)
        thread.join(100)
    finally:
        ask(url, "/slow_down", {"forward_sleep_time": None})
    assert failures == {}
    meta, tokens = answers[0]["meta_info"], answers[0]["output_ids"]
    spans = [(span["version"], span["end"] - span["start"]) for span in meta["weight_versions"]]
    assert [version for version, _ in spans] == [str(old), str(old + 1)]
    assert sum(count for _, count in spans) == len(tokens) == 80 and all(count for _, count in spans)
    found = torch.tensor([logp for logp, *_ in meta["output_token_logprobs"]])[spans[0][1] :]
    wanted = reference_logp(model, weights, TOKENS + tokens)[len(TOKENS) - 1 + spans[0][1] :]
    off = (found - wanted).abs()
    assert off.max() < 1e-4 if pause == "retract" else off.max() > 1e-3


def test_a_server_that_started_anew_is_seen_and_served(model, fleet, ranks1, tmp_path):
    """With other weights: by its version, and by what it holds. It knows nothing of the group that it was in."""
    (url,) = fleet.urls
    given = dict(transfer="distributed", keep=True)
    failures, weights = pushed(ranks1, model, [url], 80, tmp_path, 0.01, **given)
    assert failures == {} and difference(url, model, weights) == ""
    fleet.restart(url)
    assert ask(url, "/model_info")["weight_version"] == "default"
    assert "holds other values in" in difference(url, model, weights)
    failures, weights = pushed(ranks1, model, [url], 81, tmp_path, 0.02, transfer="distributed")
    assert failures == {} and difference(url, model, weights) == ""


def test_a_server_of_a_deeper_model_is_refused(model, fleet, ranks1, tmp_path_factory, tmp_path):
    """SGLang takes what it has a place for and is silent about the rest."""
    other = make("qwen3", tmp_path_factory.mktemp("deeper"), **{**SIZE, "num_hidden_layers": 5})
    failures, _ = pushed(ranks1, other, fleet.urls, 90, tmp_path, transfer="tensor")
    assert "lacks model.layers.4.input_layernorm.weight" in failures[fleet.urls[0]]
    shallow = make("qwen3", tmp_path_factory.mktemp("shallow"), **{**SIZE, "num_hidden_layers": 3})
    failures, _ = pushed(ranks1, shallow, fleet.urls, 91, tmp_path, transfer="tensor")
    assert "holds what the policy has not: model.layers.3.input_layernorm.weight" in failures[fleet.urls[0]]


@pytest.mark.parametrize("transfer", ["distributed", "tensor"])  # the last one kills the server
def test_a_server_of_a_wider_model_is_refused(transfer, fleet, ranks2, tmp_path_factory, tmp_path):
    """SGLang says so where it can, and dies of it where it cannot. Both ranks come back."""
    wider = make("qwen3", tmp_path_factory.mktemp("wider"), **{**SIZE, "hidden_size": 64})
    failures, _ = pushed(ranks2, wider, fleet.urls, 95, tmp_path, 0.0, 2, transfer=transfer)
    wanted = "Failed to update parameter online" if transfer == "distributed" else "is it of another model?"
    assert wanted in failures[fleet.urls[0]]


def test_a_server_of_two_ranks(ranks1, tmp_path):
    """Every rank's slices of every tensor are compared, biases and an untied head among them."""
    model = make("qwen2", tmp_path / "model")
    fleet = start_server(tmp_path / "servers", model, load_format="dummy", tp_size=2)
    try:
        for version, transfer in enumerate(TRANSFERS):
            failures, weights = pushed(ranks1, model, fleet.urls, version, tmp_path, 0.01 * version, transfer=transfer)
            assert failures == {}
            found, wanted = server_logp(fleet.urls[0], TOKENS), reference_logp(model, weights, TOKENS)
            assert (found - wanted).abs().max() < 1e-4
    finally:
        fleet.close()
