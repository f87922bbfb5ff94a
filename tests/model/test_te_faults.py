"""The emulated Transformer Engine has teeth: faults in how it is driven and in what its layers do (te_faults.py), of
the kinds that a GPU would not tell of, are caught by the tests' own comparisons, or by what refuses them."""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import test_te_cuda
import test_te_ranks
import torch
from on_layouts import walk
from on_te import SIZES
from rank_pool import RankFailed, RankPool
from te_faults import FAULTS, planted
from test_te_ranks import SP, STEP, Trained, sections
from tiny_models import make

pytestmark = [
    pytest.mark.ranks,
    pytest.mark.integration,
    pytest.mark.skipif(torch.cuda.is_available(), reason="plants faults in emulated processes"),
]
Test = Callable[..., None]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("qwen3"), head_dim=64, **SIZES)


# The test of test_te_cuda.py that sees it, its arguments before `gpu`, and what is said where something refuses it.
SEEN: dict[str, tuple[Test, tuple[Any, ...], str]] = {
    "sequences that begin late": (test_te_cuda.test_log_probs, (), ""),
    "sequences that see each other": (test_te_cuda.test_log_probs, (), ""),
    "rotary gradients that are not turned back": (test_te_cuda.test_gradients, (), ""),
    "a GEMM that overwrites gradients": (test_te_cuda.test_gradients, (), ""),
    "an operand left in bf16": (
        test_te_cuda.test_fp8_log_probs_and_gradients, ("tensorwise",), "FP8 with FP8 only",
    ),
    "scales that are never renewed": (test_te_cuda.test_fp8_log_probs_and_gradients, ("delayed",), ""),
    "a transpose that is not renewed": (
        test_te_cuda.test_a_resumed_run_makes_the_same_update,
        ("tensorwise", {"distributed": True, "fp8_params": True}), "",
    ),
    "weights quantised once": (
        test_te_cuda.test_a_resumed_run_makes_the_same_update, ("tensorwise", {}), "",
    ),
    "FP8 that stays on": (test_te_cuda.test_the_gate_really_compares_with_bf16, ("tensorwise",), ""),
    "scales that are not trusted": (
        test_te_cuda.test_a_resumed_run_makes_the_same_update, ("delayed", {}), "Refusing to load pickled",
    ),
    "extra states that are asked for": (
        test_te_cuda.test_a_run_goes_on_with_the_other_layers, ("local", "bf16", {}), "does not fit these settings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", SEEN)
def test_a_fault_on_one_rank_is_caught(fault: str, te_ranks1: RankPool, folder: Path, tmp_path: Path) -> None:
    test, arguments, said = SEEN[fault]

    def gpu(function: Any, *args: Any) -> Any:
        return te_ranks1.run(planted, fault, function, *args, timeout=240)[0]

    given = {"gpu": gpu, "folder": folder, "tmp_path": tmp_path, "record_property": lambda *_: None}
    wanted = signature(test).parameters
    with pytest.raises(AssertionError, match=said or None) as caught:
        test(*arguments, **{name: value for name, value in given.items() if name in wanted})
    assert bool(said) == isinstance(caught.value, RankFailed)


TP2, CP2 = {"tp": 2, **SP}, {"cp": 2}


@pytest.mark.parametrize(
    ("fault", "precision", "parallel", "said"),
    [
        ("rows that are not aligned", "tensorwise", TP2, "divisible by 8"),
        ("an amax of one rank", "tensorwise", TP2, ""),
        ("the other half of the keys", "bf16", CP2, ""),
    ],
)
def test_a_fault_on_two_ranks_is_caught(fault, precision, parallel, said, folder, te_ranks1, te_ranks2) -> None:
    case = sections(folder, precision, parallel=parallel)

    def alone(precision: str) -> Trained:
        return te_ranks1.run(walk, folder, [STEP], [sections(folder, precision)], timeout=240)[0][0]

    with pytest.raises(AssertionError, match=said or None) as caught:
        jobs = te_ranks2.run(planted, fault, walk, folder, [STEP], [case], timeout=240)
        test_te_ranks.check(precision, jobs, alone)
    assert bool(said) == isinstance(caught.value, RankFailed)


def test_sums_left_out_are_seen(folder, te_ranks1, te_ranks2) -> None:
    """Over the tensor-parallel ranks: gradients of the norms, whose rows each rank has a share of."""
    case = sections(folder, "tensorwise", parallel=TP2)

    def alone(precision: str) -> Trained:
        return te_ranks1.run(walk, folder, [STEP], [sections(folder, precision)], timeout=240)[0][0]

    with pytest.raises(AssertionError) as caught:
        jobs = te_ranks2.run(walk, folder, [STEP], [case], "tp", timeout=240)
        test_te_ranks.check("tensorwise", jobs, alone)
    assert not isinstance(caught.value, RankFailed)


def test_every_fault_is_tried() -> None:
    on_two = {"rows that are not aligned", "an amax of one rank", "the other half of the keys"}
    assert FAULTS.keys() == SEEN.keys() | on_two
