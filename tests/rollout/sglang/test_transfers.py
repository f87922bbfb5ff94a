"""What a bucket looks like on its way, without servers."""

from __future__ import annotations

import base64
import socket
import subprocess
import sys

import pytest
import torch

from flowrl_mega.rollout.sglang import broadcast, transfers
from flowrl_mega.rollout.sglang.endpoints import SglangServer
from flowrl_mega.rollout.sglang.transfers import Buffers, SyncTarget


def test_tensors_of_several_types_are_packed_end_to_end():
    """Without gaps, as the other end unpacks them, and each at a multiple of its size, which SGLang insists on."""
    named = [
        ("odd", torch.arange(3).to(torch.float8_e4m3fn)),
        ("half", torch.arange(5).bfloat16()),
        ("single", torch.ones(2)),
    ]
    packed = Buffers(lambda size: torch.empty(size, dtype=torch.uint8)).pack(named)
    assert [name for name, _ in packed.named] == ["single", "half", "odd"]
    assert packed.flat.numel() == 8 + 10 + 3
    raw = b"".join(tensor.contiguous().view(torch.uint8).numpy().tobytes() for _, tensor in packed.named)
    assert packed.flat.numpy().tobytes() == raw
    assert all(torch.equal(dict(packed.named)[name].float(), tensor.float()) for name, tensor in named)


def test_the_last_bucket_is_safe_while_the_next_is_filled():
    """One is under way; the one before it is not."""
    buffers = Buffers(lambda size: torch.empty(size, dtype=torch.uint8))
    first = buffers.pack([("a", torch.ones(4))])
    second = buffers.pack([("a", torch.zeros(3))])
    assert first.flat.view(torch.float32).tolist() == [1, 1, 1, 1]
    third = buffers.pack([("a", torch.full((4,), 2.0))])
    assert second.flat.view(torch.float32).tolist() == [0, 0, 0] and third.flat.data_ptr() == first.flat.data_ptr()


def test_shared_memory_is_passed_on_by_name():
    """A server is no child of ours: torch's default, which hands over an open file, ends it. Ours stays as it was."""
    before = torch.multiprocessing.get_sharing_strategy()
    assert before == "file_descriptor"
    memory = transfers.SharedMemory(torch.device("cpu"))
    payload = base64.b64decode(transfers._pickled([("a", memory._shared(64).view(torch.float32))]))
    assert b"rebuild_storage_filename" in payload and b"DupFd" not in payload
    assert torch.multiprocessing.get_sharing_strategy() == before


def test_a_gpu_goes_by_its_own_name(monkeypatch):
    """A server may see other numbers than we do. (Without a GPU: what torch would hand over is put in its place.)"""
    arguments = (torch.Tensor, (2,), (1,), 0, object, torch.float32, 3, b"handle", 8, 0, False, b"", 0, b"", True)
    monkeypatch.setattr(transfers, "reduce_tensor", lambda tensor: ("rebuild", arguments))
    properties = {3: type("Properties", (), {"uuid": "GPU-abc"})}
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties.__getitem__)
    found = transfers._Handle(type("Tensor", (), {"is_cuda": True})).__reduce__()  # type: ignore[arg-type]
    assert found == ("rebuild", (*arguments[:6], "GPU-abc", *arguments[7:]))


OPENS = """
import base64, pickle, sys, torch
from torch.multiprocessing import reductions
real = reductions.rebuild_cuda_tensor
def rebuild(*a):  # as SGLang does it
    names = [str(torch.cuda.get_device_properties(gpu).uuid) for gpu in range(torch.cuda.device_count())]
    return real(*a[:6], names.index(a[6]), *a[7:])
reductions.rebuild_cuda_tensor = rebuild
named = pickle.loads(base64.b64decode(sys.stdin.read()))
print([(name, tensor.device.type, str(tensor.dtype), tensor.double().sum().item()) for name, tensor in named])
"""


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
def test_another_process_opens_the_memory(device):
    """By CUDA IPC or by a file's name, without a server; once for each process, and from the buffer that a sync fills
    again."""
    memory = transfers.SharedMemory(torch.device(device))
    memory.buffers = Buffers(memory._shared)
    for value in (1.0, 3.0):
        named = [("a", torch.full((1000, 7), value, dtype=torch.bfloat16)), ("b", torch.full((3,), value))]
        packed = memory.pack([(name, tensor.to(device)) for name, tensor in named])
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", OPENS], input=transfers._pickled(packed.named), capture_output=True, text=True
            )
            assert done.returncode == 0, done.stderr
            sums = {"a": 7000 * value, "b": 3 * value}
            found = [(name, device, str(tensor.dtype), sums[name]) for name, tensor in packed.named]
            assert done.stdout.strip() == str(found)


@pytest.mark.parametrize(
    ("urls", "found"), [(["http://127.0.0.1:1"], "127.0.0.1"), (["http://localhost:1"], ("127.0.0.1", "::1"))]
)
def test_the_address_that_servers_of_this_host_are_given(urls, found):
    """What they can reach without leaving it."""
    assert broadcast._own_address([SyncTarget(SglangServer(url), {}) for url in urls]) in found


def test_the_address_that_other_hosts_are_given(monkeypatch):
    """One server elsewhere, and all have to come by the way that it comes."""

    class Probe:
        def __init__(self, *args):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *args):
            pass

        def connect(self, address):
            self.name = {"10.0.0.7": "10.0.0.1"}.get(address[0], address[0])

        def getsockname(self):
            return (self.name, 1)

    monkeypatch.setattr(socket, "socket", Probe)
    servers = [SyncTarget(SglangServer(url), {}) for url in ("http://127.0.0.1:1", "http://10.0.0.7:1")]
    assert broadcast._own_address(servers) == "10.0.0.1"
