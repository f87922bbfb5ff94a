"""Context-parallel attention for machines without Transformer Engine, whose ring of GPUs is the real one: every rank
attends in the whole sequences, gathered, and keeps its own rows. For tests of all that is around the attention."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowrl_mega.model import layers
from flowrl_mega.parallel.context import all_reduce_grad
from flowrl_mega.parallel.packing import rank_rows, to_buckets


class AttentionOverRanks(layers.PackedAttention):
    def __init__(self, config: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        torch.nn.Module.__init__(self)
        self.scale, self.group = softmax_scale, kwargs["pg_collection"].cp

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        given: layers.PackedRows = kwargs["packed_seq_params"]
        rows = rank_rows(given.cu_seqlens_q, self.group.size(), self.group.rank()).to(query.device)
        whole = []
        for x in (query, key, value):
            empty = x.new_zeros(x.shape[0] * self.group.size(), *x.shape[1:])
            whole.append(all_reduce_grad(empty.index_copy(0, rows, x), self.group))
        buckets = to_buckets(given.cu_seqlens_q.diff().tolist())
        attended = super().forward(*whole, packed_seq_params=layers.PackedRows(buckets=buckets))
        return attended[rows]


@contextmanager
def attention_over_ranks() -> Iterator[None]:
    real, layers.PackedAttention = layers.PackedAttention, AttentionOverRanks
    try:
        yield
    finally:
        layers.PackedAttention = real
