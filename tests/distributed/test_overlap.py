"""Gradients are summed over ranks while the backward pass runs: when that begins, and that it changes no bit."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from on_overlap import END, START, UPDATE, Seen, overlapped
from rank_pool import RankPool
from test_layouts import COMMON, MODELS, STEPS
from tiny_models import make

pytestmark = pytest.mark.ranks
if torch.cuda.is_available() and torch.cuda.device_count() < 2:
    pytest.skip("two ranks need two GPUs, or none", allow_module_level=True)

BUCKET = 5000  # elements; the embedding alone has more


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, so that the head's gradient comes from its own kernel alone."""
    return make("llama-untied-rope", tmp_path_factory.mktemp("model"), **MODELS)


def train(ranks: RankPool, model: Path, parallel: dict[str, Any], **more: Any) -> list[Seen]:
    """By rank: two steps of two updates, several micro-batches each."""
    sections = COMMON | {"parallel": parallel, "batch": {"mini_batch": 6, "tokens_per_microbatch": 20}}
    return ranks.run(overlapped, model, STEPS, sections, **more)


def same_bits(one: Seen, other: Seen) -> bool:
    gradients = one.trained.gradients
    assert gradients.keys() == other.trained.gradients.keys()
    return one.trained.metrics == other.trained.metrics and all(
        torch.equal(g, other.trained.gradients[name]) for name, g in gradients.items()
    )


@pytest.mark.parametrize("parallel", [{"dp": 2}, {"cp": 2}], ids=["dp2", "cp2"])
@pytest.mark.parametrize("unread", [False, True], ids=["", "log Z unread"])
def test_sums_start_during_the_last_backward(parallel: Any, unread: bool, model: Path, ranks2: RankPool) -> None:
    """And after it that of a bucket in which a parameter has no gradient."""
    early = train(ranks2, model, parallel, bucket=BUCKET, unread=unread)
    plain = train(ranks2, model, parallel | {"overlap_grad_reduce": False}, bucket=BUCKET, unread=unread)
    for ours, theirs in zip(early, plain, strict=True):
        assert same_bits(ours, theirs)
        first, *others = updates(ours)
        buckets = first.count(START)
        assert buckets > 3
        assert first[-buckets:] == [START] * buckets, "Megatron counts the gradients in the first update"
        for events in others:
            ends = events.count(END)
            assert ends > 1 and events[: ends - 1] == [END] * (ends - 1), "none before the last micro-batch"
            during = events[ends - 1 :].index(END)
            assert events.count(START) == buckets and (0 < during < buckets if unread else during == buckets)
        assert all(events[-2:] == [END, START] and events.count(START) == 1 for events in updates(theirs))


def updates(seen: Seen) -> list[list[str]]:
    """The events of each."""
    begins = [place for place, event in enumerate(seen.events) if event == UPDATE]
    assert len(begins) == 2 * len(STEPS)
    return [seen.events[a + 1 : b] for a, b in pairwise([*begins, len(seen.events)])]
