"""The policy against transformers in float64: logits, log-probs, entropy; and packing against one by one."""

from __future__ import annotations

from typing import Any

import on_ranks
import pytest
import torch
from tiny_models import KINDS, in_float64, random_sequences, response_logits

from flowrl_mega.checkpoint.verify import whole_logits

TOLERANCE = 2e-6  # of the largest logit
LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (40, 60)]
LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "tp2+sp": {"tp": 2, "sequence_parallel": True}}


def logits_of_rows(path, sequences, **sections: Any) -> list[torch.Tensor]:
    """[rows, V] of every sequence, gathered over the vocabulary's shards."""
    policy = on_ranks.build(path, **sections)
    return whole_logits(policy, on_ranks.packed(policy, sequences))


@pytest.fixture(scope="module")
def oracle(tiny_model):
    """transformers' logits of every row, [rows, V] float64 a sequence; once for each kind."""
    known: dict[str, list[torch.Tensor]] = {}

    def compute(kind: str) -> list[torch.Tensor]:
        if kind not in known:
            model = in_float64(tiny_model(kind))
            with torch.no_grad():
                known[kind] = [
                    model(torch.tensor([s.prompt + s.response[:-1]])).logits[0] for s in random_sequences(LENGTHS)
                ]
        return known[kind]

    return compute


def error(found: list[torch.Tensor], wanted: list[torch.Tensor], largest: float) -> float:
    return max((a - b).abs().max().item() for a, b in zip(found, wanted, strict=True)) / largest


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", KINDS)
def test_logits_logprobs_and_entropy(kind, layout, oracle, tiny_model, ranks1, ranks2):
    """Llama, Llama 3's rotary scaling without tied embeddings, Qwen2's biases, Qwen3's q/k norm; the vocabulary of 101
    is padded at tp = 2, and the rows are padded under sequence parallelism."""
    pool, parallel = ranks1 if layout == "tp1" else ranks2, LAYOUTS[layout]
    sequences, wanted = random_sequences(LENGTHS), oracle(kind)
    largest = max(x.abs().max().item() for x in wanted)
    measured = []
    for logits in pool.run(logits_of_rows, tiny_model(kind), sequences, parallel=parallel):
        measured.append(error(logits, wanted, largest))
    logp = [x[len(s.prompt) - 1 :].log_softmax(-1) for x, s in zip(wanted, sequences, strict=True)]
    picked = [x.gather(1, torch.tensor(s.response)[:, None])[:, 0] for x, s in zip(logp, sequences, strict=True)]
    entropy = [-(x.exp() * x).sum(-1) for x in logp]
    for result in pool.run(on_ranks.score, tiny_model(kind), sequences, parallel=parallel):
        measured.append(error(by_sequence(result, "logp"), picked, largest))
        measured.append(error(by_sequence(result, "entropy"), entropy, largest))
    assert max(measured) < TOLERANCE


def by_sequence(result: dict[str, torch.Tensor], name: str) -> list[torch.Tensor]:
    return [result[name][result["segment"] == i] for i in range(len(LENGTHS))]


@pytest.mark.ranks
@pytest.mark.parametrize("temperature", [0.6, 2.0])
def test_temperature_divides_the_logits(temperature, tiny_model, ranks1):
    """All log-probs of training are those of the distribution that was sampled."""
    (result,) = ranks1.run(on_ranks.score, tiny_model("llama"), random_sequences(LENGTHS), temperature)
    model = in_float64(tiny_model("llama"))
    for s, found in zip(random_sequences(LENGTHS), by_sequence(result, "logp"), strict=True):
        with torch.no_grad():
            logp = response_logits(model, s.prompt, s.response, temperature).log_softmax(-1)
        assert (found - logp.gather(1, torch.tensor(s.response)[:, None])[:, 0]).abs().max() < 2e-5


@pytest.mark.ranks
def test_packed_equals_one_by_one_in_any_company(tiny_model, ranks2):
    """A sequence sees neither its neighbours nor its place in the micro-batch; nor does its log Z."""
    sequences = random_sequences(LENGTHS)
    companies = [[sequences], [[s] for s in sequences], [sequences[::2], sequences[1::2]], [sequences[::-1]]]
    parallel = {"tp": 2, "sequence_parallel": True}
    for together, *others in ranks2.run(scores, tiny_model("qwen3"), companies, parallel=parallel):
        for other in others:
            assert max((together[i] - other[i]).abs().max().item() for i in together) < 1e-5
        assert all(torch.equal(together[i], others[-1][i]) for i in together), "the order given does not matter at all"


def scores(path, companies, **sections: Any) -> list[dict[int, torch.Tensor]]:
    """For each way of grouping sequences into micro-batches: every sequence's log-probs, and its log Z at the end."""
    policy = on_ranks.build(path, log_z="mlp", **sections)
    results: list[dict[int, torch.Tensor]] = []
    for groups in companies:
        results.append({})
        for group in groups:
            batch = on_ranks.packed(policy, group)
            (output,) = policy.score([batch])
            parts = output.logp.split(batch.response_cu_seqlens.diff().tolist())
            for index, logp, log_z in zip(batch.index.tolist(), parts, output.log_z, strict=True):
                results[-1][index] = torch.cat([logp, log_z[None]])
    return results
