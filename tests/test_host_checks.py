"""What the machine must have: GPUs that torch can use, room for a checkpoint, shared memory for weights."""

from __future__ import annotations

import re
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import on_ranks
import pytest
import torch
from safetensors import safe_open

from flowrl_mega.config import ConfigError
from flowrl_mega.host_checks import check_allocator, check_disk, check_gpus, check_shared_memory
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.preflight import check_engine
from flowrl_mega.rollout.sglang import attached, flags

Usage = namedtuple("Usage", "total used free")


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets how many bytes every disk has left; gives the folders that were asked about."""
    asked: list[str] = []

    def set_(bytes_: int) -> list[str]:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: asked.append(str(path)) or Usage(0, 0, bytes_))
        return asked

    return set_


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines whose torch has no GPU")
def test_gpus_that_torch_cannot_use_are_told(tmp_path: Path, monkeypatch):
    """A set-up on a login node makes an environment for CPUs, and a job would train 7B on them without a word."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("SLURM_GPUS_ON_NODE", raising=False)
    device = tmp_path / "nvidia0"
    assert check_gpus(device) is None
    device.touch()
    assert re.match(r"this machine has GPUs, but torch .*make setup TORCH=cuda; training on", check_gpus(device) or "")
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "0")
    assert check_gpus(device) is not None
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    with pytest.raises(ConfigError, match="SLURM_GPUS_ON_NODE = 8: the job has GPUs, but torch"):
        check_gpus(device)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert check_gpus(device) is None, "hidden on purpose"


@pytest.mark.parametrize(("dtype", "bytes_of_one"), [("fp32", 4 + 8), ("bf16", 2 + 4 + 8)])
@pytest.mark.parametrize("kind", ["llama", "llama-untied-rope", "qwen3"])
def test_a_checkpoint_must_fit(kind, dtype, bytes_of_one, tiny_model, tmp_path: Path, free):
    """By the tensors of the model's own files; a folder that is yet to be made lies on the disk of the one above."""
    path = tiny_model(kind)
    elements = 0
    for file in path.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            elements += sum(tensors.get_tensor(name).numel() for name in tensors.keys())  # noqa: SIM118
    needed = elements * bytes_of_one
    sections = {"model": {"path": str(path), "dtype": dtype}, "run_dir": str(tmp_path / "new" / "run")}
    config, arch = on_ranks.config_for(path, **sections), read_architecture(path)
    assert free(needed) is not None
    check_disk(config, arch)
    asked = free(needed - 1)
    with pytest.raises(ConfigError, match=r"run_dir = '.*new/run': a checkpoint of this model takes 0.00 GB, and "):
        check_disk(config, arch)
    assert set(asked) == {str(tmp_path)}


def test_it_is_part_of_the_dry_run(tiny_model, tmp_path: Path, free):
    """And so told before a rank starts."""
    from flowrl_mega.preflight import Inputs, check

    path = tiny_model("llama", vocab=14)
    config = on_ranks.config_for(path, run_dir=str(tmp_path / "run"))
    free(1000)
    with pytest.raises(ConfigError, match="a checkpoint of this model takes"):
        check(Inputs(config), 1, "auto", None)


@pytest.mark.parametrize(
    ("rollout", "is_refused"),
    [
        ({"engine": "sglang", "colocated": True}, True),
        ({"engine": "sglang", "colocated": True, "sync": {"transfer": "disk"}}, True),  # servers sleep all the same
        ({"engine": "sglang", "sync": {"transfer": "tensor"}}, True),
        ({"engine": "sglang"}, False),
        ({}, False),
    ],
)
@pytest.mark.parametrize("name", ["PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"])
def test_expandable_segments(name: str, rollout: dict[str, Any], is_refused: bool, monkeypatch):
    """torch_memory_saver 0.0.10 raises where the environment has them; torch's IPC then needs pidfd_getfd."""
    config = on_ranks.config_for("nowhere", rollout=rollout)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv(name, "max_split_size_mb:512,expandable_segments:False")
    check_allocator(config)
    monkeypatch.setenv(name, "max_split_size_mb:512,expandable_segments:True")
    if is_refused:
        with pytest.raises(ConfigError, match=f"{name} = 'max_split_size_mb:512,.*leave expandable_segments out"):
            check_allocator(config)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_allocator(config)


@pytest.mark.parametrize(
    ("dtype", "more", "is_refused"),
    [
        ("fp32", {}, True), ("bf16", {}, False), ("fp32", {"servers": ["http://127.0.0.1:1"]}, False),
        ("fp32", {"server_args": {"attention-backend": "torch_native"}}, False),
        ("fp32", {"server_args": {"device": "cpu"}}, False), ("fp32", {"nodes": 2}, False),
    ],
)  # fmt: skip
def test_fp32_and_flash_attention(dtype: str, more: dict[str, Any], is_refused: bool, monkeypatch):
    """Its kernels refuse it ("FlashAttention only supports fp16, bf16, and fp8_e4m3"), in the server's first answer."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for module, name in ((flags, "check_servers"), (attached, "check_attached")):
        monkeypatch.setattr(module, name, lambda *_: "looked at")
    sections = {"model": {"path": "nowhere", "dtype": dtype}, "rollout": {"engine": "sglang", **more}}
    inputs: Any = SimpleNamespace(config=on_ranks.config_for("nowhere", **sections), arch=None)
    inputs.data, inputs.benchmarks = SimpleNamespace(prompts=[SimpleNamespace(token_ids=[1])], held_out=None), []
    if is_refused:
        with pytest.raises(ConfigError, match="model.dtype = fp32: .*attention_backend=torch_native"):
            check_engine(inputs, 1)
    else:
        check_engine(inputs, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA IPC needs no shared memory")
@pytest.mark.parametrize(
    ("rollout", "is_asked"),
    [
        ({"engine": "sglang", "sync": {"transfer": "tensor", "bucket_mb": 100}}, True),
        ({"engine": "sglang", "colocated": True, "sync": {"bucket_mb": 100}}, True),
        ({"engine": "sglang", "sync": {"bucket_mb": 100}}, False),
        ({"engine": "sglang", "sync": {"transfer": "disk", "bucket_mb": 100}}, False),
        ({}, False),
    ],
)
def test_two_buckets_must_fit_into_shared_memory(rollout: dict[str, Any], is_asked: bool, free):
    config = on_ranks.config_for("nowhere", rollout=rollout)
    asked = free(200 << 20)
    check_shared_memory(config)
    assert asked == (["/dev/shm"] if is_asked else [])
    free((200 << 20) - 1)
    if is_asked:
        with pytest.raises(ConfigError, match=re.escape("rollout.sync.bucket_mb = 100: 2 buckets take 200 MB")):
            check_shared_memory(config)
    else:
        check_shared_memory(config)
