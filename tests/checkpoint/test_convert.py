"""The converter in one process: both ways exact, other types, the partition function, and what training loads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import on_policy_ranks
import pytest
import torch
import torch.distributed.checkpoint as dcp
from conversion_models import DTYPES, MODELS, STORED, contents, make_stored, require_same_weights, tensors
from rank_pool import RankPool
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from flowrl_mega.checkpoint.convert import hf_to_megatron, megatron_to_hf


def there_and_back(hf: Path, tmp_path: Path, dtype: torch.dtype | None = None) -> Path:
    hf_to_megatron(hf, tmp_path / "megatron", dtype, show=False)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", show=False)
    return tmp_path / "back"


def files_beside_weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if "safetensors" not in file.name}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", MODELS)
def test_there_and_back_is_exact(name: str, dtype: str, tmp_path: Path) -> None:
    """Weights, the files that hold them, and what goes with them: nothing is lost, nothing is added."""
    hf = make_stored(name, tmp_path / "hf", dtype)
    back = there_and_back(hf, tmp_path)
    require_same_weights(back, hf)
    assert files_beside_weights(back) == files_beside_weights(hf)


def test_a_tied_head_that_is_stored_all_the_same(tmp_path: Path) -> None:
    """Some folders hold it. Megatron has no second copy, and the way back must."""
    hf = make_stored("qwen2.5", tmp_path / "hf")
    stored = load_file(hf / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"].clone()
    save_file(stored, hf / "model.safetensors", metadata={"format": "pt"})
    require_same_weights(there_and_back(hf, tmp_path), hf)


@pytest.mark.parametrize(("stored", "converted"), [("fp32", "bf16"), ("bf16", "fp32")])
@pytest.mark.parametrize("name", ["llama3", "qwen2.5", "qwen3"])
def test_another_type(name: str, stored: str, converted: str, tmp_path: Path) -> None:
    """Rounded once and to the nearest, as torch does it; and config.json says so, since servers load by it."""
    hf = make_stored(name, tmp_path / "hf", stored)
    back = there_and_back(hf, tmp_path, DTYPES[converted])
    wanted, found = tensors(hf), tensors(back)
    assert found.keys() == wanted.keys()
    for tensor_name, tensor in wanted.items():
        assert found[tensor_name].dtype == DTYPES[converted]
        assert torch.equal(found[tensor_name], tensor.to(DTYPES[converted])), tensor_name
    config, changed = (json.loads((folder / "config.json").read_text()) for folder in (hf, back))
    assert changed == {**config, "dtype": {"fp32": "float32", "bf16": "bfloat16"}[converted]}


# what config.json says -> what an export of weights of one type in it says, X being that type; of weights of two types
TYPES: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "both names": (
        {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
        {"dtype": "X", "torch_dtype": "X"},
        {"dtype": "bfloat16", "torch_dtype": "bfloat16"},
    ),
    "two that differ": (
        {"torch_dtype": "float16", "dtype": "float32"},
        {"torch_dtype": "X", "dtype": "X"},
        {"torch_dtype": "float32", "dtype": "float32"},
    ),
    "one of them null": (
        {"dtype": None, "torch_dtype": "float16"},
        {"dtype": "X", "torch_dtype": "X"},
        {"dtype": "float16", "torch_dtype": "float16"},
    ),
    "the older name": ({"torch_dtype": "float16"}, {"torch_dtype": "X"}, {"torch_dtype": "float16"}),
    "the newer name": ({"dtype": "float16"}, {"dtype": "X"}, {"dtype": "float16"}),
    "neither": ({}, {"dtype": "X"}, {}),
}


@pytest.mark.parametrize("stored", ["float32", "bfloat16", "mixed"])
@pytest.mark.parametrize("case", TYPES)
def test_both_names_of_the_type_agree(case: str, stored: str, tmp_path: Path) -> None:
    """transformers 5 reads dtype, 4 torch_dtype: one that stayed behind loads fp32 weights as bf16."""
    said, of_one, of_two = TYPES[case]
    hf = make_stored("qwen2.5", tmp_path / "hf", "bf16" if stored == "bfloat16" else "fp32")
    if stored == "mixed":
        weights = load_file(hf / "model.safetensors")
        weights["model.norm.weight"] = weights["model.norm.weight"].bfloat16()
        save_file(weights, hf / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"} | said))
    back = there_and_back(hf, tmp_path)
    found = json.loads((back / "config.json").read_text())
    wanted = of_two if stored == "mixed" else {name: stored for name in of_one}
    assert {name: found[name] for name in ("dtype", "torch_dtype") if name in found} == wanted
    if wanted == said:
        assert (back / "config.json").read_bytes() == (hf / "config.json").read_bytes()
    if stored != "mixed":
        assert str(AutoModelForCausalLM.from_pretrained(back).dtype) == f"torch.{stored}"


@pytest.mark.ranks
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("z", "dtype"), [("mlp", "bf16"), ("mlp", "fp32"), ("constant", "fp32")])
def test_the_partition_function_goes_its_own_way(z: str, dtype: str, ranks2: RankPool, tmp_path: Path) -> None:
    """The policy that is exported from a run must load where nobody has heard of log Z; and log Z must not be lost."""
    hf = make_stored("smollm2", tmp_path / "hf", dtype)
    settings = {"model": {"path": str(hf), "dtype": dtype}, "parallel": {"tp": 2}}
    wanted, _ = ranks2.run(on_policy_ranks.save, hf, tmp_path, z, **settings)
    megatron_to_hf(tmp_path / "checkpoints" / "step_1", tmp_path / "out", show=False)
    require_same_weights(tmp_path / "out", hf)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*(path.name for path in hf.iterdir()), "log_z"}
    exported = load_file(tmp_path / "out" / "log_z" / "log_z.safetensors")
    assert exported.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert exported[name].dtype == tensor.dtype == DTYPES[dtype] and torch.equal(exported[name], tensor), name
    assert json.loads((tmp_path / "out" / "log_z" / "log_z.json").read_text())["kind"] == z

    back = there_and_back(tmp_path / "out", tmp_path / "again")
    carried = {f"partition.{name}": torch.full_like(tensor, torch.nan) for name, tensor in wanted.items()}
    dcp.load(carried, checkpoint_id=tmp_path / "again" / "megatron", no_dist=True)
    assert all(torch.equal(carried[f"partition.{name}"], tensor) for name, tensor in wanted.items())
    assert contents(back / "log_z") == contents(tmp_path / "out" / "log_z")


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_training_loads_the_same_from_both(
    name: str, tp: int, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    """Training reads Hugging Face folders with code of its own; a run may start from either."""
    hf = make_stored(name, tmp_path / "hf")
    hf_to_megatron(hf, tmp_path / "megatron", show=False)
    settings: dict[str, Any] = {"model": {"path": str(hf), "dtype": STORED[name][0]}, "parallel": {"tp": tp}}
    pool = ranks1 if tp == 1 else ranks2
    assert pool.run(on_policy_ranks.different_shards, hf, tmp_path / "megatron", **settings) == [[]] * tp
