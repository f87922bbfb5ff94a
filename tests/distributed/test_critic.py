"""PPO's critic: gradients against plain autograd through transformers, the same in every layout, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_critic import Learnt, head, learn
from rank_pool import RankPool
from tiny_models import in_float64, make, random_sequences, response_logits
from torch import Tensor

from flowrl_mega.experience import Experience
from flowrl_mega.rewards.load import Score
from flowrl_mega.rollout import Rollout

pytestmark = pytest.mark.ranks

TOLERANCE = 1e-5  # of a tensor's largest gradient
KL, GAMMA, LAM, VALUE_COEF = 0.3, 0.9, 0.8, 0.7
LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (2, 12), (6, 3), (5, 6)]
REWARDS = [1.0, 0.0, 0.5, -1.0, 0.0, 2.0, 1.0, 0.0]
PPO = {"name": "ppo", "kl_coef": KL, "gamma": GAMMA, "lam": LAM, "kl_target": 0.05, "kl_horizon": 80}
CRITICS: dict[str, dict[str, Any]] = {
    "own": {"optimizer": {"lr": 1e-2, "warmup_steps": 0}},
    "shared": {"trunk": "shared", "value_coef": VALUE_COEF, "optimizer": {"lr": 1e-2}},
}
SECTIONS: dict[str, Any] = {
    "steps": 4,
    "objective": PPO,
    "rollout": {"prompts_per_step": 4, "group_size": 2},
    "optimizer": {"lr": 2e-3, "warmup_steps": 0},
    "batch": {"mini_batch": 4, "tokens_per_microbatch": 40},
}
LAYOUTS = {"tp2+sp": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}, "dp2": {"dp": 2}, "cp2": {"cp": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tied: the critic has no lm-head, and so nothing that would be tied to its embedding."""
    return make("llama", tmp_path_factory.mktemp("model"), vocab=31)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("reference"), vocab=31, seed=1)


def recorded(seed: int) -> Experience:
    sequences = random_sequences(LENGTHS, seed=seed, vocab=31)
    rollouts = [Rollout(s.response, [-3.0] * len(s.response), "stop", [(0, len(s.response))]) for s in sequences]
    return Experience(sequences, rollouts, [Score(reward, "", False) for reward in REWARDS])


STEPS = [recorded(step) for step in range(2)]


@pytest.fixture(scope="module")
def alone(model: Path, reference: Path, ranks1: RankPool) -> dict[str, Learnt]:
    return {
        name: ranks1.run(learn, model, reference, STEPS, None, False, critic=critic, **SECTIONS)[0]
        for name, critic in CRITICS.items()
    }


def worst(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> tuple[float, str]:
    """The largest difference, in units of the tensor's largest element, and the tensor's name.

    The value head's bias, one number that is a sum of errors of both signs, counts as part of its weight.
    """
    assert found.keys() == wanted.keys()
    found, wanted = _joined(found), _joined(wanted)
    assert all(w.abs().max() > 0 for w in wanted.values())
    return max(((found[n] - w).abs().max().item() / w.abs().max().item(), n) for n, w in wanted.items())


def assert_alike(found: list[dict[str, float]], wanted: list[dict[str, float]]) -> None:
    """All that was logged of each update."""
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            # It is a difference of sums of log-probs around -60.
            assert ours[name] == pytest.approx(
                value, rel=2e-5, abs=6e-4 if name == "policy/max_abs_log_ratio" else 2e-5
            ), name


def _joined(gradients: dict[str, Tensor]) -> dict[str, Tensor]:
    if "value_head.bias" not in gradients:
        return gradients
    rest = dict(gradients)
    return rest | {"value_head.weight": torch.cat([rest["value_head.weight"][0], rest.pop("value_head.bias")])}


def expected(model: Path, reference: Path, trunk: str) -> tuple[dict[str, dict[str, Tensor]], dict[str, float]]:
    """Gradients and losses of the first update in float64, with PPO's formulas written out sequence by sequence.

    At the first update pi = pi_old and V = V_old: the ratio is 1 and neither clip acts.
    """
    policy, ref = in_float64(model), in_float64(reference)
    critic = policy if trunk == "shared" else in_float64(model)
    weight, bias = (x.double().requires_grad_() for x in head(32))
    values, logps, advantages, returns = [], [], [], []
    for sequence, reward in zip(STEPS[0].sequences, REWARDS, strict=True):
        prompt, response = sequence.prompt, sequence.response
        hidden = critic.model(torch.tensor([prompt + response])).last_hidden_state[0]
        value = (hidden @ weight[0] + bias)[len(prompt) - 1 : -1]  # before each token, not after it
        logp, ref_logp = (
            response_logits(m, prompt, response).log_softmax(-1)[range(len(response)), response] for m in (policy, ref)
        )
        rewards = (-KL * (logp - ref_logp)).detach()
        rewards[-1] += reward
        v, after, advantage = value.detach(), 0.0, [0.0] * len(response)
        for t in reversed(range(len(response))):
            following = v[t + 1] if t + 1 < len(response) else 0.0
            after = rewards[t] + GAMMA * following - v[t] + GAMMA * LAM * after
            advantage[t] = after
        values.append(value)
        logps.append(logp)
        advantages.append(torch.stack(advantage))
        returns.append(torch.stack(advantage) + v)
    everything = torch.cat(advantages)  # of the whole step, not of the update
    advantages = [(a - everything.mean()) / (everything.var() + 1e-8).sqrt() for a in advantages]
    first = range(4)  # the update's answers
    tokens = sum(len(logps[i]) for i in first)
    policy_loss = sum(-(logps[i] - logps[i].detach()).exp() @ advantages[i] for i in first) / tokens
    value_loss = sum((values[i] - returns[i]).square().sum() / 2 for i in first) / tokens
    (policy_loss + (VALUE_COEF if trunk == "shared" else 1) * value_loss).backward()
    of_head = {"value_head.weight": weight.grad, "value_head.bias": bias.grad}
    gradients = {"policy": {name: p.grad for name, p in policy.named_parameters()}}
    if trunk == "shared":
        gradients["policy"] |= of_head
    else:
        trunk_gradients = {n: p.grad for n, p in critic.named_parameters() if not n.startswith("lm_head")}
        gradients["critic"] = trunk_gradients | of_head
    return gradients, {"policy": policy_loss.item(), "critic": value_loss.item()}


@pytest.mark.parametrize("trunk", CRITICS)
def test_one_rank_computes_what_autograd_through_transformers_does(trunk, alone, model, reference):
    """The whole chain (scoring, KL in the reward, GAE, normalisation over the step, both losses) shares no code with
    its oracle. A critic of its own leaves the policy's gradient alone; one that shares the trunk does not."""
    gradients, losses = expected(model, reference, trunk)
    found, metrics = alone[trunk].gradients, alone[trunk].metrics[0]
    assert found.keys() == gradients.keys()
    for name, wanted in gradients.items():
        error, where = worst(found[name], wanted)
        assert error < TOLERANCE, f"{name}: {where}"
    if trunk == "own":
        assert metrics["loss/policy"] == pytest.approx(losses["policy"], rel=TOLERANCE, abs=1e-7)
        assert metrics["loss/critic"] == pytest.approx(losses["critic"], rel=TOLERANCE)
    else:
        assert metrics["loss/policy"] == pytest.approx(losses["policy"] + VALUE_COEF * losses["critic"], rel=TOLERANCE)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("trunk", CRITICS)
def test_every_layout_learns_alike(trunk, layout, alone, model, reference, ranks2):
    """Two steps of two updates: advantages are normalised over all ranks' tokens, losses divided by all ranks' number
    of tokens, and the value head is where the last stage is."""
    sections = SECTIONS | {"critic": CRITICS[trunk], "parallel": LAYOUTS[layout]}
    wanted = alone[trunk]
    for found in ranks2.run(learn, model, reference, STEPS, None, False, **sections):
        assert found.gradients.keys() == wanted.gradients.keys()
        for name, gradients in wanted.gradients.items():
            error, where = worst(found.gradients[name], gradients)
            assert error < TOLERANCE, f"{name}: {where}"
        assert_alike(found.metrics, wanted.metrics)
        assert found.kl_coef == pytest.approx(wanted.kl_coef, rel=1e-6)
    assert wanted.kl_coef != KL, "the coefficient is adapted"


@pytest.mark.parametrize(("trunk", "before", "after"), [("own", "tp2+sp", "pp2"), ("shared", "dp2", "tp2+sp")])
def test_a_resumed_critic_goes_on_as_it_would_have(
    trunk, before, after, alone, model, reference, ranks2, tmp_path: Path
):
    """Weights, moments, schedule and the adapted coefficient, in another layout: the step after the checkpoint is that
    of the run that was not stopped."""
    sections = SECTIONS | {"critic": CRITICS[trunk], "run_dir": str(tmp_path)}
    first, second = STEPS[:1], STEPS[1:]
    ranks2.run(learn, model, reference, first, None, True, parallel=LAYOUTS[before], **sections)
    checkpoint = tmp_path / "checkpoints" / "step_1"
    (found, _) = ranks2.run(learn, model, reference, second, checkpoint, False, parallel=LAYOUTS[after], **sections)
    assert_alike(found.metrics, alone[trunk].metrics[2:])
    assert found.kl_coef == pytest.approx(alone[trunk].kl_coef, rel=1e-6)


def test_the_critic_learns_first(alone, model, reference, ranks1):
    """In warm-up steps the critic fits its returns, and not a bit of the policy changes."""
    sections = SECTIONS | {"critic": {"warmup_steps": 2, "optimizer": {"lr": 1e-3, "warmup_steps": 0}}}
    (start,) = ranks1.run(learn, model, reference, [], None, False, **sections)
    (warm,) = ranks1.run(learn, model, reference, STEPS[:1] * 3, None, False, **sections)
    losses = [update["loss/critic"] for update in warm.metrics]
    assert "loss/policy" not in warm.metrics[3] and "loss/policy" in warm.metrics[4]
    assert losses[2] < losses[0] and losses[3] < losses[1]
    (before,) = ranks1.run(learn, model, reference, STEPS[:1] * 2, None, False, **sections)
    assert all(torch.equal(a, b) for a, b in zip(before.weights["policy"], start.weights["policy"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(before.weights["critic"], start.weights["critic"], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(warm.weights["policy"], start.weights["policy"], strict=True))


WHOLE_STEP: dict[str, dict[str, Any]] = {
    "reinforce_pp": {"name": "reinforce_pp", "kl_coef": KL},
    "flowrl-group": {"name": "flowrl", "beta": 3.0, "z": "group"},
    "flowrl-group-loo": {"name": "flowrl", "beta": 3.0, "z": "group", "z_leave_one_out": True},
}


@pytest.mark.parametrize("objective", WHOLE_STEP)
def test_what_an_objective_reads_of_the_whole_step(objective, model, reference, ranks1, ranks2):
    """A mean over the step's tokens, or over a group whose answers lie on several ranks, is one in every layout."""
    sections = SECTIONS | {"objective": WHOLE_STEP[objective]}
    (wanted,) = ranks1.run(learn, model, reference, STEPS, None, False, **sections)
    for layout in ("dp2", "pp2"):
        for found in ranks2.run(learn, model, reference, STEPS, None, False, parallel=LAYOUTS[layout], **sections):
            error, where = worst(found.gradients["policy"], wanted.gradients["policy"])
            assert error < TOLERANCE, where
            assert_alike(found.metrics, wanted.metrics)
