"""What an SGLang server should say of its tensors, from those that it was sent."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_models import make

from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.hf_folder import HfFolder
from flowrl_mega.model.names import hf_shapes
from flowrl_mega.rollout.sglang import checksums
from flowrl_mega.rollout.sglang.checksums import Expected, sha_hash, word_hash

# Of `pattern(words, dtype)`, by the Triton kernel of SGLang 0.5.23 (tests/integration/test_sglang_hashes.py runs it).
KERNEL = {
    (5, torch.float32): 0xE141D3B32EC8CD01,
    (8191, torch.bfloat16): 0x04EA4171735AE910,
    (8192, torch.float32): 0x61637C7F8647FA1C,
    (20001, torch.float32): 0x19C3303B337E8A33,
}


def pattern(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Numbers of all signs and sizes that depend on nothing else."""
    return ((torch.arange(count) * 2654435761 % 4093 - 2000) / 64).to(dtype)


@pytest.mark.parametrize(("count", "dtype"), KERNEL)
def test_words_are_hashed_as_sglangs_kernel_does(count, dtype, monkeypatch):
    """Of one tile, an odd number of bytes, and several pieces of tiles."""
    monkeypatch.setattr(checksums, "TILES_AT_ONCE", 2)
    assert f"{word_hash(pattern(count, dtype)):016x}" == f"{KERNEL[count, dtype]:016x}"


@pytest.mark.parametrize("digest", [sha_hash, word_hash])
def test_any_one_bit_changes_the_hash(digest):
    """Wherever it is; and so does the order of equal values."""
    tensor = pattern(300, torch.float32)
    found = {digest(tensor), digest(tensor.flip(0)), digest(tensor.bfloat16())}
    for place in range(300):
        changed = tensor.clone()
        changed.view(torch.int32)[place] ^= 1
        found.add(digest(changed))
    assert len(found) == 303


def test_nothing_has_a_hash():
    assert word_hash(torch.empty(0)) == 0


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen2", tmp_path_factory.mktemp("model"))


def expected(folder: Path, tp: int, **changes: torch.Tensor) -> Expected:
    arch = read_architecture(folder)
    found = Expected(arch, tp, torch.float32, cuda=False)
    found.add([(name, changes.get(name, HfFolder(folder).read(name))) for name in hf_shapes(arch)])
    return found


def as_said(ranks: list[dict[str, str]]) -> list[dict[str, Any]]:
    """As /weights_checker says it."""
    return [{"checksums": dict(r), "parallelism_info": [{"tp_rank": i}]} for i, r in enumerate(ranks)]


def sha(*parts: torch.Tensor) -> str:
    return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in parts)).hexdigest()[:16]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_slices_of_a_servers_ranks(tp, model):
    """As SGLang's layers cut them, written out by hand. Of 4 ranks two hold the same of 2 key-value heads; on CPU every
    rank's share of the feed-forward size (48) is padded to a multiple of 32."""
    read, layer = HfFolder(model).read, "model.layers.1"
    q, k, v = (read(f"{layer}.self_attn.{x}_proj.weight").chunk(n) for x, n in (("q", tp), ("k", 2), ("v", 2)))
    if tp == 1:
        k, v = ((torch.cat(part),) for part in (k, v))
    more = {1: 16, 2: 16, 4: 80}[tp]
    gate, up = (F.pad(read(f"{layer}.mlp.{x}_proj.weight"), (0, 0, 0, more)).chunk(tp) for x in ("gate", "up"))
    down = F.pad(read(f"{layer}.mlp.down_proj.weight"), (0, more)).chunk(tp, dim=1)
    embedding = F.pad(read("model.embed_tokens.weight"), (0, 0, 0, 27)).chunk(tp)  # 101 rows to 128
    norm = read(f"{layer}.input_layernorm.weight")
    bias = [
        read(f"{layer}.self_attn.{x}_proj.bias").chunk(n) for x, n in (("q", tp), ("k", min(tp, 2)), ("v", min(tp, 2)))
    ]
    for rank, found in enumerate(expected(model, tp).ranks):
        head = rank // 2 if tp == 4 else rank
        assert found[f"{layer}.self_attn.qkv_proj.weight"] == sha(q[rank], k[head], v[head])
        assert found[f"{layer}.self_attn.qkv_proj.bias"] == sha(bias[0][rank], bias[1][head], bias[2][head])
        assert found[f"{layer}.mlp.gate_up_proj.weight"] == sha(gate[rank], up[rank])
        assert found[f"{layer}.mlp.down_proj.weight"] == sha(down[rank])
        assert found[f"{layer}.input_layernorm.weight"] == sha(norm)
        assert found["model.embed_tokens.weight"] == sha(embedding[rank])
        assert len(found) == 3 + 7 * 2


def test_on_cuda_the_feed_forward_size_is_as_it_is(model):
    """There SGLang pads the vocabulary only."""
    arch, name = read_architecture(model), "model.layers.0.mlp.down_proj.weight"
    found, down = Expected(arch, 2, torch.float32, cuda=True), HfFolder(model).read(name)
    found.add([(name, down)])
    assert [rank[name] for rank in found.ranks] == [f"{word_hash(part):016x}" for part in down.chunk(2, dim=1)]


def test_a_vocabulary_that_ranks_do_not_divide_is_padded_further(model):
    """To a multiple of 64 x ranks, as SGLang does for 3 ranks."""
    embedding = HfFolder(model).read("model.embed_tokens.weight")
    padded = torch.cat([embedding, torch.zeros(192 - 101, 32)])
    for rank in range(3):
        assert torch.equal(checksums._vocabulary_slice(embedding, 3, rank), padded.chunk(3)[rank])


def test_differences_are_said_in_words(model):
    """Nothing where all is equal, also for what the policy knows nothing of; else which tensors, and how many."""
    right = expected(model, 2)
    said = as_said(right.ranks)
    said[1]["checksums"]["model.rotary.cos_sin_cache"] = "0"
    assert right.difference(said) == ""
    said[1]["checksums"]["model.layers.1.mlp.down_proj.weight"] = "0"
    assert right.difference(said) == "holds other values in model.layers.1.mlp.down_proj.weight, 1 of 17 tensors"
    del said[0]["checksums"]["model.norm.weight"]
    said[0]["checksums"]["model.layers.2.mlp.down_proj.weight"] = "0"
    found = right.difference(said)
    assert "lacks model.norm.weight, 1 of 17" in found and "has not: model.layers.2.mlp.down_proj.weight" in found
    assert right.difference(as_said(right.ranks[:1])) == "checksums of ranks [0], not of 2"


def test_one_changed_element_is_seen(model):
    """Of the values that were sent, in the tensor that SGLang makes of them."""
    name = "model.layers.0.self_attn.k_proj.weight"
    changed = HfFolder(model).read(name).clone()
    changed[3, 5] += 1e-6
    found = expected(model, 1).difference(as_said(expected(model, 1, **{name: changed}).ranks))
    assert found == "holds other values in model.layers.0.self_attn.qkv_proj.weight, 1 of 17 tensors"


def test_quantized_weights_are_left_out(model):
    """SGLang hashes them dequantized, and may have packed them anew: no false alarm of them."""
    arch = read_architecture(model)
    named = [(name, HfFolder(model).read(name)) for name in hf_shapes(arch)]
    some = "model.layers.0.mlp.down_proj.weight"
    found = Expected(arch, 1, torch.float32, cuda=False)
    found.add([*((n, t) for n, t in named if n != some), (some, torch.ones(1)), (f"{some}_scale_inv", torch.ones(1))])
    assert found.quantized == {some}
    assert found.difference(as_said(expected(model, 1).ranks)) == ""
