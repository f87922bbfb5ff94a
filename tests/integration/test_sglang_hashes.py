"""SGLang's own functions for hashes and FP8, run by its interpreter, against ours."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from sglang_server import server_python
from test_checksums import KERNEL, pattern

import flowrl_mega.rollout.sglang.cpu_server as cpu_server
from flowrl_mega.rollout.sglang.checksums import word_hash
from flowrl_mega.rollout.sglang.quantize import quantize

pytestmark = [pytest.mark.integration, pytest.mark.servers, pytest.mark.timeout(600)]

# Triton's interpreter runs the kernel on CPU tensors; only the two assertions that these are on CUDA are changed.
HASHES = """
import os, sys
os.environ["TRITON_INTERPRET"] = "1"
import importlib.util, json
from pathlib import Path
from safetensors.torch import load_file
file = Path(importlib.util.find_spec("sglang").origin).parent / "kernels/ops/memory/gpu_tensor_hash.py"
spec = importlib.util.spec_from_file_location("hashes", file)
hashes = importlib.util.module_from_spec(spec)
spec.loader.exec_module(hashes)
source = file.read_text()
for name in ("_as_uint32_words", "gpu_tensor_hash"):
    body = source[source.index(f"def {name}("):].split("\\n\\n\\n")[0]
    assert body.count(".is_cuda") == 1
    exec(body.replace("tensor.is_cuda", "True").replace("t.is_cuda", "True"), hashes.__dict__)
print(json.dumps({n: hashes.gpu_tensor_hash(t, use_cg=False) for n, t in load_file(sys.argv[1]).items()}))
"""
DEQUANTIZED = """
import sys
sys.path.append(sys.argv[3])
import launch  # what a CPU lacks
from safetensors.torch import load_file, save_file
from sglang.srt.layers.quantization.fp8_utils import block_quant_dequant
import torch
given = load_file(sys.argv[1])
save_file({"weight": block_quant_dequant(given["weight"], given["scale"], [128, 128], torch.float32)}, sys.argv[2])
"""


def run(program: str, *arguments: Any) -> str:
    command = [server_python(), "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_kernel_of_cuda_hashes(tmp_path):
    """The fast tests have its results as constants; random bits besides."""
    torch.manual_seed(0)
    tensors = {f"{count} {dtype}": pattern(count, dtype) for count, dtype in KERNEL}
    tensors["random"] = torch.randint(-(2**31), 2**31, (9000,), dtype=torch.int64).int()
    save_file(tensors, tmp_path / "tensors.safetensors")
    found = json.loads(run(HASHES, tmp_path / "tensors.safetensors").splitlines()[-1])
    assert {name: found[name] for name in tensors if name != "random"} == {
        f"{c} {d}": v for (c, d), v in KERNEL.items()
    }
    assert found == {name: word_hash(tensor) for name, tensor in tensors.items()}


def test_what_sglang_makes_of_fp8_weights(tmp_path):
    """Its dequantization of ours is the weight again, edges of odd size included."""
    torch.manual_seed(0)
    weight = torch.randn(300, 200) * torch.logspace(-3, 3, 300)[:, None]
    quantized, scale = quantize(weight)
    save_file({"weight": quantized, "scale": scale}, tmp_path / "given.safetensors")
    folder = Path(cpu_server.__file__).parent
    run(DEQUANTIZED, tmp_path / "given.safetensors", tmp_path / "found.safetensors", folder)
    found = load_file(tmp_path / "found.safetensors")["weight"]
    largest = torch.stack([block.abs().max() for block in weight.split(128)]).repeat_interleave(128)[:300, None]
    assert ((found - weight).abs() <= weight.abs() / 16 + largest / 448 * 2**-7).all()
    assert (found - weight).abs().max() > 0  # it is quantized
