"""Our converter against mbridge (https://github.com/ISEEKYAN/mbridge), parameter by parameter and to the bit.

A round trip of our own would not see q and k swapped on both ways; a converter that others wrote does.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mbridge_oracle
import pytest
import torch
from rank_pool import RankPool
from safetensors.torch import load_file
from tiny_models import KINDS
from torch import Tensor

from flowrl_mega.checkpoint.convert import hf_to_megatron, megatron_to_hf

# Three layers, two groups and four heads in each: where two of them are equal, one taken for the other is not seen.
SIZE = {"num_hidden_layers": 3, "num_key_value_heads": 2, "num_attention_heads": 8}

pytestmark = [pytest.mark.ranks, pytest.mark.parametrize("tp", [1, 2]), pytest.mark.parametrize("kind", KINDS)]


@pytest.fixture
def pool(tp: int, ranks1: RankPool, ranks2: RankPool) -> RankPool:
    return ranks1 if tp == 1 else ranks2


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_megatron_loads_what_mbridge_loads(
    kind: str, tp: int, tiny_model: Callable[..., Path], pool: RankPool, tmp_path: Path
) -> None:
    """Our checkpoint, loaded by Megatron itself into its own GPTModel, against mbridge's loading of the folder it was
    made from: every rank's every parameter. At tp = 2 the vocabulary of 101 is padded."""
    hf = tiny_model(kind, **SIZE)
    hf_to_megatron(hf, tmp_path / "megatron")
    ours = pool.run(mbridge_oracle.restored_tensors, hf, tmp_path / "megatron", tp)
    theirs = pool.run(mbridge_oracle.megatron_tensors, hf, tp)
    for found, wanted in zip(ours, theirs, strict=True):
        require_equal(found, wanted)


def test_the_policy_loads_what_mbridge_loads(
    kind: str, tp: int, tiny_model: Callable[..., Path], pool: RankPool
) -> None:
    """The trainer's own loading has no Megatron between its shards and the folder."""
    hf = tiny_model(kind, **SIZE)
    ours = pool.run(mbridge_oracle.policy_tensors, hf, tp)
    theirs = pool.run(mbridge_oracle.megatron_tensors, hf, tp)
    for found, wanted in zip(ours, theirs, strict=True):
        require_equal(found, wanted)


def test_the_way_back_is_what_mbridge_exports(
    kind: str, tp: int, tiny_model: Callable[..., Path], pool: RankPool, tmp_path: Path
) -> None:
    """From a checkpoint in which nothing is ours: mbridge loaded the weights, Megatron saved them from its GPTModel."""
    hf, checkpoint = tiny_model(kind, **SIZE), tmp_path / "megatron"
    pool.run(mbridge_oracle.save, hf, checkpoint, tp)
    megatron_to_hf(checkpoint, tmp_path / "hf")
    found = load_file(tmp_path / "hf" / "model.safetensors")
    for exported in pool.run(mbridge_oracle.hf_tensors, hf, checkpoint, tp):
        require_equal(found, exported)
