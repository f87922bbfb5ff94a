"""Importing this starts the emulation, and then imports the product."""

from __future__ import annotations

import importlib
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch.autograd
import torch.distributed

import transformer_engine_emulation

transformer_engine_emulation.start()

import flowrl_mega.job  # noqa: E402, F401
from flowrl_mega.parallel import cuda_is_cpu  # noqa: E402

# Torch leaves a mode while it handles a call of the mode's, as `Tensor.backward` is. Nothing of Megatron asks for the
# device "cuda" in there, but Transformer Engine does.
autograd: Any = torch.autograd
run_backward = autograd._engine_run_backward


def run_backward_where_cuda_is_cpu(*args: Any, **kwargs: Any) -> Any:
    with cuda_is_cpu._CudaIsCpu():
        return run_backward(*args, **kwargs)


autograd._engine_run_backward = run_backward_where_cuda_is_cpu

# It draws from no generator of the GPU's own: as in Megatron, theirs is the CPU's.
te_distributed: Any = importlib.import_module("transformer_engine.pytorch.distributed")
te_distributed._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
te_distributed._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)

# Gloo makes one buffer, of the first one's type, of what is gathered together; NCCL does not. With weights kept in FP8
# Megatron gathers bytes and bf16 together.
from megatron.core.distributed import param_and_grad_buffer  # noqa: E402

coalescing_manager: Any = param_and_grad_buffer._coalescing_manager


def one_by_one(*args: Any, async_ops: bool = False, **kwargs: Any) -> Any:
    return coalescing_manager(*args, async_ops=True, **kwargs) if async_ops else nullcontext()


param_and_grad_buffer._coalescing_manager = one_by_one
# Transformer Engine gathers blocks and their scales together, each call by itself a synchronous one.
torch.distributed._coalescing_manager = lambda *args, **kwargs: nullcontext(SimpleNamespace(wait=lambda: None))


# A ring's sends and receives are waited for twice, which NCCL allows and gloo does not end.
ring: Any = importlib.import_module("transformer_engine.pytorch.attention.dot_product_attention.context_parallel")
communicate: Any = ring.flash_attn_p2p_communicate


def communicate_at_once(*args: Any) -> list[Any]:
    for request in communicate(*args):
        request.wait()
    return []


ring.flash_attn_p2p_communicate = communicate_at_once
