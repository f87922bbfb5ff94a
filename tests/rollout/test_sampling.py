"""Drawing tokens: frequencies against exact probabilities, and what top_k and top_p leave out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowrl_mega.model.generation import Sampling, draw

DRAWS = 20_000
LOGITS = torch.tensor([2.0, -1.0, 0.5, 0.4, -3.0, 1.9, 0.0, 1.0])
# The values that chi-square exceeds once in 1000 correct programs, by degrees of freedom.
CHI_SQUARE = {2: 13.8, 3: 16.3, 7: 24.3}


def noise(seed: int = 0, rows: int = DRAWS) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(seed))


def chi_square(tokens: Tensor, p: Tensor) -> float:
    """Of the counts of `tokens` against the probabilities `p`; infinite where an impossible token was drawn."""
    counts, wanted = torch.bincount(tokens, minlength=len(p)).double(), p * len(tokens)
    if counts[p == 0].any():
        return float("inf")
    return ((counts - wanted)[p > 0].square() / wanted[p > 0]).sum().item()


def kept(p: Tensor, top_k: int, top_p: float) -> set[int]:
    """Brute force: the likeliest `top_k`, and of those the fewest that hold `top_p` of their mass."""
    order = sorted(range(len(p)), key=lambda i: -p[i].item())[: top_k or len(p)]
    mass, chosen = sum(p[i].item() for i in order), []
    for i in order:
        chosen.append(i)
        if sum(p[j].item() for j in chosen) >= top_p * mass:
            break
    return set(chosen)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature):
    p = torch.softmax(LOGITS.double() / temperature, -1)
    tokens, logp = draw(LOGITS.expand(DRAWS, -1), noise(), Sampling(1, temperature))
    assert chi_square(tokens, p) < CHI_SQUARE[7]
    assert (logp - p.log()[tokens]).abs().max() < 1e-6


@pytest.mark.parametrize(
    ("top_k", "top_p", "left"), [(3, 1.0, 3), (0, 0.8, 4), (4, 0.8, 3), (1, 1.0, 1), (0, 0.01, 1), (8, 1.0, 8)]
)
def test_excluded_tokens_are_never_drawn(top_k, top_p, left):
    """What is left keeps its proportions; the log-probs stay those of the whole distribution, which is what the
    trainer scores."""
    p = torch.softmax(LOGITS.double(), -1)
    allowed = kept(p, top_k, top_p)
    assert len(allowed) == left
    tokens, logp = draw(LOGITS.expand(DRAWS, -1), noise(), Sampling(1, 1.0, top_p, top_k))
    assert set(tokens.tolist()) == allowed
    assert (logp - p.log()[tokens]).abs().max() < 1e-6
    conditional = torch.zeros_like(p)
    conditional[list(allowed)] = p[list(allowed)]
    if left > 1:
        assert chi_square(tokens, conditional / conditional.sum()) < CHI_SQUARE[left - 1]


@pytest.mark.slow
def test_random_distributions_and_extreme_noise():
    """The ends of the unit interval are where an inverse of the cumulative distribution goes wrong: token 0 or the
    last one although it is excluded, or an id past the end."""
    g = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(200, 50, generator=g)
    for top_k, top_p in ((0, 1.0), (5, 1.0), (0, 0.7), (20, 0.9)):
        allowed = [kept(torch.softmax(row.double(), -1), top_k, top_p) for row in logits]
        for value in (0.0, 0.5, 1 - 2**-24, 1.0):
            tokens, _ = draw(logits, torch.full((200,), value), Sampling(1, 1.0, top_p, top_k))
            assert all(token in ok for token, ok in zip(tokens.tolist(), allowed, strict=True))


def test_an_impossible_token_is_never_drawn():
    """A probability that underflows to 0, at either end of the vocabulary."""
    logits = torch.tensor([[-1e4, 0.0, 1.0, -1e4]])
    for value in (0.0, 1 - 2**-24, 1.0):
        assert draw(logits, torch.tensor([value]), Sampling(1))[0].item() in (1, 2)


def test_temperature_0_is_greedy():
    tokens, logp = draw(LOGITS[None], torch.tensor([0.99]), Sampling(1, 0.0))
    assert tokens.tolist() == [0]
    assert logp.item() == pytest.approx(torch.log_softmax(LOGITS, -1)[0].item())
