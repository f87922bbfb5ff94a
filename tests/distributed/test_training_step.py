"""A training step on recorded rollouts: against plain autograd through transformers, and the same in every layout.

The tolerance everywhere is 1e-5 of a tensor's largest gradient. That it is tight enough to see a mistake is shown by
leaving out the all-reduces of the step, one at a time.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from on_ranks import Recorded, Update, update, updates_short_of_one
from tiny_models import in_float64, random_sequences, response_logits

TOLERANCE = 1e-5
FLOWRL = {"name": "flowrl", "beta": 3.0}
DETACHED = FLOWRL | {"z": "mlp-detached"}
GRPO = {"name": "grpo", "kl_coef": 0.1}
BATCH = {"tokens_per_microbatch": 20}  # several micro-batches, not the same number on both data-parallel ranks
TP2, SP = {"tp": 2}, {"tp": 2, "sequence_parallel": True}
BETA, EPS, KL = 3.0, 0.2, 0.1


def record(folder, seed: int = 0) -> Recorded:
    """Seven rollouts of a policy a little away from both the old one and the reference, so that w is not 1."""
    sequences = random_sequences([(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (2, 12), (6, 3)], seed=seed)
    generator = torch.Generator().manual_seed(seed)
    model, old, ref = in_float64(folder), [], []
    for sequence in sequences:
        with torch.no_grad():
            logp = response_logits(model, sequence.prompt, sequence.response).log_softmax(-1)
        logp = logp.gather(1, torch.tensor(sequence.response)[:, None])[:, 0]
        old.append((logp + 0.1 * torch.randn(logp.shape, generator=generator)).float())
        ref.append((logp + 0.5 * torch.randn(logp.shape, generator=generator)).float())
    return Recorded(sequences, torch.randn(len(sequences), generator=generator, dtype=torch.float64), old, ref)


def partition_function(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    """log Z of one prompt's mean hidden state x [H], from Eq. 5's description."""
    for linear, norm in ((0, 2), (3, 5)):
        x = F.gelu(F.linear(x, weights[f"layers.{linear}.weight"], weights[f"layers.{linear}.bias"]))
        scale, shift = weights[f"layers.{norm}.weight"], weights[f"layers.{norm}.bias"]
        x = (x - x.mean()) / (x.var(unbiased=False) + 1e-5).sqrt() * scale + shift
    return F.linear(x, weights["layers.6.weight"], weights["layers.6.bias"])[0]


def expected(folder, recorded: Recorded, objective: dict, partition: dict[str, torch.Tensor]):
    """(loss, mean log Z, gradients by name) in float64, sequence by sequence, with the formulas written out."""
    model = in_float64(folder)
    z = {name: value.double().requires_grad_() for name, value in partition.items()}
    loss, log_zs = torch.zeros((), dtype=torch.float64), []
    for i, sequence in enumerate(recorded.sequences):
        prompt, response = sequence.prompt, sequence.response
        old, ref = recorded.old_logp[i].double(), recorded.ref_logp[i].double()
        hidden = model.model(torch.tensor([prompt + response])).last_hidden_state[0]
        logits = model.lm_head(hidden)[len(prompt) - 1 : -1]
        logp = logits.log_softmax(-1)[range(len(response)), response]
        if objective["name"] == "flowrl":
            read = hidden.detach() if objective.get("z") == "mlp-detached" else hidden
            log_zs.append(partition_function(z, read[: len(prompt)].mean(0)))
            delta = log_zs[-1] + logp.mean() - BETA * recorded.credit[i] - ref.mean()
            weight = min(max((logp - old).sum().detach().exp().item(), 1 - EPS), 1 + EPS)
            loss = loss + weight * delta**2
        else:
            ratio, advantage = (logp - old).exp(), recorded.credit[i]
            surrogate = torch.minimum(ratio * advantage, ratio.clamp(1 - EPS, 1 + EPS) * advantage)
            k3 = (ref - logp).exp() - (ref - logp) - 1
            loss = loss + (-surrogate + KL * k3).mean()
    loss = loss / len(recorded.sequences)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    gradients |= {f"partition.{name}": p.grad for name, p in z.items()}
    mean_log_z = sum(x.item() for x in log_zs) / len(recorded.sequences)
    return loss.item(), mean_log_z, gradients


def worst(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> tuple[float, str]:
    """The largest difference, in units of the tensor's largest element, and the tensor's name."""
    assert found.keys() == wanted.keys()
    assert all(w.abs().max() > 0 for w in wanted.values())
    return max(((found[n] - w).abs().max().item() / w.abs().max().item(), n) for n, w in wanted.items())


def difference(found: Update, wanted: Update) -> tuple[float, str]:
    """The largest relative difference of all that a step computes: gradients, loss, log Z, gradient norm, metrics."""
    assert found.metrics.keys() == wanted.metrics.keys()
    metrics = [(abs(found.metrics[n] - w) / max(1.0, abs(w)), n) for n, w in wanted.metrics.items()]
    return max(worst(found.gradients, wanted.gradients), *metrics)


@pytest.fixture(scope="module")
def alone(tiny_model, ranks1):
    """The update of one rank, once for each (model, objective)."""
    results = {}

    def run(kind: str, objective: dict) -> tuple[Recorded, Update]:
        key = kind, str(objective)
        if key not in results:
            recorded = record(tiny_model(kind))
            (result,) = ranks1.run(update, tiny_model(kind), recorded, objective=objective, batch=BATCH)
            results[key] = recorded, result
        return results[key]

    return run


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        *(
            (kind, objective)
            for kind in ("llama", "llama-untied-rope", "qwen2", "qwen3")
            for objective in (FLOWRL, GRPO)
        ),
        ("llama", DETACHED),
    ],
    ids=lambda value: value if isinstance(value, str) else value.get("z", value["name"]),
)
def test_one_rank_computes_what_autograd_through_transformers_does(kind, objective, alone, tiny_model):
    """The whole chain (packing, Megatron, lm-head, objective, schedule, normaliser) has an oracle that shares no code
    with it."""
    recorded, found = alone(kind, objective)
    loss, log_z, gradients = expected(tiny_model(kind), recorded, objective, found.partition)
    assert found.micro_batches > 1
    assert found.metrics["loss/policy"] == pytest.approx(loss, rel=TOLERANCE)
    assert found.metrics.get("loss/log_z", 0.0) == pytest.approx(log_z, rel=TOLERANCE, abs=1e-6)
    error, name = worst(found.gradients, gradients)
    assert error < TOLERANCE, name


@pytest.mark.ranks
def test_the_recorded_rollouts_exercise_the_weight(alone):
    """A batch in which every w is 1, or every w is clipped, would prove less."""
    metrics = alone("llama", FLOWRL)[1].metrics
    assert 0 < metrics["policy/clip_fraction"] < 1
    assert metrics["loss/flow_weight"] != pytest.approx(1.0, abs=1e-3)


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [TP2, SP, {"dp": 2}], ids=["tp2", "tp2+sp", "dp2"])
@pytest.mark.parametrize(
    ("kind", "objective"),
    [("llama", FLOWRL), ("llama", GRPO), ("llama-untied-rope", FLOWRL), ("qwen2", FLOWRL), ("qwen3", FLOWRL)],
    ids=["llama-flowrl", "llama-grpo", "untied", "qwen2", "qwen3"],
)
def test_every_layout_computes_the_same_step(kind, objective, layout, alone, tiny_model, ranks2):
    """With dp = 2 the ranks hold 3 and 4 sequences in unlike numbers of micro-batches: only the number of sequences
    as normaliser gives the same gradient."""
    recorded, wanted = alone(kind, objective)
    results = ranks2.run(update, tiny_model(kind), recorded, objective=objective, batch=BATCH, parallel=layout)
    assert len({found.micro_batches for found in results}) == (2 if "dp" in layout else 1)
    for found in results:
        error, name = difference(found, wanted)
        assert error < TOLERANCE, name
        assert found.replica_difference == 0.0, "replicas that get unlike gradients drift apart"


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("kind", "layout"),
    [("llama", TP2), ("llama", SP), ("qwen3", TP2), ("llama", {"dp": 2})],
    ids=["tp2", "tp2+sp", "tp2-qk-norm", "dp2"],
)
def test_leaving_out_any_sum_over_ranks_is_seen(kind, layout, alone, tiny_model, ranks2):
    """The comparison above has teeth: without any one of the step's all-reduces and reduce-scatters it fails."""
    recorded, wanted = alone(kind, FLOWRL)
    sections = {"objective": FLOWRL, "batch": {"tokens_per_microbatch": 1000}, "parallel": layout}
    runs = zip(*ranks2.run(updates_short_of_one, tiny_model(kind), recorded, **sections), strict=True)
    *broken, complete = [max(max(difference(r, wanted)[0], r.replica_difference) for r in both) for both in runs]
    assert complete < TOLERANCE
    assert len(broken) >= 3
    for number, error in enumerate(broken):
        assert error > 1000 * TOLERANCE, f"sum {number} of {len(broken)} is not seen"
