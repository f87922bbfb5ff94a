"""What `optimizer.offload` takes off the device, and that it changes no result."""

from __future__ import annotations

from typing import Any

import on_ranks
import pytest
import torch
from torch import Tensor

from flowrl_mega.config import ConfigError, OptimizerSettings
from flowrl_mega.parallel import backends
from flowrl_mega.parallel.offload import Offload
from flowrl_mega.parallel.optimizer import Optimizer, check_optimizer, decided, wrap

GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


def trained(path: Any, dtype: str, offload: bool) -> tuple[dict[str, Tensor], int, int]:
    """Weights after three updates; elements that lie elsewhere between updates; elements of all weights."""
    policy = on_ranks.build(path, log_z="mlp", model={"path": str(path), "dtype": dtype})
    settings = OptimizerSettings(lr=1e-2, warmup_steps=0, offload=offload)
    optimizer = Optimizer(wrap(policy.stages), settings, dtype == "bf16", total_updates=9)
    draw = torch.Generator().manual_seed(0)
    for _ in range(3):
        optimizer.zero_grad()
        for _, parameter in policy.named_parameters():
            parameter.main_grad.copy_(torch.randn(parameter.shape, generator=draw))
        optimizer.step(loss_is_finite=True)
        assert not offload or all(tensor.device.type == "cpu" for tensor in optimizer._state())
    weights = {name: parameter.detach().cpu().clone() for name, parameter in policy.named_parameters()}
    return weights, sum(tensor.numel() for tensor in optimizer._state()), sum(w.numel() for w in weights.values())


@pytest.mark.ranks
@pytest.mark.parametrize(("dtype", "copies"), [("fp32", 2), ("bf16", 3)])
def test_moments_and_fp32_weights_go_and_nothing_else(dtype, copies, tiny_model, ranks1):
    """Two moments a weight, and a third number where the weight itself is bf16; the weights are as without."""
    ((found, away, size),) = ranks1.run(trained, tiny_model("llama"), dtype, True)
    ((wanted, *_),) = ranks1.run(trained, tiny_model("llama"), dtype, False)
    assert away == copies * size
    assert all(torch.equal(found[name], weight) for name, weight in wanted.items())


@GPU
def test_tensors_move_and_stay_the_same_objects():
    tensors = [torch.arange(5.0, device="cuda"), torch.ones(2, 2, dtype=torch.bfloat16, device="cuda"), torch.ones(3)]
    offload = Offload(lambda: tensors)
    assert all(tensor.device.type == "cpu" for tensor in tensors)
    with offload:
        assert [tensor.device.type for tensor in tensors] == ["cuda", "cuda", "cpu"]
        tensors[0].add_(1)
    assert tensors[0].device.type == "cpu" and tensors[0].tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("distributed", "more", "engine", "shares"),
    [
        ("auto", {"copies": 8}, True, True), ("auto", {"copies": 1}, True, False),
        ("auto", {"copies": 8}, False, False), (False, {"copies": 8}, True, False),
        (True, {"copies": 1}, True, True), ("auto", {"fp8_params": True}, True, True),
    ],
)  # fmt: skip
def test_what_auto_is(distributed: Any, more: Any, engine: bool, shares: bool, monkeypatch):
    monkeypatch.setattr(backends, "transformer_engine", lambda: backends.Found(engine, "as this test says"))
    assert decided(OptimizerSettings(distributed=distributed), **{"copies": 1, **more}).shares is shares
    offload = OptimizerSettings(offload=True)
    assert not decided(offload, copies=8).shares, "moments that are moved are whole"


def test_the_distributed_optimizer_is_refused_without_fused_adam():
    """Without a word it would resume wrong."""
    check_optimizer(OptimizerSettings(offload=True))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="optimizer.distributed = True: needs .* FusedAdam .*distributed=false"):
            check_optimizer(OptimizerSettings(distributed=True))
