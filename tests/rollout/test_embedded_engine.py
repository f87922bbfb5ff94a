"""The embedded engine against teacher forcing, transformers' generate, exact probabilities, and itself elsewhere."""

from __future__ import annotations

from itertools import product
from typing import Any, NamedTuple

import on_ranks
import pytest
import torch
from tiny_models import KINDS, in_float64, random_sequences, response_logits
from torch import Tensor

from flowrl_mega.model import generation
from flowrl_mega.model.generation import Decoder, Sampling
from flowrl_mega.model.weights import WholeWeights
from flowrl_mega.parallel.packing import Sequence
from flowrl_mega.rollout import EmbeddedEngine, Rollout, generate
from flowrl_mega.rollout.engine import Request

PROMPTS = [s.prompt for s in random_sequences([(n, 1) for n in (3, 1, 12, 5, 8)], seed=7)]  # ragged
STOPS = (1, 17, 40, 41, 42, 77)  # enough of 101 ids for most answers to stop before the limit
SAMPLING = Sampling(24, stop_ids=STOPS)


def answers_of(path, prompts, answers, sampling, seed=0, at_once=512, **sections: Any) -> tuple[list[Rollout], Tensor]:
    """What the engine says, and its log-probs as the trainer scores them, one after another."""
    policy = on_ranks.build(path, **sections)
    engine = EmbeddedEngine(policy.layout, at_once)
    engine.sync(policy, version=3)
    rollouts = [r for group in generate(engine, prompts, answers, sampling, seed) for r in group]
    return rollouts, teacher_forced(policy, prompts, answers, rollouts, sampling.temperature)


def teacher_forced(policy, prompts, answers, rollouts, temperature) -> Tensor:
    sequences = [Sequence(i, prompts[i // answers], r.response) for i, r in enumerate(rollouts)]
    batch = on_ranks.packed(policy, sequences)
    logp = policy.layout.from_last_stage([output.logp for output in policy.score([batch], temperature or 1.0)])[0]
    parts = logp.split(batch.response_cu_seqlens.diff().tolist())
    by_index = dict(zip(batch.index.tolist(), parts, strict=True))
    return torch.cat([by_index[i] for i in range(len(rollouts))])


def logp_of(rollouts: list[Rollout]) -> Tensor:
    return torch.tensor([x for r in rollouts for x in r.logp])


@pytest.mark.ranks
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_equal_teacher_forced_ones(kind, temperature, tiny_model, ranks1):
    """Two decoders of the same weights (a cache and left padding here, packing there) must agree, or the rollouts are
    of another policy than the one that is trained."""
    sampling = Sampling(24, temperature, stop_ids=STOPS)
    ((rollouts, forced),) = ranks1.run(answers_of, tiny_model(kind), PROMPTS, 4, sampling)
    error = (logp_of(rollouts) - forced).abs().max().item()
    assert error < 2e-5
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    assert len({len(r.response) for r in rollouts}) > 5
    for r in rollouts:
        assert len(r.logp) == len(r.response) <= 24
        assert r.versions == [(3, len(r.response))]
        assert not set(r.response[:-1]) & set(STOPS), "an answer goes on after its stop token"
        assert (r.finish_reason == "stop") == (r.response[-1] in STOPS)
        assert r.finish_reason == "stop" or len(r.response) == 24


@pytest.mark.ranks
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_text_equals_transformers_generate(kind, tiny_model, ranks1):
    """The end tokens are some that greedy decoding meets half-way, so that stopping is compared too."""
    model = in_float64(tiny_model(kind))

    def transformers_says(prompt: list[int], stops: list[int]) -> list[int]:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, eos_token_id=stops,
            pad_token_id=0,
        )  # fmt: skip
        return out[0, len(prompt) :].tolist()

    free = [transformers_says(p, [100_000]) for p in PROMPTS]
    stops = [free[0][8], free[3][13]]
    wanted = [transformers_says(p, stops) for p in PROMPTS]
    assert any(len(w) < 24 for w in wanted)
    sampling = Sampling(24, temperature=0.0, stop_ids=tuple(stops))
    ((rollouts, _),) = ranks1.run(answers_of, tiny_model(kind), PROMPTS, 1, sampling)
    assert [r.response for r in rollouts] == wanted


@pytest.mark.ranks
def test_same_answers_in_every_layout(tiny_model, ranks1, ranks2):
    """How ranks share the work, and how many answers they compute at once, must not show in the answers."""
    path = tiny_model("qwen3")
    ((alone, _),) = ranks1.run(answers_of, path, PROMPTS, 4, SAMPLING)
    in_layouts = [
        *ranks1.run(answers_of, path, PROMPTS, 4, SAMPLING, at_once=8),
        *ranks2.run(answers_of, path, PROMPTS, 4, SAMPLING, parallel={"tp": 2}),
        *ranks2.run(answers_of, path, PROMPTS, 4, SAMPLING, parallel={"dp": 2}),
        *ranks2.run(answers_of, path, PROMPTS, 4, SAMPLING, parallel={"pp": 2}),
    ]
    for rollouts, _ in in_layouts:
        assert [r.response for r in rollouts] == [r.response for r in alone]
        assert (logp_of(rollouts) - logp_of(alone)).abs().max() < 1e-5
    ((other, _),) = ranks1.run(answers_of, path, PROMPTS, 4, SAMPLING, seed=1)
    assert [r.response for r in other] != [r.response for r in alone]
    assert len({tuple(r.response) for r in alone}) > 15, "the answers of a group are drawn one by one"


class Drawn(NamedTuple):
    tokens: list[list[int]]
    logp: list[list[float]]
    compactions: int


def together_and_alone(path) -> tuple[Drawn, Drawn]:
    """Six answers to each prompt in one batch, and one by one with the same noise; counts how often a batch shrank."""
    policy = on_ranks.build(path)
    decoder = Decoder(policy.arch, WholeWeights(policy).gather())
    noise = torch.rand(len(PROMPTS), 6, 24, generator=torch.Generator().manual_seed(5))
    selections, real = [], generation._Cache.select

    def select(cache, rows, capacity):
        selections.append(rows)
        return real(cache, rows, capacity)

    def run(groups) -> Drawn:
        selections.clear()
        tokens, logp = [], []
        for prompts, answers, rows in groups:
            out = generation.generate(decoder, prompts, answers, SAMPLING, rows)
            for i, n in enumerate(out.lengths.tolist()):
                tokens.append(out.tokens[i, :n].tolist())
                logp.append(out.logp[i, :n].tolist())
        return Drawn(tokens, logp, len(selections) - len(groups))

    generation._Cache.select = select
    try:
        alone = [([prompt], 1, noise[i, j][None]) for i, prompt in enumerate(PROMPTS) for j in range(6)]
        return run([(PROMPTS, 6, noise.flatten(0, 1))]), run(alone)
    finally:
        generation._Cache.select = real


@pytest.mark.ranks
def test_an_answer_does_not_depend_on_its_neighbours(tiny_model, ranks1):
    """Nor on the padding of its prompt, nor on answers that ended and left the batch."""
    ((together, alone),) = ranks1.run(together_and_alone, tiny_model("llama"))
    assert together.compactions >= 1
    assert alone.compactions == 0
    assert together.tokens == alone.tokens
    for a, b in zip(together.logp, alone.logp, strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.ranks
def test_frequencies_of_whole_answers(tiny_model, ranks1):
    """Chi-square of 8,000 answers against the exact probability of every answer there is: 5 ids, one of them the end,
    at most two tokens: 1 + 4 x 5 = 21 answers."""
    path, prompt, temperature = tiny_model("llama", vocab=5), [2, 3, 4], 0.7
    sampling = Sampling(2, temperature, stop_ids=(1,))
    ((rollouts, _),) = ranks1.run(answers_of, path, [prompt], 8000, sampling, at_once=8000)
    outcomes = [[1]] + [[a, b] for a, b in product((0, 2, 3, 4), range(5))]
    model = in_float64(path)
    chi_square = total = 0.0
    for outcome in outcomes:
        with torch.no_grad():
            logp = response_logits(model, prompt, outcome, temperature).log_softmax(-1)
        p = logp[range(len(outcome)), outcome].sum().exp().item()
        found = sum(r.response == outcome for r in rollouts)
        chi_square, total = chi_square + (found - 8000 * p) ** 2 / (8000 * p), total + p
    assert total == pytest.approx(1.0)
    assert chi_square < 45.3, "1 in 1000 at 20 degrees of freedom"


def generate_around_a_step(path, **sections: Any) -> list[tuple[list[Rollout], float]]:
    """The engine's answers to the same prompts and seed before and after a training step, each with the largest
    difference of their log-probs to the policy's of that moment."""
    job = on_ranks.start(path, optimizer={"lr": 1e-2, "warmup_steps": 0}, objective={"name": "flowrl"}, **sections)
    prompts, answers, found = [[2, 3, 4], [5, 6]], 4, []
    sampling = job.evaluator.sampling
    for _ in range(2):
        rollouts = [r for group in generate(job.engine, prompts, answers, sampling, seed=0) for r in group]
        forced = teacher_forced(job.models.policy, prompts, answers, rollouts, sampling.temperature)
        found.append((rollouts, (logp_of(rollouts) - forced).abs().max().item()))
        job.trainer.step()
    return found


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [{}, {"tp": 2}], ids=["tp1", "tp2"])
def test_after_a_step_the_engine_uses_the_new_weights(parallel, tiny_model, ranks1, ranks2):
    """Rollouts of stale weights would make every step off-policy without a sign of it."""
    pool = ranks2 if parallel else ranks1
    model = tiny_model("llama", vocab=14)
    for (before, error_before), (after, error_after) in pool.run(generate_around_a_step, model, parallel=parallel):
        assert {version for r in before for version, _ in r.versions} == {0}
        assert {version for r in after for version, _ in r.versions} == {1}
        assert max(error_before, error_after) < 2e-5
        assert [r.logp for r in before] != [r.logp for r in after]
        assert abs(before[0].logp[0] - after[0].logp[0]) > 1e-3, "the same first row, another policy"


def reported_and_found(path, sampling: Sampling, **sections: Any) -> tuple[list[tuple[int, int, Rollout]], list[Any]]:
    """In a rank: the answers reported while it generated, and those that all ranks get at the end."""
    policy, reported = on_ranks.build(path, **sections), []
    engine = EmbeddedEngine(policy.layout, sequences_at_once=12)
    engine.sync(policy, version=3)
    requests = [Request(prompt, 4, sampling.max_tokens) for prompt in PROMPTS]
    job = engine.start(requests, sampling, 0, on_answer=lambda *answer: reported.append(answer))
    return reported, engine.finish(job)


@pytest.mark.ranks
def test_each_answer_is_reported_as_soon_as_it_ends(tiny_llama, ranks2):
    """Scores are begun with it, so it must be the answer that is trained on; once, on the rank that wrote it, and the
    short ones of a batch before the long ones."""
    (first, found), (second, _) = ranks2.run(reported_and_found, tiny_llama, SAMPLING, parallel={"dp": 2})
    assert sorted((request, i) for request, i, _ in first + second) == [
        (p, i) for p in range(len(PROMPTS)) for i in range(4)
    ]
    assert all(found[request][i] == rollout for request, i, rollout in first + second)
    lengths = [len(rollout.response) for request, _, rollout in first if request in (0, 2, 4)]
    assert {request % 2 for request, _, _ in first} == {0}
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1]
