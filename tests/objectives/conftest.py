"""A policy over every string of a small alphabet: expectations are sums, so identities can be checked exactly."""

from __future__ import annotations

from itertools import accumulate, product

import pytest
import torch
from torch import Tensor

from flowrl_mega.objectives import LossInputs
from flowrl_mega.objectives.inputs import segment_sum

LETTERS, MAX_LENGTH = 3, 5
END = LETTERS


def cumulative(lengths) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)))


class Strings:
    """All strings over LETTERS letters that end within MAX_LENGTH tokens, the end token included: 121 sequences with
    547 tokens and lengths 1 to 5. A policy is a table of logits [prefixes, LETTERS + 1]; after MAX_LENGTH - 1 letters
    the end is certain, so the enumerated mass is exactly 1."""

    def __init__(self) -> None:
        stems = [stem for n in range(MAX_LENGTH) for stem in product(range(LETTERS), repeat=n)]
        self.nodes = {stem: i for i, stem in enumerate(s for s in stems if len(s) < MAX_LENGTH - 1)}
        steps = [[(self.nodes.get(s[:i], -1), t) for i, t in enumerate((*s, END))] for s in stems]
        self.length = torch.tensor([len(s) for s in steps])
        self.cu_seqlens = cumulative(self.length.tolist())
        flat = [step for sequence in steps for step in sequence]
        self.node, self.token = torch.tensor(flat).T
        self.shape = (len(self.nodes), LETTERS + 1)

    def __len__(self) -> int:
        return len(self.length)

    def token_logp(self, logits: Tensor) -> Tensor:
        """log pi(y_t) of every token of every string, [T]."""
        table = torch.cat([logits.log_softmax(-1), logits.new_zeros(1, LETTERS + 1)])  # the last row: a certain end
        return table[self.node, self.token]

    def logp(self, logits: Tensor) -> Tensor:
        """log pi(y) of every string, [B]."""
        return segment_sum(self.token_logp(logits), self.cu_seqlens)

    def logits_of(self, p: Tensor) -> Tensor:
        """The logits of the policy whose strings have the probabilities p [B]."""
        free = self.node >= 0
        mass = p.repeat_interleave(self.length)[free]
        table = torch.zeros(self.shape, dtype=torch.float64)
        return table.index_put((self.node[free], self.token[free]), mass, accumulate=True).log()

    def target(self, ref: Tensor, reward: Tensor, beta: float) -> Tensor:
        """The logits of pi_ref e^{|y| (beta r - c)}, with gradient; c by bisection, such that its mass is 1."""
        length = self.length.double()
        low, high = torch.tensor([-50.0, 50.0], dtype=torch.float64)
        for _ in range(200):
            c = (low + high) / 2
            mass = (self.logp(ref) + length * (beta * reward - c)).exp().sum()
            low, high = (c, high) if mass > 1 else (low, c)
        return self.logits_of((self.logp(ref) + length * (beta * reward - c)).exp()).requires_grad_()

    def sequences(self, logits: Tensor, credit: Tensor, ref: Tensor, log_z: Tensor | None = None) -> LossInputs:
        """Every string once, on-policy."""
        logp = self.token_logp(logits)
        return LossInputs(logp, logp.detach(), self.token_logp(ref), log_z, self.cu_seqlens, credit)


@pytest.fixture(scope="session")
def strings() -> Strings:
    return Strings()


@pytest.fixture
def rng() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture
def ref(strings: Strings, rng: torch.Generator) -> Tensor:
    """The reference's logits."""
    return 0.7 * torch.randn(strings.shape, generator=rng, dtype=torch.float64)


@pytest.fixture
def logits(strings: Strings, ref: Tensor, rng: torch.Generator) -> Tensor:
    """A policy away from the reference, with gradient."""
    return (ref + 0.5 * torch.randn(strings.shape, generator=rng, dtype=torch.float64)).requires_grad_()


@pytest.fixture
def reward(strings: Strings, rng: torch.Generator) -> Tensor:
    """A raw reward for every string."""
    return torch.rand(len(strings), generator=rng, dtype=torch.float64)


@pytest.fixture
def packed(rng: torch.Generator):
    """Makes a random micro-batch of unequal lengths, off-policy, with log-probs of the given spread to old."""

    def make(lengths=(3, 1, 7, 2, 5), drift=0.2, log_z=True, reference=True, dtype=torch.float64) -> LossInputs:
        tokens, batch = sum(lengths), len(lengths)

        def draw(n: int) -> Tensor:
            return torch.randn(n, generator=rng, dtype=torch.float64)

        old = -draw(tokens).abs()
        logp = (old + drift * draw(tokens)).to(dtype).requires_grad_()
        ref_logp = (old + 0.3 * draw(tokens)).to(dtype) if reference else None
        z = draw(batch).to(dtype).requires_grad_() if log_z else None
        return LossInputs(logp, old.to(dtype), ref_logp, z, cumulative(lengths), draw(batch))

    return make
