"""Weights between Hugging Face folders and Megatron's shards, to the bit; and folders that do not fit."""

from __future__ import annotations

import shutil

import on_ranks
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import KINDS

from flowrl_mega.config import ConfigError
from flowrl_mega.model.weights import named_tensors


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
