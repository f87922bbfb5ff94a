"""Weights between Hugging Face folders and Megatron's shards, to the bit; and folders that do not fit."""

from __future__ import annotations

import shutil

import on_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS

from flowrl_mega.config import ConfigError
from flowrl_mega.model.weights import Buckets, named_tensors


def loaded_and_named(path, **sections) -> dict[str, torch.Tensor]:
    policy = on_ranks.build(path, log_z="mlp", **sections)
    return {name: tensor.clone() for name, tensor in named_tensors(policy)}


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_round_trip_is_exact(kind, tp, tiny_model, ranks1, ranks2):
    """What comes out of the shards is what the safetensors hold: no tensor more or less, and no bit changed. The
    partition function has no Hugging Face name and must not be among them."""
    stored = load_file(tiny_model(kind) / "model.safetensors")
    for found in (ranks1 if tp == 1 else ranks2).run(loaded_and_named, tiny_model(kind), parallel={"tp": tp}):
        assert found.keys() == stored.keys()
        for name, tensor in stored.items():
            assert torch.equal(found[name], tensor), name


def changed(folder, tmp_path, change) -> str:
    """A copy of the model folder with `change` made to its tensors."""
    copy = tmp_path / "model"
    shutil.copytree(folder, copy)
    tensors = load_file(copy / "model.safetensors")
    change(tensors)
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    return str(copy)


MISFITS = {
    "missing": (lambda t: t.pop("model.norm.weight"), "holds no tensor 'model.norm.weight'"),
    "unexpected": (lambda t: t.update({"model.extra": torch.zeros(1)}), "unexpected tensor 'model.extra'"),
    "shape": (
        lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
        "'model.norm.weight' has shape (7,), but",
    ),
}


def refusal(path) -> str:
    try:
        on_ranks.build(path)
    except ConfigError as error:
        return str(error)
    return "accepted"


@pytest.mark.ranks
@pytest.mark.parametrize("misfit", MISFITS)
def test_tensors_that_do_not_fit_are_named(misfit, tiny_model, tmp_path, ranks1):
    """Half a model must not train."""
    change, message = MISFITS[misfit]
    (found,) = ranks1.run(refusal, changed(tiny_model("llama"), tmp_path, change))
    assert message in found


@pytest.mark.ranks
@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_missing_or_broken_files_are_named(content, tiny_model, tmp_path, ranks1):
    copy = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), copy)
    file = copy / "model.safetensors"
    file.unlink() if content is None else file.write_bytes(content)
    (found,) = ranks1.run(refusal, str(copy))
    assert str(copy) in found
    assert ("holds no *.safetensors" if content is None else "broken or cut off") in found


@pytest.mark.ranks
def test_several_files_are_one_model(tiny_model, tmp_path, ranks1):
    """Large models come in several files."""
    copy = tmp_path / "model"
    shutil.copytree(tiny_model("llama"), copy)
    tensors = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    names = sorted(tensors)
    for number, part in enumerate((names[::2], names[1::2]), start=1):
        save_file({name: tensors[name] for name in part}, copy / f"model-0000{number}-of-00002.safetensors")
    (found,) = ranks1.run(loaded_and_named, copy)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def in_buckets(path, bucket_bytes, dtype=None, **sections) -> list[list[tuple[str, torch.Tensor]]]:
    policy = on_ranks.build(path, log_z="mlp", **sections)
    found = Buckets(policy, bucket_bytes, dtype)
    buckets = [[(name, t.clone()) for name, t in bucket] for bucket in found]
    assert len(buckets) == len(found)
    return buckets


@pytest.mark.ranks
@pytest.mark.parametrize("parallel", [{"tp": 1}, {"tp": 2}, {"pp": 2}], ids=["tp1", "tp2", "pp2"])
@pytest.mark.parametrize("kind", KINDS)
def test_buckets_hold_the_files_tensors_once(kind, parallel, tiny_model, ranks1, ranks2):
    """Bit for bit what the safetensors hold, on the first rank only; neither the partition function nor a tied head."""
    stored = load_file(tiny_model(kind) / "model.safetensors")
    ranks = ranks1 if parallel == {"tp": 1} else ranks2
    first, *others = ranks.run(in_buckets, tiny_model(kind), 10_000, parallel=parallel)
    assert all(bucket == [] for buckets in others for bucket in buckets)
    assert all(len(buckets) == len(first) for buckets in others)
    names = [name for bucket in first for name, _ in bucket]
    assert sorted(names) == sorted(stored)
    for bucket in first:
        for name, tensor in bucket:
            assert torch.equal(tensor, stored[name]) and tensor.dtype == stored[name].dtype, name


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [1, 2])
def test_buckets_are_as_large_as_asked(tp, tiny_model, ranks1, ranks2):
    """Memory is what they are for. A receiver can load q, k and v, or gate and up, of one bucket in one piece."""
    ranks, path = (ranks1 if tp == 1 else ranks2), tiny_model("llama-untied-rope")
    padding = (tp - 1) * 2 * 32 * 4  # of the vocabulary counts too
    for limit in (1, 15_000, 1 << 30):
        first, *_ = ranks.run(in_buckets, path, limit, parallel={"tp": tp})
        sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in first]
        assert limit > 1 or len(first) == 3 + 6 * 2  # each parameter is larger than that, so alone
        assert limit != 15_000 or (max(sizes) <= limit and sum(sizes) + padding > (len(sizes) - 1) * limit / 2)
        assert limit < 1 << 30 or len(first) == 1
        for bucket in first:
            names = {name for name, _ in bucket}
            for one, other in (("q_proj", "v_proj"), ("q_proj", "k_proj"), ("gate_proj", "up_proj")):
                assert all(name.replace(one, other) in names for name in names if one in name)


@pytest.mark.ranks
def test_buckets_of_another_type(tiny_model, ranks2):
    """Cast before they travel; twice as many fit."""
    path = tiny_model("llama")
    stored = load_file(path / "model.safetensors")
    first, _ = ranks2.run(in_buckets, path, 15_000, torch.bfloat16, parallel={"tp": 2})
    whole, _ = ranks2.run(in_buckets, path, 15_000, parallel={"tp": 2})
    assert len(first) < len(whole)
    for bucket in first:
        assert sum(tensor.nbytes for _, tensor in bucket) <= 15_000
        assert all(torch.equal(tensor, stored[name].bfloat16()) for name, tensor in bucket)
