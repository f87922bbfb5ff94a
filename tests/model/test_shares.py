"""`optimizer.distributed: auto`: on where Transformer Engine is there, with checkpoints that are the same without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_shares import Trained, contents, gone_on, saved, saved_again
from on_te import SIZES, TE, TE32
from test_te_ranks import COMMON, STEP
from tiny_models import make

pytestmark = [pytest.mark.ranks, pytest.mark.integration]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("qwen3"), head_dim=64, **SIZES)


def sections(folder: Path, run_dir: Path, dp: int, **optimizer: Any) -> dict[str, Any]:
    return COMMON | {
        "model": TE | {"path": str(folder)},
        "run_dir": str(run_dir),
        "parallel": {"dp": dp},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0, **optimizer},
    }


@pytest.fixture(scope="module")
def run(folder: Path, tmp_path_factory: pytest.TempPathFactory, te_ranks2) -> tuple[Path, list[Trained]]:
    run_dir = tmp_path_factory.mktemp("run")
    ranks = te_ranks2.run(saved, folder, STEP, sections(folder, run_dir, dp=2), timeout=240)
    return run_dir / "checkpoints" / "step_1", ranks


def close(one: list[dict[str, float]], other: list[dict[str, float]]) -> bool:
    """To what bf16 rounds elsewhere in another number of ranks."""
    names = ("loss/policy", "policy/grad_norm", "policy/entropy")
    return all(a[name] == pytest.approx(b[name], rel=2e-2) for a, b in zip(one, other, strict=True) for name in names)


def test_ranks_with_the_same_weights_share_the_moments(run, folder, tmp_path, te_ranks2) -> None:
    _, ranks = run
    assert all(rank.shares and rank.overlap for rank in ranks)
    whole = te_ranks2.run(saved, folder, STEP, sections(folder, tmp_path, dp=2, distributed=False), timeout=240)
    assert not whole[0].shares and close(ranks[0].metrics, whole[0].metrics)


@pytest.mark.parametrize("dp", [2, 1])
def test_a_resumed_run_goes_on(dp, run, folder, tmp_path, te_ranks1, te_ranks2) -> None:
    """On one rank alone with whole moments."""
    checkpoint, ranks = run
    pool = te_ranks2 if dp == 2 else te_ranks1
    found, *_ = pool.run(gone_on, folder, STEP, sections(folder, tmp_path, dp), checkpoint, timeout=240)
    assert found.shares == (dp == 2)
    assert found.metrics == ranks[0].metrics if dp == 2 else close(found.metrics, ranks[0].metrics)


@pytest.mark.parametrize(
    "model",
    [TE, TE32, pytest.param(TE | {"fp8": "tensorwise", "fp8_params": True}, id="fp8_params")],
    ids=lambda model: model["dtype"],
)
def test_shared_and_whole_moments_are_saved_alike(model, folder, tmp_path, te_ranks1, te_ranks2) -> None:
    """From shares to whole moments, on fewer ranks, and back: every tensor stays as it is, to the bit, and the count of
    updates. FP8 weights are quantised anew, from what bf16 has of them; the next update makes them of their masters."""
    model = model | {"path": str(folder), "fp8_budget": 1e9}
    whole = model | {"fp8_params": False}
    first, second, third = (tmp_path / name / "checkpoints" / "step_1" for name in ("first", "second", "third"))

    def at(path: Path, model: dict[str, Any], **more: Any) -> dict[str, Any]:
        return sections(folder, path.parents[1], **more) | {"model": model}

    te_ranks2.run(saved, folder, STEP, at(first, model, dp=2), timeout=240)
    assert te_ranks1.run(saved_again, folder, at(second, whole, dp=1), first, timeout=240) == [False]
    assert te_ranks2.run(saved_again, folder, at(third, model, dp=2), second, timeout=240) == [True, True]
    (wanted, updates), *others = (te_ranks1.run(contents, path)[0] for path in (first, second, third))
    kinds = {"exp_avg", "exp_avg_sq", *(["fp32_param"] if model["dtype"] == "bf16" else [])}
    assert updates == {2} and {name.split(".")[2] for name in wanted if name.startswith("optimizer.")} == kinds
    for found, counted in others:
        assert counted == updates and found.keys() == wanted.keys()
        kept = [name for name in wanted if name.startswith("optimizer.") or "fp8_params" not in model]
        assert [name for name in kept if not torch.equal(found[name], wanted[name])] == []
