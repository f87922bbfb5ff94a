"""`optimizer.distributed: auto`: on where Transformer Engine is there, and a resumed run as its checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from on_shares import Trained, gone_on, refused, saved
from on_te import SIZES, TE
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
def test_a_resumed_run_goes_on_as_it_was(dp, run, folder, tmp_path, te_ranks1, te_ranks2) -> None:
    """One rank alone would not share, but its checkpoint has."""
    checkpoint, ranks = run
    pool = te_ranks2 if dp == 2 else te_ranks1
    found, *_ = pool.run(gone_on, folder, STEP, sections(folder, tmp_path, dp), checkpoint, timeout=240)
    assert found.shares
    assert found.metrics == ranks[0].metrics if dp == 2 else close(found.metrics, ranks[0].metrics)


# settings of the optimizer -> what is said where Transformer Engine is there, and where it is not
CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "auto": ({}, "", "was saved with it; install that, or begin a new run with its weights (--model.path="),
    "on": ({"distributed": True}, "", "was saved with it; install that"),
    "off": ({"distributed": False}, *["optimizer.distributed = False: CHECKPOINT was saved with True"] * 2),
    "in CPU memory": ({"offload": True}, "optimizer.offload = True", "was saved with it"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_cannot_go_on_is_refused(case, run, folder, tmp_path, te_ranks1, ranks1) -> None:
    """Before a rank starts."""
    checkpoint, _ = run
    settings, *wanted = CASES[case]
    for pool, part in zip((te_ranks1, ranks1), wanted, strict=True):
        (said,) = pool.run(refused, folder, sections(folder, tmp_path, 1, **settings), 1, checkpoint)
        assert part.replace("CHECKPOINT", str(checkpoint)) in said if part else not said
        assert "\n" not in said
