"""Hugging Face -> Megatron's own GPTModel in its own layouts -> Hugging Face, bit for bit."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import on_stock_ranks
import pytest
import torch
import transformer_engine_emulation
from conversion_models import DTYPES, MODELS, STORED, make_stored, require_same_weights, tensors
from on_stock_ranks import Case, Change, Found
from rank_pool import RankPool
from transformer_engine_emulation.ranks import emulated_ranks
from transformers import AutoModelForCausalLM

from flowrl_mega.checkpoint.convert import hf_to_megatron, megatron_to_hf
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.names import hf_names

LAYOUTS = [(tp, pp) for tp in (1, 2, 4) for pp in (1, 2)]
TOKENS, VOCAB = [5, 100, 0, 17, 100, 42, 3, 3, 88, 61, 29, 54], 101

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def ranks8() -> Iterator[RankPool]:
    pool = RankPool(8)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def te_ranks2() -> Iterator[RankPool]:
    """Two with Transformer Engine, its native part emulated."""
    if lacks := transformer_engine_emulation.lacks():
        pytest.skip(lacks)
    pool = emulated_ranks(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """The Hugging Face folder of every model, and the checkpoint made of it."""
    root, found = tmp_path_factory.mktemp("converted"), {}
    for name in MODELS:
        found[name] = make_stored(name, root / name), root / f"{name}-megatron"
        hf_to_megatron(*found[name], show=False)
    return found


def export(saved: Path, converted: Path, out: Path) -> Path:
    """Convert back what Megatron saved; beside it, as the converter and the trainer do it, the folder's other files."""
    for file in converted.iterdir():
        if file.suffix != ".distcp" and file.name not in ("metadata.json", ".metadata"):
            shutil.copy(file, saved)
    megatron_to_hf(saved, out, show=False)
    return out


@pytest.fixture(scope="module")
def walked(
    converted: dict[str, tuple[Path, Path]],
    ranks1: RankPool,
    ranks2: RankPool,
    ranks8: RankPool,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[tuple[str, int, int], tuple[Case, list[Found]]]:
    """Every model in every layout: what Megatron saved, and what each rank found. On eight ranks there are two
    data-parallel copies of the layouts of four; the small layouts run where nothing is computed twice."""
    root, found = tmp_path_factory.mktemp("saved"), {}
    for pool, layouts in ((ranks1, LAYOUTS[:1]), (ranks2, LAYOUTS[1:3]), (ranks8, LAYOUTS[3:])):
        keys = [(name, tp, pp) for tp, pp in layouts for name in MODELS]
        cases = [
            Case(*converted[name], root / f"{name}-tp{tp}-pp{pp}", DTYPES[STORED[name][0]], tp, pp)
            for name, tp, pp in keys
        ]
        by_rank = pool.run(on_stock_ranks.walk, cases, TOKENS, VOCAB, timeout=200)
        found |= {key: (case, list(ranks)) for key, case, *ranks in zip(keys, cases, *by_rank, strict=True)}
    return found


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
@pytest.mark.parametrize("name", MODELS)
def test_stock_megatron_loads_it_and_the_way_back_is_exact(
    name: str, tp: int, pp: int, walked: dict[tuple[str, int, int], tuple[Case, list[Found]]], tmp_path: Path
) -> None:
    """The point of the converter: what it writes is what Megatron reads, and what Megatron writes it reads.

    A round trip alone would also succeed with, say, gate and up swapped both ways. So the loaded model must compute
    what transformers computes, too.
    """
    case, ranks = walked[name, tp, pp]
    assert [found.not_filled for found in ranks] == [[]] * len(ranks)
    model = AutoModelForCausalLM.from_pretrained(case.hf, dtype=torch.float32)
    wanted = model(torch.tensor([TOKENS])).logits[0].detach()
    computed = [found.logits[:, :VOCAB] for found in ranks if found.logits is not None]
    assert len(computed) == len(ranks) // pp
    for logits in computed:
        torch.testing.assert_close(logits, wanted, rtol=0, atol=2e-6 * wanted.abs().max().item())
    require_same_weights(export(case.saved, case.loaded, tmp_path / "hf"), case.hf)


# Of llama3: 8 heads and 4 key-value heads of size 4. Megatron's qkv has 4 groups of 8 query, 4 key and 4 value rows.
CHANGES = {
    "query": Change("decoder.layers.0.self_attention.linear_qkv.weight", (21, 3), "layers.0.self_attn.q_proj", (13, 3)),
    "key": Change("decoder.layers.1.self_attention.linear_qkv.weight", (41, 0), "layers.1.self_attn.k_proj", (9, 0)),
    "value": Change("decoder.layers.2.self_attention.linear_qkv.weight", (62, 5), "layers.2.self_attn.v_proj", (14, 5)),
    "gate": Change("decoder.layers.3.mlp.linear_fc1.weight", (47, 7), "layers.3.mlp.gate_proj", (47, 7)),
    "up": Change("decoder.layers.0.mlp.linear_fc1.weight", (48, 7), "layers.0.mlp.up_proj", (0, 7)),
    "embedding": Change("embedding.word_embeddings.weight", (100, 31), "embed_tokens", (100, 31)),
    "norm": Change("decoder.layers.3.pre_mlp_layernorm.weight", (8,), "layers.3.post_attention_layernorm", (8,)),
}


@pytest.fixture(scope="module")
def changed(
    converted: dict[str, tuple[Path, Path]], ranks1: RankPool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("changed")
    changes = {root / what: change for what, change in CHANGES.items()}
    hf, megatron = converted["llama3"]
    ranks1.run(on_stock_ranks.save_changed, hf, DTYPES[STORED["llama3"][0]], megatron, changes)
    return {folder.name: folder for folder in changes}


@pytest.mark.parametrize("what", CHANGES)
def test_a_changed_weight_is_exported_changed(
    what: str, changed: dict[str, Path], converted: dict[str, tuple[Path, Path]], tmp_path: Path
) -> None:
    """What is exported is the checkpoint's, not a copy of the folder that it was once made from; and each element of
    Megatron's merged tensors goes to its own place."""
    hf, megatron = converted["llama3"]
    found = tensors(export(changed[what], megatron, tmp_path / "hf"))
    different = {
        (name, *at): (found[name] - before)[tuple(at)].item()
        for name, before in tensors(hf).items()
        for at in (found[name] != before).nonzero().tolist()
    }
    change = CHANGES[what]
    place = (f"model.{change.hf_name}.weight", *change.hf_at)
    assert different == {place: pytest.approx(1, abs=0.02)}  # in bf16


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2)])
@pytest.mark.parametrize("name", ["qwen2", "qwen3"])
def test_models_with_transformer_engine_load_and_save_it(
    name: str, tp: int, pp: int, converted: dict[str, tuple[Path, Path]], te_ranks2: RankPool, tmp_path: Path
) -> None:
    """There the norms belong to the linear layers after them and have other names; the checkpoint is the same.

    Biases (Qwen2) and norms of queries and keys (Qwen3) are what an architecture can have besides.
    """
    hf, megatron = converted[name]
    case, arch = Case(hf, megatron, tmp_path / "saved", DTYPES[STORED[name][0]], tp, pp), read_architecture(hf)
    for found in te_ranks2.run(on_stock_ranks.both_specs, case, TOKENS, VOCAB):
        assert found.local.keys() != found.fused.keys()
        local, fused = ({hf_names(n, arch): w for n, w in spec.items()} for spec in (found.local, found.fused))
        assert len(local) == len(found.local) and local.keys() == fused.keys()
        assert all(torch.equal(weight, fused[names]) for names, weight in local.items())
        if found.local_logits is not None:
            torch.testing.assert_close(found.fused_logits[:, :VOCAB], found.local_logits[:, :VOCAB], rtol=0, atol=1e-5)
    require_same_weights(export(case.saved, megatron, tmp_path / "hf"), hf)
