"""Packing against a sequence-by-sequence construction, and how sequences are shared out."""

from __future__ import annotations

import random
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from tiny_models import random_sequences

from flowrl_mega.parallel.packing import (
    PackedBatch,
    Sequence,
    cp_shard,
    efficiency,
    pack,
    split_by_tokens,
    split_data_parallel,
)


def mixed(seed: int, count: int = 12) -> list[Sequence]:
    rng = random.Random(seed)
    return random_sequences([(rng.randint(1, 9), rng.randint(1, 30)) for _ in range(count)], seed=seed)


def rows_of(batch: PackedBatch, place: int) -> slice:
    return slice(int(batch.cu_seqlens[place]), int(batch.cu_seqlens[place + 1]))


@pytest.mark.parametrize("multiple", [1, 2, 7])
@pytest.mark.parametrize("seed", range(4))
def test_every_row_is_what_its_own_sequence_says(seed, multiple):
    """Brute force: what each packed tensor must hold, one sequence at a time."""
    sequences = {s.index: s for s in mixed(seed)}
    batch = pack(list(sequences.values()), multiple)
    assert sorted(batch.index.tolist()) == sorted(sequences)
    assert batch.size == len(sequences)
    assert batch.tokens.numel() % multiple == 0
    assert batch.tokens.numel() == batch.position_ids.numel() == batch.cu_seqlens[-1]
    assert batch.tokens.numel() - sum(s.rows for s in sequences.values()) < multiple
    prompt_end = 0
    for place, index in enumerate(batch.index.tolist()):
        prompt, response = sequences[index].prompt, sequences[index].response
        rows, every = rows_of(batch, place), [*prompt, *response]
        assert batch.tokens[rows].tolist() == every[:-1]
        assert batch.position_ids[rows].tolist() == list(range(len(every) - 1))
        mine = slice(int(batch.response_cu_seqlens[place]), int(batch.response_cu_seqlens[place + 1]))
        assert batch.target[mine].tolist() == response
        # The row that predicts response token t is that of the token before it.
        assert batch.response_rows[mine].tolist() == [rows.start + len(prompt) - 1 + t for t in range(len(response))]
        prompts = slice(prompt_end, prompt_end + len(prompt))
        assert batch.prompt_rows[prompts].tolist() == list(range(rows.start, rows.start + len(prompt)))
        assert batch.prompt_segment[prompts].tolist() == [place] * len(prompt)
        assert batch.prompt_lengths[place] == len(prompt)
        prompt_end = prompts.stop
    assert batch.prompt_rows.numel() == prompt_end


@pytest.mark.parametrize("multiple", [1, 7])
@pytest.mark.parametrize("seed", range(4))
def test_buckets_cover_every_row_once(seed, multiple):
    """The padded view of each bucket: a sequence's tokens in its own line, from the left, and nothing else."""
    batch = pack(mixed(seed), multiple)
    lengths = batch.cu_seqlens.diff().tolist()
    end = first = 0
    for bucket in batch.buckets:
        assert bucket.tokens.start == end
        mine = lengths[first : first + bucket.sequences]
        places = [line * bucket.longest + column for line, n in enumerate(mine) for column in range(n)]
        found = range(bucket.sequences * bucket.longest) if bucket.scatter is None else bucket.scatter.tolist()
        assert list(found) == places
        assert bucket.longest == max(mine)
        assert bucket.tokens.stop - end == sum(mine)
        assert min(mine) >= 0.8 * bucket.longest, "a padded view that is mostly padding wastes time"
        end, first = bucket.tokens.stop, first + bucket.sequences
    assert end == batch.tokens.numel()
    assert first == len(lengths)


def test_the_order_of_the_sequences_does_not_matter():
    """So that the batch, and with it every rounding, depends on what was sampled alone."""
    sequences = mixed(0)
    shuffled = random.Random(1).sample(sequences, len(sequences))
    for a, b in zip(vars(pack(sequences)).values(), vars(pack(shuffled)).values(), strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else str(a) == str(b)


def test_one_token_each_is_enough():
    """The shortest sequence there is: one prompt token, and an answer that is the end token alone."""
    batch = pack([Sequence(0, [5], [1])])
    assert batch.tokens.tolist() == [5]
    assert batch.target.tolist() == [1]
    assert batch.response_rows.tolist() == [0]


@pytest.mark.parametrize("dp", [1, 2, 3, 4])
def test_data_parallel_shares_are_alike(dp):
    """Rows differ by no more than the shortest sequence of the largest share, which would else have gone elsewhere."""
    sequences = mixed(3, count=29)
    shares = split_data_parallel(sequences, dp)
    assert sorted(s.index for share in shares for s in share) == list(range(29))
    rows = [sum(s.rows for s in share) for share in shares]
    largest = shares[rows.index(max(rows))]
    assert max(rows) - min(rows) <= min(s.rows for s in largest)


@pytest.mark.parametrize("least", [1, 2, 4])
def test_every_data_parallel_rank_gets_as_many_as_its_pipeline_needs(least):
    """Also when one sequence is longer than all others together, and when there are just enough."""
    long = Sequence(0, [5] * 1000, [1])
    for count in (4 * least, 4 * least + 3):
        shares = split_data_parallel([long, *(Sequence(i, [5], [1]) for i in range(1, count))], 4, least)
        assert sorted(s.index for share in shares for s in share) == list(range(count))
        assert min(len(share) for share in shares) >= least


@pytest.mark.parametrize(("count", "dp"), [(64, 4), (64, 8), (512, 64)])
def test_ranks_hardly_wait_for_each_other(count, dp):
    """Lengths of real reasoning have a heavy tail. The goal is 0.97; no way to share out beats mean / longest."""
    rng = random.Random(0)
    lengths = [min(8192, int(rng.lognormvariate(7, 0.8))) for _ in range(count)]
    sequences = [Sequence(i, [5] * n, [1]) for i, n in enumerate(lengths)]
    best = min(1.0, sum(lengths) / dp / max(lengths))
    layout = SimpleNamespace(dp=dp, pp=1, vpp=1, cp=1, sequence_multiple=1, row_multiple=1)
    assert efficiency(sequences, count, layout, 16384) >= 0.97 * best
    layout.row_multiple = 64  # tp 4 under sequence parallelism, in FP8
    assert efficiency(sequences, count, layout, 16384) >= 0.97 * best


def test_padding_and_waiting_count_as_computed():
    """By hand: rows 5 and 3 against 4, each padded to 4, the micro-batch to 8."""
    sequences = [Sequence(i, [5] * n, [1]) for i, n in enumerate((5, 4, 3))]
    layout = SimpleNamespace(dp=2, pp=1, vpp=1, cp=1, sequence_multiple=1, row_multiple=1)
    assert efficiency(sequences, 3, layout, 100) == 12 / (2 * 7)
    layout.sequence_multiple = 4
    assert efficiency(sequences, 3, layout, 100) == 12 / (2 * 8)
    layout.row_multiple = 16
    assert efficiency(sequences, 3, layout, 100) == 12 / (2 * 16)
    assert efficiency(sequences, 3, layout, 1) == 12 / (2 * 32), "two micro-batches"


@pytest.mark.parametrize("cp", [2, 4])
@pytest.mark.parametrize("seed", range(3))
def test_context_parallel_ranks_share_out_every_row_and_every_target(seed, cp):
    """Rank r has the chunks r and 2 cp - 1 - r of every sequence, and the targets that those rows predict."""
    whole = pack(mixed(seed), 2 * cp, each=2 * cp)
    ranks = [cp_shard(whole, cp, rank) for rank in range(cp)]
    chunks = [(start, end, (end - start) // (2 * cp)) for start, end in pairwise(whole.cu_seqlens.tolist())]
    for rank, part in enumerate(ranks):
        wanted = [
            row
            for start, end, n in chunks
            for row in (*range(start + rank * n, start + (rank + 1) * n), *range(end - (rank + 1) * n, end - rank * n))
        ]
        assert part.rows.tolist() == wanted
        assert part.tokens.tolist() == whole.tokens[wanted].tolist()
        assert part.position_ids.tolist() == whole.position_ids[wanted].tolist()
        assert part.target.tolist() == whole.target[part.response_index].tolist()
        assert part.rows[part.response_rows].tolist() == whole.response_rows[part.response_index].tolist()
        assert part.prompt_lengths.tolist() == whole.prompt_lengths.tolist()
    assert torch.cat([part.rows for part in ranks]).sort()[0].tolist() == list(range(whole.tokens.numel()))
    assert torch.cat([part.response_index for part in ranks]).sort()[0].tolist() == list(range(whole.target.numel()))
    prompts = torch.cat([torch.stack([part.rows[part.prompt_rows], part.prompt_segment]) for part in ranks], 1)
    prompts = prompts[:, prompts[0].argsort()]
    assert torch.equal(prompts, torch.stack([whole.prompt_rows, whole.prompt_segment]))


@pytest.mark.parametrize("multiple", [2, 3, 4])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_the_number_of_micro_batches_can_be_a_multiple(budget, multiple):
    """What an interleaved pipeline asks for; the budget holds, nothing is lost, and no micro-batch is empty."""
    groups = split_by_tokens(mixed(5, count=12), budget, multiple)
    assert len(groups) % multiple == 0 and all(groups)
    assert sorted(s.index for group in groups for s in group) == list(range(12))
    assert all(sum(s.rows for s in group) <= budget or len(group) == 1 for group in groups)


def test_too_few_sequences_for_the_ranks_is_a_bug():
    with pytest.raises(AssertionError, match="every data-parallel rank"):
        split_data_parallel(mixed(0, count=1), 2)


@pytest.mark.parametrize("budget", [1, 40, 100, 10_000])
def test_micro_batches_keep_to_the_budget(budget):
    sequences = mixed(5, count=40)
    groups = split_by_tokens(sequences, budget)
    assert sorted(s.index for group in groups for s in group) == list(range(40))
    assert all(groups)
    for group in groups:
        assert sum(s.rows for s in group) <= budget or len(group) == 1
    if budget == 10_000:
        assert len(groups) == 1
    # Neighbours that would have fitted together are not kept apart.
    for group, following in zip(groups, groups[1:], strict=False):
        assert sum(s.rows for s in group) + following[0].rows > budget
