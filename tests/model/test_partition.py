"""The partition function: its size, its input, and that it is the same on every rank."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import on_ranks
import pytest
import torch
from tiny_models import in_float64, random_sequences

from flowrl_mega.config import LogZ
from flowrl_mega.model.partition import PartitionMLP, build_partition, prompt_sum

LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "tp2+sp": {"tp": 2, "sequence_parallel": True}}


@pytest.mark.parametrize("hidden", [1, 32, 100])
def test_number_of_parameters(hidden):
    """2 H^2 + 7 H + 1: the paper's head, no more and no less."""
    assert sum(p.numel() for p in PartitionMLP(hidden, seed=0).parameters()) == 2 * hidden**2 + 7 * hidden + 1


def test_the_seed_rules_the_weights_and_nothing_else_does():
    """Ranks that have drawn unlike random numbers before must still build the same head, and making it must not
    disturb what they draw next."""
    torch.manual_seed(1)
    first, drawn_after = PartitionMLP(8, seed=5), torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(torch.rand(1), drawn_after)
    again, other = PartitionMLP(8, seed=5), PartitionMLP(8, seed=6)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), again.parameters(), strict=True))
    assert not torch.equal(next(first.parameters()), next(other.parameters()))


def test_kinds():
    assert build_partition(LogZ(kind="group"), 8, 0) is None
    assert build_partition(LogZ(kind="zero"), 8, 0) is None
    constant = build_partition(LogZ(kind="constant"), 8, 0)
    assert constant is not None
    assert constant(torch.randn(3, 8)).tolist() == [0, 0, 0]
    constant(torch.randn(3, 8)).sum().backward()
    assert constant.value.grad.item() == 3


def test_prompt_sum_in_float64():
    """Packed rows of three prompts, with response rows between them that must not count."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 6, generator=g)
    prompts = [range(3), range(7, 8), range(12, 19)]
    rows = torch.tensor([row for prompt in prompts for row in prompt])
    segment = torch.tensor([i for i, prompt in enumerate(prompts) for _ in prompt])
    found = prompt_sum(hidden, rows, segment, len(prompts))
    wanted = torch.stack([hidden[list(p)].double().sum(0) for p in prompts])
    assert (found - wanted).abs().max() < 1e-6


def log_z(
    path, sequences, of: Any = "mlp", draw=None, **sections: Any
) -> tuple[dict[int, float], dict[str, torch.Tensor]]:
    """Scored; or, with `draw`, as a training step of that number computes it."""
    policy = on_ranks.build(path, log_z=of, **sections)
    batch = on_ranks.packed(policy, sequences)
    if draw is None:
        values = policy.score([batch])[0].log_z
    else:
        batch.step = draw
        values = policy.stages[0](batch).log_z.detach()
    return dict(zip(batch.index.tolist(), values.tolist(), strict=True)), policy.partition.state_dict()


@pytest.mark.ranks
@pytest.mark.parametrize("prompt", ["all", "drop-last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_z_reads_the_last_hidden_states_of_the_prompt_tokens(layout, prompt, tiny_model, ranks1, ranks2):
    """Against transformers' hidden states after the final norm: the response must not leak in, the last prompt token
    must be left out where that is asked for and there only (a prompt of one token keeps it), and all ranks must hold
    the same bits."""
    sequences = random_sequences([(3, 5), (1, 1), (10, 20), (4, 9), (8, 7)])
    pool = ranks1 if layout == "tp1" else ranks2
    results = pool.run(log_z, tiny_model("llama"), sequences, LogZ(prompt=prompt), parallel=LAYOUTS[layout])
    model, head = in_float64(tiny_model("llama")), PartitionMLP(32, seed=0)
    head.load_state_dict(results[0][1])
    head.double()
    for s in sequences:
        with torch.no_grad():
            hidden = model.model(torch.tensor([s.prompt])).last_hidden_state[0]
            read = hidden if prompt == "all" or len(s.prompt) == 1 else hidden[:-1]
            wanted = head.layers(read.mean(0)).item()
        assert results[0][0][s.index] == pytest.approx(wanted, abs=2e-6)
    assert all(values == results[0][0] for values, _ in results)


def test_dropout_is_that_of_its_place_in_the_step():
    """[Linear -> GELU -> LayerNorm -> Dropout] x 2 with torch's own dropout as oracle of what p means: a share p of
    the values is 0, the rest is larger by 1 / (1 - p). The draw is a sequence's own: not of its company, not of its
    order; and another one in another step and in the second block."""
    head, p = PartitionMLP(64, seed=0, dropout=0.3), 0.3
    masks = {}
    for draw in (1, 2):
        batch = SimpleNamespace(index=torch.arange(40), step=draw)
        masks[draw] = [head._mask(batch, torch.ones(40, 64), block) for block in (0, 1)]
    for mask in (masks[1][0], masks[1][1], masks[2][0]):
        assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        oracle = torch.nn.functional.dropout(torch.ones(40, 64), p)
        assert oracle.unique().tolist() == pytest.approx([0, 1 / (1 - p)])
        # 2560 draws: five standard deviations of their mean
        assert abs((mask == 0).double().mean().item() - p) < 5 * (p * (1 - p) / mask.numel()) ** 0.5
    assert not torch.equal(masks[1][0], masks[1][1]) and not torch.equal(masks[1][0], masks[2][0])
    part = head._mask(SimpleNamespace(index=torch.tensor([7, 3]), step=1), torch.ones(2, 64), 0)
    assert torch.equal(part, masks[1][0][[7, 3]])


@pytest.mark.ranks
def test_dropout_is_for_training_and_the_same_in_every_layout(tiny_model, ranks1, ranks2):
    """What is scored is the model; what is trained has one mask on all ranks that compute the same log Z."""
    sequences = random_sequences([(3, 5), (1, 1), (10, 20), (4, 9), (8, 7)])
    model, dropped = tiny_model("llama"), LogZ(dropout=0.5)
    (plain, _), (scored, _), (trained, _) = (
        ranks1.run(log_z, model, sequences, of, draw)[0] for of, draw in ((LogZ(), None), (dropped, None), (dropped, 3))
    )
    assert plain == scored
    assert all(abs(trained[i] - plain[i]) > 1e-4 for i in plain)
    for layout in ("tp2", "tp2+sp"):
        for found, _ in ranks2.run(log_z, model, sequences, dropped, 3, parallel=LAYOUTS[layout]):
            assert found == pytest.approx(trained, abs=2e-6)
