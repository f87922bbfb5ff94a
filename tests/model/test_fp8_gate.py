"""The FP8 gate on real perturbations: linear layers whose outputs are rounded to float8_e4m3 while FP8 is on.

Megatron's own switch says whether it is on (`config.fp8`, which a layer asks at each forward); without Transformer
Engine Megatron itself then computes as before, so that all of the difference is the rounding.
"""

from __future__ import annotations

import json
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
from jobs import Job, write_config
from tiny_models import in_float64, random_sequences, response_logits
from torch import Tensor

from flowrl_mega.config import RunError
from flowrl_mega.model.fp8_gate import METRICS, Fp8Gate, differences, in_bf16
from flowrl_mega.model.policy import Policy, PolicyOutput
from flowrl_mega.parallel.packing import PackedBatch, split_data_parallel
from flowrl_mega.train import Trainer

LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (12, 30)]
LINEAR = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")


def perturb(policy: Policy) -> None:
    """Round what the linear layers give while FP8 is on. One scale for all, so that a value is rounded alike in every
    layout; it lets in what is below 7."""

    def rounded(module: Any, inputs: Any, output: tuple[Tensor, Any]) -> Any:
        if policy.stages[0].config.fp8 is None:
            return output
        exact = output[0].detach()
        off = (exact * 64).to(torch.float8_e4m3fn).to(exact.dtype) / 64 - exact
        return (output[0] + off, *output[1:])

    for name, module in policy.stages[0].gpt.named_modules():
        if name.endswith(LINEAR):
            module.register_forward_hook(rounded)


def build(path: Path, parallel: dict[str, Any] | None = None, log_z: Any = "mlp", **model: Any) -> Policy:
    settings = {"path": str(path), "fp8": "tensorwise", **model}
    policy = on_ranks.build(path, log_z, model=settings, parallel=parallel or {})
    assert policy.stages[0].config.fp8 == "hybrid"
    perturb(policy)
    return policy


def gate_of(policy: Policy, length_norm: bool = True, **model: Any) -> Fp8Gate:
    settings = on_ranks.config_for("model", model={"path": "model", "fp8": "tensorwise", **model}).model
    return Fp8Gate(policy, settings, length_norm)


def measured(policy: Policy, batch: PackedBatch, temperature: float = 1.0, **options: Any) -> dict[str, float]:
    gate = gate_of(policy, fp8_budget=1e9, **options)
    gate.before_training(1, batch, temperature)
    return gate.after_step(1, batch, temperature)


def outputs(path: Path, log_z: Any, length_norm: bool, temperature: float) -> dict[str, Any]:
    """The gate's figures, and what the two passes gave each by itself; FP8's on either side of the gate."""
    policy = build(path, log_z=log_z)
    batch = on_ranks.packed(policy, random_sequences(LENGTHS))
    before = policy.score([batch], temperature)[0]
    figures = measured(policy, batch, temperature, length_norm=length_norm)
    after = policy.score([batch], temperature)[0]
    with in_bf16(policy):
        exact = policy.score([batch], temperature)[0]
    same = torch.equal(before.logp, after.logp)
    order, parts = batch.index.tolist(), batch.response_cu_seqlens.tolist()
    found = {"figures": figures, "same": same, "order": order, "ends": parts}
    return {**found, "fp8": tuple(before), "bf16": tuple(exact), "fp8_is_on": policy.stages[0].config.fp8}


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("log_z", "length_norm", "temperature"), [("mlp", True, 1.0), ("mlp", False, 0.7), (None, True, 1.0)]
)
def test_figures_against_float64(log_z, length_norm, temperature, tiny_model, ranks1) -> None:
    """The pass without FP8 is transformers' in float64; the means are taken by hand, in numpy."""
    (found,) = ranks1.run(outputs, tiny_model("llama"), log_z, length_norm, temperature)
    model, sequences = in_float64(tiny_model("llama")), random_sequences(LENGTHS)
    rows = []
    for place, i in enumerate(found["order"]):
        s, (start, end) = sequences[i], found["ends"][place : place + 2]
        with torch.no_grad():
            exact = response_logits(model, s.prompt, s.response, temperature).log_softmax(-1)
        exact = exact.gather(1, torch.tensor(s.response)[:, None])[:, 0].numpy()
        assert np.abs(found["bf16"][0][start:end].double().numpy() - exact).max() < 2e-5
        d_sum = float(np.sum(found["fp8"][0][start:end].double().numpy() - exact))
        d_z = 0.0 if log_z is None else float(found["fp8"][2][place].double() - found["bf16"][2][place].double())
        rows.append((abs(d_sum), abs(d_z + d_sum / (len(s.response) if length_norm else 1)), abs(d_z)))
    wanted = np.mean(np.array(rows), axis=0)
    assert list(found["figures"]) == list(METRICS)
    assert list(found["figures"].values()) == pytest.approx(wanted, abs=2e-5 * max(len(s.response) for s in sequences))
    assert found["figures"]["fp8/residual_diff"] > 1e-3, "the rounding must be seen"
    assert found["same"] and found["fp8_is_on"] == "hybrid", "the gate leaves no trace"


def test_differences_do_not_cancel_between_sequences() -> None:
    """Two sequences that drift apart as much as each other are a drift; so are a log Z and log-probs of other signs."""
    logp, log_z, ends = torch.tensor([-1.0, -2.0, -3.0]), torch.tensor([0.5, 0.5]), torch.tensor([0, 2, 3])
    one = PolicyOutput(logp, logp, log_z)
    other = PolicyOutput(logp + torch.tensor([0.25, 0.25, -0.5]), logp, log_z + torch.tensor([1.0, -1.0]))
    assert differences(one, other, ends).tolist() == [1.0, 1.25 + 1.5, 2.0, 2.0]
    assert differences(other, one, ends, length_norm=False).tolist() == [1.0, 1.5 + 1.5, 2.0, 2.0]
    assert differences(one, one, ends).tolist() == [0.0, 0.0, 0.0, 2.0]


def figures_of_ranks(path: Path, parallel: dict[str, Any], alone: bool) -> tuple[dict[str, float], int]:
    """The gate's figures, each data-parallel rank with sequences of its own (`alone`: all of them)."""
    policy = build(path, parallel)
    layout, sequences = policy.layout, random_sequences(LENGTHS)
    mine = sequences if alone else split_data_parallel(sequences, layout.dp)[layout.dp_rank]
    batch = on_ranks.packed(policy, mine)
    return measured(policy, batch), batch.size


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [{"dp": 2}, {"tp": 2}, {"pp": 2}], ids=["dp2", "tp2", "pp2"])
def test_ranks_agree_on_the_mean_over_all_their_sequences(parallel, tiny_model, ranks1, ranks2) -> None:
    """Ranks that came to different verdicts would wait for each other for ever."""
    ((whole, size),) = ranks1.run(figures_of_ranks, tiny_model("llama"), {}, True)
    (first, one), (second, other) = ranks2.run(figures_of_ranks, tiny_model("llama"), parallel, "dp" not in parallel)
    assert first == second
    assert one + other == size * (1 if "dp" in parallel else 2)
    for name in METRICS:
        assert first[name] == pytest.approx(whole[name], rel=1e-3)


def verdicts(path: Path) -> dict[str, Any]:
    policy, found = build(path), {}
    batch = on_ranks.packed(policy, random_sequences(LENGTHS))
    delta = measured(policy, batch)["fp8/residual_diff"]
    within, beyond = {"fp8_budget": delta * 1.01}, {"fp8_budget": delta * 0.99}

    gate = gate_of(policy, **within)
    gate.before_training(1, batch, 1.0)
    found["within"] = gate.fault, gate.on

    gate = gate_of(policy, **beyond)
    try:
        gate.before_training(1, batch, 1.0)
    except RunError as error:
        found["start"] = str(error)

    gate = gate_of(policy, **beyond, fp8_check_every=3)
    gate.started = True
    found["later"] = [(bool(gate.after_step(step, batch, 1.0)), bool(gate.fault)) for step in (1, 2, 3)]
    found["fault"] = gate.fault

    gate = gate_of(policy, **beyond, fp8_action="fallback")
    with in_bf16(policy):
        exact = policy.score([batch])[0].logp
    with redirect_stderr(StringIO()) as said:
        gate.before_training(1, batch, 1.0)
    found["said"] = said.getvalue()
    found["fallback"] = (
        gate.fault,
        gate.on,
        torch.equal(policy.score([batch])[0].logp, exact),
        policy.stages[0].config.fp8,
    )
    found["then"] = bool(gate.after_step(50, batch, 1.0)), gate.after_step(100, batch, 1.0)
    return found


@pytest.mark.ranks
def test_within_and_beyond_the_budget(tiny_model, ranks1) -> None:
    (found,) = ranks1.run(verdicts, tiny_model("llama"))
    assert found["within"] == ("", True)
    for message in (found["start"], found["fault"]):
        for part in (
            "nats a token, beyond model.fp8_budget = ",
            "model.fp8 = tensorwise",
            "model.fp8=off",
            "raise the",
        ):
            assert part in message
    assert found["start"].startswith("step 1: ") and found["fault"].startswith("step 3: ")
    assert found["start"].endswith("Nothing was trained in this precision")
    assert found["later"] == [(False, False), (False, False), (True, True)]
    assert found["fallback"] == ("", False, True, None), "the policy computes in bf16 from now on"
    assert found["then"] == (True, {}), "what was measured is still told once"
    assert found["said"].startswith("flowrl-mega: step 1: ") and found["said"].endswith("going on in bf16\n")


def broken(path: Path) -> str:
    policy = build(path)
    policy.stages[0].gpt.decoder.layers[0].mlp.linear_fc2.register_forward_hook(
        lambda module, inputs, output: (
            output if policy.stages[0].config.fp8 is None else (output[0] * torch.nan, output[1])
        )
    )
    gate = gate_of(policy, fp8_budget=1e9)
    gate.started = True
    batch = on_ranks.packed(policy, random_sequences(LENGTHS))
    gate.after_step(50, batch, 1.0)
    return gate.fault


@pytest.mark.ranks
def test_not_a_number_is_beyond_every_budget(tiny_model, ranks1) -> None:
    (fault,) = ranks1.run(broken, tiny_model("llama"))
    assert "is nan nats a token" in fault


def calibrated(path: Path, recipe: str) -> list[bool]:
    """Whether each forward of the start had gradients."""
    policy, forwards = build(path), []
    policy.stages[0].gpt.decoder.register_forward_pre_hook(lambda *_: forwards.append(torch.is_grad_enabled()))
    batch = on_ranks.packed(policy, random_sequences(LENGTHS))
    gate_of(policy, fp8=recipe, fp8_budget=1e9).before_training(1, batch, 1.0)
    return forwards


@pytest.mark.ranks
@pytest.mark.parametrize(("recipe", "wanted"), [("delayed", [True, False, False]), ("tensorwise", [False, False])])
def test_delayed_scales_are_made_before_they_are_judged(recipe, wanted, tiny_model, ranks1) -> None:
    """Transformer Engine makes them of forwards with gradient only; without one they are all 1."""
    assert ranks1.run(calibrated, tiny_model("llama"), recipe) == [wanted]


def off(path: Path) -> tuple[Any, ...]:
    policy = on_ranks.build(path, "mlp")
    batch = on_ranks.packed(policy, random_sequences(LENGTHS))
    gate = gate_of(policy, fp8="off")
    policy.stages[0].gpt.decoder.register_forward_pre_hook(lambda *_: pytest.fail("a forward for nothing"))
    gate.before_training(1, batch, 1.0)
    return gate.after_step(50, batch, 1.0), gate.fault


@pytest.mark.ranks
def test_without_fp8_nothing_is_computed(tiny_model, ranks1) -> None:
    assert ranks1.run(off, tiny_model("llama")) == [({}, "")]


def rounding() -> None:
    """In a rank of a job: its policy rounds, and from the third update on it is broken."""
    init, update, done = Policy.__init__, Trainer.update, []

    def perturbed(self: Policy, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        perturb(self)

    def counted(self: Trainer, mini_batch: Any) -> dict[str, float]:
        done.append(1)
        if len(done) == 3:
            policy = self.models.policy
            layer = policy.stages[0].gpt.decoder.layers[1].mlp.linear_fc2
            layer.register_forward_hook(
                lambda module, inputs, output: (output[0] * (30 if policy.stages[0].config.fp8 else 1), output[1])
            )
        return update(self, mini_batch)

    Policy.__init__, Trainer.update = perturbed, counted  # type: ignore[method-assign]


@pytest.mark.ranks
def test_a_run_ends_with_a_checkpoint_of_the_step(tiny_model, tmp_path: Path) -> None:
    """Exit code 70 and one message; the figures of every comparison are in the metrics."""
    config = write_config(tmp_path, tiny_model("llama", vocab=15), checkpoint={"every": 0})
    settings = ["--model.fp8=tensorwise", "--model.dtype=bf16", "--model.fp8_check_every=2", "--model.fp8_budget=0.2"]
    arguments = ["train", str(config), *settings, "--checked"]  # no look for a GPU
    job = Job(arguments, tmp_path / "log", before=f"{Path(__file__).stem}:rounding")
    assert job.wait() == [70, 70], job.log.read_text()
    assert "step 2: mean |FP8 - bf16| of the residual is" in job.log.read_text()
    assert "Traceback" not in job.log.read_text()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    first, second = ([row[name] for name in METRICS] for row in rows)
    assert first[1] < 0.2 < second[1] and min(first) > 0
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").iterdir()] == ["step_2"]
