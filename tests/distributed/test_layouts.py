"""The layout is a setting, never a change of result: old and reference log-probs, loss, gradients, clipping and the
optimizer, on recorded rollouts, in the layouts that four ranks can hold, against one rank.

Four ranks are started once and walk all layouts. That the tolerance is tight enough to see a mistake is shown by
leaving out the sums over one process group at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from on_layouts import Trained, walk
from rank_pool import RankPool
from tiny_models import make, random_sequences

from flowrl_mega.experience import Experience
from flowrl_mega.parallel.backends import transformer_engine
from flowrl_mega.rewards.load import Score
from flowrl_mega.rollout import Rollout

pytestmark = [pytest.mark.ranks, pytest.mark.timeout(600)]  # the walk is one fixture
TOLERANCE = 1e-5
LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (2, 12), (6, 3), (5, 5), (7, 1), (3, 16), (9, 4), (1, 8)]
# Raw rewards: residuals of zero mean would make the gradient of log Z's last biases a difference of near-equal sums,
# whose rounding says nothing of the layout.
FLOWRL = {"name": "flowrl", "beta": 3.0, "tis": "mean", "reward_norm": "none"}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}


def case(kind: str = "llama", budget: int = 40, recompute: dict[str, Any] | None = None, **parallel: Any) -> Any:
    """Two updates a step of 6 sequences each; 40 rows a micro-batch make several of unlike size."""
    sp = "+sp" if parallel.get("sequence_parallel") else ""
    sizes = "".join(f"{name}{parallel.get(name, 1)}" for name in ("tp", "pp", "cp", "dp") if name in parallel)
    vpp = f"+vpp{parallel['vpp']}" if "vpp" in parallel else ""
    again = f"+{recompute['recompute_granularity']}" if recompute else ""
    sections = {"parallel": parallel, "batch": {"mini_batch": 6, "tokens_per_microbatch": budget}}
    return pytest.param(kind, sections | {"megatron": recompute or {}}, id=f"{kind}-{sizes}{sp}{vpp}{again}-{budget}")


SP = {"sequence_parallel": True}
GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
if GPUS and GPUS < 4:
    pytest.skip("four ranks need four GPUs, or none", allow_module_level=True)
CASES = [
    case(tp=4, pp=1, dp=1, **SP),
    case(tp=1, pp=4, dp=1),
    case(tp=1, pp=1, dp=4),
    case(tp=2, pp=2, dp=1),
    case(tp=2, pp=2, dp=1, **SP),
    case(tp=2, pp=1, dp=2, **SP),
    case(tp=1, pp=2, dp=2),
    case(tp=1, pp=2, dp=2, vpp=2),
    case(tp=2, pp=2, dp=1, vpp=2, **SP),
    case(tp=1, pp=2, dp=2, budget=1000),  # one micro-batch: the pipeline is never full
    case(tp=2, pp=2, dp=1, budget=1, **SP),  # one sequence each, the smallest padded to tp
    case(tp=2, pp=2, dp=1, recompute=FULL, **SP),
    case(tp=2, pp=1, dp=2, recompute=SELECTIVE, **SP),
    case(tp=1, pp=1, cp=4, dp=1),
    case(tp=2, pp=1, cp=2, dp=1, **SP),
    case(tp=1, pp=2, cp=2, dp=1, budget=20),
    case("qwen2", tp=2, pp=2, dp=1, **SP),
    case("qwen3", tp=2, pp=2, dp=1, **SP),
    case("llama-untied-rope", tp=2, pp=2, dp=1, **SP),
]
MODELS = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
COMMON = {
    "objective": FLOWRL,
    "rollout": {"prompts_per_step": 3, "group_size": 4},
    "optimizer": {"lr": 2e-3, "warmup_steps": 0},
}


def recorded(step: int) -> Experience:
    """12 rollouts of three prompts' groups; the engine's log-probs are made up, near those of a random model."""
    draw = torch.Generator().manual_seed(step)
    sequences = random_sequences(LENGTHS, seed=step)
    rollouts = [
        Rollout(
            s.response,
            (-5 + 0.3 * torch.randn(len(s.response), generator=draw)).tolist(),
            "stop",
            [(0, len(s.response))],
        )
        for s in sequences
    ]
    scores = [Score(reward, "", False) for reward in torch.rand(len(sequences), generator=draw).tolist()]
    return Experience(sequences, rollouts, scores)


STEPS = [recorded(step) for step in range(2)]


@pytest.fixture(scope="module")
def ranks4() -> Iterator[RankPool]:
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    kinds = dict.fromkeys(param.values[0] for param in CASES)
    return {kind: make(kind, tmp_path_factory.mktemp(kind), **MODELS) for kind in kinds}


@pytest.fixture(scope="module")
def alone(models: dict[str, Path], ranks1: RankPool) -> dict[str, Trained]:
    """One rank's, on micro-batches of another size, so that packing is compared too."""
    sections = COMMON | {"batch": {"mini_batch": 6, "tokens_per_microbatch": 64}}
    return {kind: ranks1.run(walk, path, STEPS, [sections])[0][0] for kind, path in models.items()}


@pytest.fixture(scope="module")
def walked(models: dict[str, Path], ranks4: RankPool) -> dict[str, list[Trained]]:
    """What each rank found in each case, by the case's id."""
    found: dict[str, list[Trained]] = {}
    for kind, path in models.items():
        cases = {param.id: COMMON | param.values[1] for param in CASES if param.values[0] == kind}
        by_rank = ranks4.run(walk, path, STEPS, list(cases.values()), timeout=500)
        found |= {name: [rank[place] for rank in by_rank] for place, name in enumerate(cases)}
    return found


def differences(found: Trained, wanted: Trained) -> dict[str, float]:
    """The largest difference of each quantity; a gradient's relative to its tensor's largest."""
    assert found.gradients.keys() == wanted.gradients.keys()
    assert [m.keys() for m in found.metrics] == [m.keys() for m in wanted.metrics]
    largest = max(g.abs().max().item() for g in wanted.gradients.values())
    worst = {}
    for name, g in wanted.gradients.items():
        # A key's bias moves all scores of a query alike, which softmax does not see: its true gradient is 0.
        scale = largest if name.endswith("k_proj.bias") else g.abs().max().item()
        worst[f"gradient of {name}"] = (found.gradients[name] - g).abs().max().item() / scale
    for name in ("old_logp", "ref_logp", "log_z"):
        pairs = zip(getattr(found, name), getattr(wanted, name), strict=True)
        worst[name] = max((a.sum() - b.sum()).abs().item() / max(1.0, b.sum().abs().item()) for a, b in pairs)
    known = ~wanted.residuals.isnan()
    assert torch.equal(~found.residuals.isnan(), known) and known.any() and not known.all(), "of the first update"
    apart = (found.residuals - wanted.residuals)[known].abs().max().item()
    worst["residuals"] = apart / max(1.0, wanted.residuals[known].abs().max().item())
    sums = max(logp.sum().abs().item() for logp in wanted.old_logp)
    for update, metrics in enumerate(wanted.metrics):
        for name, value in metrics.items():
            # Differences: of an answer's log-prob before and after, of the squared residual with and without drift.
            scales = {
                "policy/max_abs_log_ratio": sums,
                "mismatch/residual_sq_change": metrics["loss/residual_sq"],
            }
            scale = max(1.0, scales.get(name, abs(value)))
            worst[f"{name} of update {update}"] = abs(found.metrics[update][name] - value) / scale
    return worst


@pytest.mark.parametrize(("kind", "sections"), CASES)
def test_every_layout_trains_alike(
    kind: str, sections: Any, request: pytest.FixtureRequest, walked: dict[str, list[Trained]], alone: Any
):
    """Three steps of two updates: the first update's gradients element by element, all that is logged of every one."""
    for found in walked[request.node.callspec.id]:
        worst = differences(found, alone[kind])
        name = max(worst, key=lambda key: worst[key])
        assert worst[name] < TOLERANCE, name
        assert found.replica_difference == 0.0, "replicas that get unlike gradients drift apart"


TE = {"model": {"dtype": "bf16", "spec": "te"}}
TE_LAYOUTS: list[dict[str, Any]] = [
    {"tp": 2, "cp": 2, **SP},
    {"cp": 4},
    {"pp": 2, "cp": 2},
    {"tp": 2, "pp": 2, **SP},
]


@pytest.mark.skipif(not transformer_engine().usable or GPUS < 4, reason="needs Transformer Engine and four GPUs")
@pytest.mark.parametrize("parallel", TE_LAYOUTS, ids=lambda layout: "".join(f"{k}{v}" for k, v in layout.items()))
def test_transformer_engine_trains_alike_in_every_layout(
    parallel: Any, models: Any, ranks4: RankPool, ranks1: RankPool
):
    """In bf16, whose roundings (2^-8) each layout makes elsewhere: all within ten of them. A missing sum over ranks is
    a factor of two. Not run yet."""
    batch, path = {"mini_batch": 6, "tokens_per_microbatch": 40}, models["llama-untied-rope"]
    model = TE["model"] | {"path": str(path)}
    sections = COMMON | {"batch": batch, "model": model}
    (wanted,) = ranks1.run(walk, path, STEPS[:1], [sections])[0]
    for (found,) in ranks4.run(walk, path, STEPS[:1], [sections | {"parallel": parallel}], timeout=240):
        worst = differences(found, wanted)
        name = max(worst, key=lambda key: worst[key])
        assert worst[name] < 10 * 2**-8, name
        assert found.replica_difference == 0.0


def test_the_recorded_steps_exercise_what_they_should(alone: dict[str, Trained]):
    """Weights neither all 1 nor all clipped, gradients that are clipped, and a policy that moves."""
    metrics = alone["llama"].metrics
    assert 0 < metrics[1]["policy/clip_fraction"] < 1 and metrics[0]["policy/grad_norm"] > 1
    assert abs(metrics[-1]["loss/policy"] - metrics[0]["loss/policy"]) > 0.1


@pytest.mark.parametrize("group", ["tp", "dp", "cp", "dp_cp", "embd", "mp"])
def test_leaving_out_the_sums_of_a_group_is_seen(group: str, models: Any, ranks4: RankPool, alone: Any):
    """The comparison above has teeth. embd: the tied embedding's two copies; mp: the gradient's norm."""
    parallel = {"dp": {"pp": 2, "dp": 2}, "cp": {"cp": 2, "dp": 2}, "dp_cp": {"cp": 2, "dp": 2}}
    parallel = parallel.get(group, {"tp": 2, "pp": 2})
    sections = COMMON | {"parallel": parallel, "batch": {"mini_batch": 6, "tokens_per_microbatch": 40}}
    broken = [found for (found,) in ranks4.run(walk, models["llama"], STEPS[:1], [sections], group)]
    wanted = alone["llama"]._replace(metrics=alone["llama"].metrics[:2])
    worst = max(max(differences(found, wanted).values()) for found in broken)
    assert worst > 1000 * TOLERANCE
