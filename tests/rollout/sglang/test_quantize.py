"""FP8 weights in blocks, as DeepSeek-style checkpoints hold them."""

from __future__ import annotations

import json

import pytest
import torch

from flowrl_mega.rollout.sglang.quantize import quantize, to_fp8, with_quantization


@pytest.mark.parametrize("shape", [(128, 128), (256, 384), (130, 70), (1, 300)])
def test_blocks_come_back_to_float8s_precision(shape):
    """Each block has its own scale, so a large value in one costs the others nothing. Float8 with 3 bits of mantissa
    is within 1/16 of a value, and of the smallest normal number's half below it."""
    torch.manual_seed(0)
    weight = torch.randn(shape)
    weight[0, -1] = 1000.0
    found, scale = quantize(weight)
    assert found.dtype == torch.float8_e4m3fn and found.shape == shape and scale.dtype == torch.float32
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    for row in range(scale.shape[0]):
        for column in range(scale.shape[1]):
            block = slice(row * 128, row * 128 + 128), slice(column * 128, column * 128 + 128)
            back, wanted = found[block].float() * scale[row, column], weight[block]
            assert back.abs().max() == pytest.approx(wanted.abs().max().item(), rel=1e-6)
            assert ((back - wanted).abs() <= wanted.abs() / 16 + scale[row, column] * 2**-7).all()


def test_a_block_of_zeros_stays_zero():
    found, scale = quantize(torch.zeros(128, 128))
    assert not found.float().any() and scale.isfinite().all()


def test_only_linear_weights_of_layers_are_quantized():
    """Embedding, head, norms and biases are what the rest of the model reads in bf16."""
    kept = ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.input_layernorm.weight", "model.norm.weight",
            "model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"]  # fmt: skip
    linear = [f"model.layers.11.{name}_proj.weight" for name in ("self_attn.q", "self_attn.o", "mlp.gate", "mlp.down")]
    found = dict(to_fp8([(name, torch.ones(4, 4)) for name in kept + linear]))
    assert {name for name, tensor in found.items() if tensor.dtype == torch.bfloat16} == {*kept}
    assert {name for name, tensor in found.items() if tensor.dtype == torch.float8_e4m3fn} == {*linear}
    assert found.keys() == {*kept, *linear, *(f"{name}_scale_inv" for name in linear)}


def test_the_config_says_so():
    """What else it says stays."""
    files = with_quantization({"config.json": b'{"vocab_size": 7}', "tokenizer.json": b"{}"})
    config = json.loads(files["config.json"])
    assert config["vocab_size"] == 7 and config["quantization_config"]["quant_method"] == "fp8"
    assert files["tokenizer.json"] == b"{}"
