"""Transformer Engine's layer spec without Transformer Engine: our wiring, with stand-ins for the layers themselves.

What the stand-ins compute is written down here, from what Transformer Engine documents; the real ones run in
test_te_cuda.py.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import on_ranks
import pytest
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.enums import AttnMaskType
from tiny_models import in_float64, random_sequences, response_logits
from torch import Tensor

from flowrl_mega.model import layers, te
from flowrl_mega.model.generation import Decoder, _Cache
from flowrl_mega.model.layers import PackedRows
from flowrl_mega.model.weights import WholeWeights
from flowrl_mega.parallel import backends
from flowrl_mega.parallel.backends import Found
from flowrl_mega.parallel.optimizer import wrap
from flowrl_mega.parallel.packing import pack

LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (40, 60)]


class Attention(torch.nn.Module):
    """In place of TEDotProductAttention: format thd, causal within each sequence of cu_seqlens."""

    def __init__(self, config: Any, **kwargs: Any) -> None:
        super().__init__()
        assert kwargs["attn_mask_type"] == AttnMaskType.causal

    def forward(self, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **kwargs: Any) -> Tensor:
        """query [T, h, d], key and value [T, h_kv, d] -> [T, h * d]."""
        packed = kwargs["packed_seq_params"]
        assert type(packed) is PackedSeqParams and packed.qkv_format == "thd"
        assert packed.cu_seqlens_q.dtype == torch.int32 and torch.equal(packed.cu_seqlens_q, packed.cu_seqlens_kv)
        lengths = packed.cu_seqlens_q.diff().tolist()
        assert sum(lengths) == query.shape[0] and max(lengths) == packed.max_seqlen_q == packed.max_seqlen_kv
        parts = zip(*(x.split(lengths) for x in (query, key, value)), strict=True)
        return torch.cat([attend(*part) for part in parts]).flatten(1)


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention of one sequence, [t, h, d], in at least fp32."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    wide = [x.transpose(0, 1).to(torch.promote_types(x.dtype, torch.float32)) for x in (q, k, v)]
    scores = wide[0] @ wide[1].transpose(1, 2) * q.shape[2] ** -0.5
    later = torch.ones_like(scores, dtype=torch.bool).triu(1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ wide[2]).transpose(0, 1).to(q.dtype)


@pytest.mark.parametrize("multiple", [1, 16])
def test_packed_rows_become_thd_and_back(multiple: int) -> None:
    """Against each sequence alone, in float64; with padding rows, which are a sequence of their own."""
    batch = pack(random_sequences(LENGTHS), multiple)
    packed = type("Packed", (te.PackedFormat, Attention), {})(None, attn_mask_type=AttnMaskType.causal)
    g = torch.Generator().manual_seed(0)
    rows = batch.tokens.numel()
    assert rows % multiple == 0
    q, k, v = (torch.randn(rows, 1, heads, 8, generator=g, dtype=torch.float64) for heads in (4, 2, 2))
    found = packed(q, k, v, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=PackedRows.of(batch))
    assert found.shape == (rows, 1, 32)
    for first, last in zip(batch.cu_seqlens[:-1], batch.cu_seqlens[1:], strict=True):
        alone = [x[first:last, 0].transpose(0, 1)[None] for x in (q, k, v)]
        wanted = F.scaled_dot_product_attention(*alone, is_causal=True, enable_gqa=True)[0].transpose(0, 1).flatten(1)
        assert (found[first:last, 0] - wanted).abs().max() < 1e-12


@contextmanager
def stand_in() -> Iterator[None]:
    """In here this process has a "Transformer Engine"."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "checkpoint"))
    from megatron.core.models.gpt import gpt_layer_specs
    from transformer_engine_stand_in import Backend, Norm

    with (
        patch.object(backends, "transformer_engine", lambda: Found(True, "a stand-in")),
        patch.object(gpt_layer_specs, "TESpecProvider", Backend),
        patch.object(te.megatron_te, "TEDotProductAttention", Attention),
        patch.object(te.megatron_te, "TENorm", Norm),
    ):
        yield


def build(path: Path, dtype: str, spec: str, tp: int = 1) -> Any:
    model = {"path": str(path), "dtype": dtype, "spec": spec}
    megatron = {"apply_rope_fusion": False}  # the kernel is Transformer Engine's
    with stand_in():
        return on_ranks.build(path, model=model, megatron=megatron, parallel={"tp": tp})


def scores(path: Path, dtype: str, spec: str, tp: int) -> tuple[set[str], list[Tensor]]:
    """The names of the policy's parameters, and the log-probs by sequence."""
    policy, sequences = build(path, dtype, spec, tp), random_sequences(LENGTHS)
    batch = on_ranks.packed(policy, sequences)
    logp = policy.score([batch])[0].logp.double().split(batch.response_cu_seqlens.diff().tolist())
    by_index = [logp[batch.index.tolist().index(i)] for i in range(len(sequences))]
    return set(policy.gpt_parameters()), by_index


@pytest.fixture(scope="module")
def wanted(tiny_model) -> dict[str, list[Tensor]]:
    """transformers' log-probs in float64."""
    found = {}
    for kind in ("llama", "qwen3"):
        model = in_float64(tiny_model(kind))
        with torch.no_grad():
            found[kind] = [
                response_logits(model, s.prompt, s.response)
                .log_softmax(-1)
                .gather(1, torch.tensor(s.response)[:, None])
                for s in random_sequences(LENGTHS)
            ]
    return found


def error(found: list[Tensor], wanted: list[Tensor]) -> float:
    return max((a - b[:, 0]).abs().max().item() for a, b in zip(found, wanted, strict=True))


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_the_policy_of_fused_layers(kind: str, tp: int, tiny_model, wanted, ranks1, ranks2) -> None:
    """Weights land under the fused names, and each row keeps its own rotary angle: log-probs as transformers' in
    float64. In bf16 also through the attention in format thd, no further off than twice the local spec's own error."""
    pool, path = (ranks1 if tp == 1 else ranks2), tiny_model(kind)
    for names, found in pool.run(scores, path, "fp32", "te", tp):
        assert "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight" in names
        assert "decoder.layers.0.input_layernorm.weight" not in names
        assert error(found, wanted[kind]) < 2e-5
    local = max(error(found, wanted[kind]) for _, found in pool.run(scores, path, "bf16", "local", tp))
    assert max(error(found, wanted[kind]) for _, found in pool.run(scores, path, "bf16", "te", tp)) < 2 * local


def decoded(path: Path) -> tuple[Tensor, Tensor]:
    """Logits after a prompt from the embedded engine's decoder, on the weights of each spec."""
    logits = []
    for spec in ("local", "te"):
        policy = build(path, "fp32", spec)
        decoder = Decoder(policy.arch, WholeWeights(policy).gather())
        cache = _Cache(policy.arch, 1, 8, torch.zeros(1, dtype=torch.long), decoder.embedding)
        logits.append(decoder.logits(torch.tensor([[5, 6, 7]]), cache).detach())
    return logits[0], logits[1]


@pytest.mark.ranks
def test_the_embedded_engine_reads_fused_names(tiny_model, ranks1) -> None:
    ((local, fused),) = ranks1.run(decoded, tiny_model("qwen3"))
    assert torch.equal(local, fused)


def fused_gradients(path: Path) -> tuple[bool, bool]:
    """Whether a Transformer Engine layer adds into the gradient buffer, before and after there is one."""
    policy = build(path, "fp32", "te")
    linear = policy.stages[0].gpt.decoder.layers[0].mlp.linear_fc2
    linear.fuse_wgrad_accumulation = False  # as te.pytorch.Linear has it
    before = linear.fuse_wgrad_accumulation
    wrap(policy.stages)
    return before, linear.fuse_wgrad_accumulation


@pytest.mark.ranks
def test_gradient_accumulation_is_fused_once_there_is_a_buffer(tiny_model, ranks1) -> None:
    assert ranks1.run(fused_gradients, tiny_model("llama")) == [(False, True)]


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
