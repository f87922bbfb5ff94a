"""Transformer Engine's layers and FP8, against the local spec and float64: on a GPU where there is one, else its own
Python with its native part emulated on the CPU (transformer_engine_emulation/).

Bounds are multiples of what bf16 itself costs the local spec, measured in the same test. A value has a relative
rounding of 2^-9 in bf16, 2^-12 in TF32 (what Transformer Engine makes of fp32), 2^-4 in e4m3 and 2^-3 in e5m2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import on_te
import pytest
import torch
from on_te import LENGTHS, LOCAL, LOCAL32, SIZES, TE, TE32, error, relative
from tiny_models import in_float64, make, random_sequences, response_logits

from flowrl_mega.model.fp8_gate import METRICS

pytestmark = pytest.mark.ranks

RECIPES = ["delayed", "tensorwise", "blockwise"]
HEAD = {"qwen3": {"head_dim": 64}}
more = pytest.mark.integration  # than make test has time for: the other model, the other recipes
BOTH = [pytest.param("qwen3", id="qwen3"), pytest.param("llama", id="llama", marks=more)]


def in_make_test(*chosen: str) -> list[Any]:
    return [pytest.param(recipe, marks=() if recipe in chosen else more) for recipe in ("off", *RECIPES)]


@pytest.fixture
def gpu(te_ranks1):
    """Runs a function on one rank."""
    return lambda function, *args: te_ranks1.run(function, *args, timeout=240)[0]


@pytest.fixture(scope="module", params=BOTH)
def folder(request, tmp_path_factory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param), **SIZES, **HEAD.get(request.param, {}))


def exact(folder: Path) -> list[np.ndarray]:
    """transformers' log-probs in float64."""
    model, found = in_float64(folder), []
    for s in random_sequences(LENGTHS):
        with torch.no_grad():
            logp = response_logits(model, s.prompt, s.response).log_softmax(-1)
        found.append(logp.gather(1, torch.tensor(s.response)[:, None])[:, 0].numpy())
    return found


def te_model(gpu: Any, recipe: str) -> dict[str, Any]:
    """Settings; skips what the GPU cannot do."""
    if recipe == "off":
        return TE
    support = gpu(on_te.support, recipe)
    if not support.usable:
        pytest.skip(support.why)
    return {**TE, "fp8": recipe}


def test_log_probs(gpu, folder) -> None:
    """Rotary positions, packing and every weight's place: a mistake in any is far beyond rounding."""
    wanted = exact(folder)
    assert error(gpu(on_te.scores, folder, LOCAL32), wanted) < 1e-4
    bf16 = error(gpu(on_te.scores, folder, LOCAL), wanted)
    assert error(gpu(on_te.scores, folder, TE), wanted) < 2 * bf16
    assert error(gpu(on_te.scores, folder, TE32), wanted) < bf16 / 2


def test_the_layers_are_fused_ones(gpu, folder) -> None:
    """As Transformer Engine names them; the embedded engine finds its weights under those names, too."""
    names = gpu(on_te.parameters, folder, TE)
    assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
    assert "decoder.layers.0.input_layernorm.weight" not in names
    assert np.array_equal(gpu(on_te.decoded, folder, TE32), gpu(on_te.decoded, folder, LOCAL32))
    assert gpu(on_te.fused_gradients, folder, TE) == [True, False, True]


def test_gradients(gpu, folder) -> None:
    """Added up over two backward passes by the GEMMs themselves."""
    wanted = gpu(on_te.gradients, folder, LOCAL32)
    bf16 = relative(gpu(on_te.gradients, folder, LOCAL), wanted)
    assert relative(gpu(on_te.gradients, folder, TE), wanted) < 2 * bf16
    assert relative(gpu(on_te.gradients, folder, TE32), wanted) < bf16 / 2


@pytest.mark.parametrize("recipe", in_make_test("tensorwise")[1:])
def test_fp8_log_probs_and_gradients(recipe, gpu, folder) -> None:
    """Coarser than bf16, so FP8 is on, and by no more than its rounding is coarser; also where gradients are too small
    for e5m2 without a scale."""
    wanted, model = exact(folder), te_model(gpu, recipe)
    bf16, fp8 = error(gpu(on_te.scores, folder, TE), wanted), error(gpu(on_te.scores, folder, model), wanted)
    assert bf16 < fp8 < 16 * bf16
    right = gpu(on_te.gradients, folder, LOCAL32)
    bf16 = relative(gpu(on_te.gradients, folder, TE), right)
    fp8 = relative(gpu(on_te.gradients, folder, model, 2.0**-20), right)
    assert bf16 < fp8 < 16 * bf16


@pytest.mark.parametrize("recipe", in_make_test("delayed")[1:])
def test_the_gate_really_compares_with_bf16(recipe, gpu, folder, record_property) -> None:
    """Switched off, FP8 leaves the very bits of a policy without it; switched on again, those of before."""
    found = gpu(on_te.gated, folder, te_model(gpu, recipe))
    record_property("figures", found["figures"])
    print(recipe, found["figures"])
    for a, b in zip(found["bf16"], gpu(on_te.scores, folder, TE), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(found["fp8"], found["again"], strict=True):
        assert np.array_equal(a, b)
    sums = [abs(float((a - b).sum())) for a, b in zip(found["fp8"], found["bf16"], strict=True)]
    assert found["figures"][METRICS[0]] == pytest.approx(np.mean(sums), rel=1e-5)
    assert found["figures"]["fp8/residual_diff"] > 0


@pytest.mark.parametrize("recipe", in_make_test())
def test_checkpoints_load_under_the_local_spec(recipe, gpu, folder, tmp_path) -> None:
    """The weights of a policy that was trained for two updates in this precision."""
    trained = gpu(on_te.train, folder, tmp_path, te_model(gpu, recipe), {})
    assert_equal(gpu(on_te.loaded_as_model, folder, tmp_path, LOCAL), trained.saved)


@pytest.mark.parametrize(
    ("recipe", "kept"),
    [
        pytest.param("off", {}, id="bf16", marks=more),
        pytest.param("off", {"offload": True}, id="offload", marks=more),
        pytest.param("off", {"distributed": True}, id="distributed", marks=more),
        pytest.param("delayed", {}, id="delayed", marks=more),
        pytest.param("tensorwise", {}, id="tensorwise", marks=more),
        pytest.param("tensorwise", {"distributed": True, "fp8_params": True}, id="weights in FP8"),
        pytest.param("delayed", {"distributed": True, "fp8_params": True}, id="weights in FP8, delayed", marks=more),
        pytest.param("blockwise", {"distributed": True, "fp8_params": True}, id="weights in FP8 blocks", marks=more),
    ],
)
def test_a_resumed_run_makes_the_same_update(recipe, kept, gpu, folder, tmp_path) -> None:
    """With Transformer Engine's FusedAdam, whose count of steps is its own, wherever moments and weights are kept."""
    kept = dict(kept)
    model = {**te_model(gpu, recipe), "fp8_params": kept.pop("fp8_params", False)}
    through = gpu(on_te.train, folder, tmp_path, model, kept)
    again = gpu(on_te.go_on, folder, tmp_path, model, kept)
    assert_equal(again.saved, through.saved)
    for name, tensor in through.after.items():
        assert np.abs(tensor - again.after[name]).max() <= 2**-8 * np.abs(tensor).max(), name
    moved = {name: through.after[name] - through.saved[name] for name in through.after}
    assert all(np.abs(step).max() > 0 for step in moved.values())


@pytest.mark.parametrize("kept", [{}, pytest.param({"distributed": True}, marks=more)], ids=["whole", "distributed"])
@pytest.mark.parametrize("precision", ["bf16", pytest.param("tensorwise", marks=more)])
@pytest.mark.parametrize("first", ["local", "te"])
def test_a_run_goes_on_with_the_other_layers(first, precision, kept, gpu, folder, tmp_path) -> None:
    """model.spec: auto changes sides when Transformer Engine is installed, or a run moves to a machine without: the
    same weights and moments, so that the next update differs by rounding."""
    te = te_model(gpu, "off" if precision == "bf16" else precision)
    before, after = (LOCAL, te) if first == "local" else (te, LOCAL)
    through = gpu(on_te.train, folder, tmp_path, before, kept)
    again = gpu(on_te.go_on, folder, tmp_path, after, kept)
    assert_equal(again.saved, through.saved)
    steps = [{name: run.after[name] - run.saved[name] for name in run.after} for run in (again, through)]
    assert relative(*steps) < (0.2 if precision == "bf16" else 0.6)


@more
@pytest.mark.parametrize("first", ["without", "with"])
def test_a_run_goes_on_where_there_is_no_transformer_engine(first, gpu, folder, ranks1, tmp_path) -> None:
    """Nor its FusedAdam: torch's AdamW goes on with its moments, and the other way round."""

    def without(function, *args):
        return ranks1.run(function, *args)[0]

    if gpu(on_te.support, "tensorwise") == without(on_te.support, "tensorwise"):
        pytest.skip("there is one in all processes here")
    one, other = ((without, LOCAL), (gpu, TE)) if first == "without" else ((gpu, TE), (without, LOCAL))
    through = one[0](on_te.train, folder, tmp_path, one[1], {})
    again = other[0](on_te.go_on, folder, tmp_path, other[1], {})
    assert_equal(again.saved, through.saved)
    steps = [{name: run.after[name] - run.saved[name] for name in run.after} for run in (again, through)]
    assert relative(*steps) < 0.2


def assert_equal(found: on_te.Tensors, wanted: on_te.Tensors) -> None:
    assert found.keys() == wanted.keys()
    assert all(np.array_equal(found[name], wanted[name]) for name in wanted)
