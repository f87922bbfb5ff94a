"""Apex's fused norm in the local layers' place of torch's, with a stand-in for Apex, which is built from source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from flowrl_mega.model import layers
from flowrl_mega.parallel.backends import Found


class Config:
    qk_layernorm, params_dtype, sequence_parallel = True, torch.float32, True


def test_apexs_norm_takes_the_place_of_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In all five places, marked for sequence parallelism as the other; what is handed to Apex's function gives
    torch's RMSNorm."""
    folder = tmp_path / "apex" / "normalization"
    folder.mkdir(parents=True)
    formula = "x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * weight"
    code = f"def fused_rms_norm_affine(x, weight, shape, eps):\n    assert tuple(shape) == (8,)\n    return {formula}\n"
    (folder / "fused_layer_norm.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for found, norm in ((False, layers.RMSNorm), (True, layers.ApexRMSNorm)):
        monkeypatch.setattr(layers, "get_num_layers_to_build", lambda config, vp_stage: 1)
        monkeypatch.setattr(layers, "apex_norm", lambda found=found: Found(found, ""))
        spec = layers.local_spec(Config)
        layer = spec.layer_specs[0].submodules
        attention = layer.self_attention.submodules
        norms = [layer.input_layernorm, layer.pre_mlp_layernorm, attention.q_layernorm, attention.k_layernorm]
        assert [*norms, spec.layer_norm] == [norm] * 5
    made, x = layers.ApexRMSNorm(Config, 8, eps=0.1), torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    torch.nn.init.uniform_(made.weight, generator=torch.Generator().manual_seed(1))
    assert (made(x) - F.rms_norm(x, (8,), made.weight, 0.1)).abs().max() < 1e-6
    assert made.weight.sequence_parallel
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]
