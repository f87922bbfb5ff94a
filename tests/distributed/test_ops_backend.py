"""`ops.backend` is a matter of speed and memory: the whole trainer computes the same with every kernel."""

from __future__ import annotations

import pytest
from on_ranks import step_by_updates

SECTIONS = {
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 12},
    "objective": {"name": "flowrl", "beta": 2.0},
    "optimizer": {"lr": 1e-3, "warmup_steps": 0},
    "batch": {"mini_batch": 8, "tokens_per_microbatch": 40},
}


@pytest.mark.ranks
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"tp": 2, "sequence_parallel": True}], ids=["tp1", "tp2", "tp2+sp"])
@pytest.mark.parametrize("kind", ["llama", "llama-untied-rope"])
def test_native_and_torch_kernels_train_alike(kind, layout, tiny_model, ranks1, ranks2):
    """Two steps of two updates each, rollouts included."""
    pool = ranks2 if layout else ranks1
    model = tiny_model(kind, vocab=14)
    native, plain = (
        pool.run(step_by_updates, model, steps=2, parallel=layout, ops={"backend": backend}, **SECTIONS)[0]
        for backend in ("native", "torch")
    )
    assert len(native) == len(plain) == 4
    for found, wanted in zip(native, plain, strict=True):
        for name in ("loss/policy", "policy/grad_norm", "loss/log_z", "policy/entropy", "policy/mean_logp"):
            assert found[name] == pytest.approx(wanted[name], rel=1e-5), name
