"""Wrong input: one ValueError that names the thing, its value and the fix, before any kernel runs."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowrl_mega.ops import Shard, checks, lm_head_logprob, logprob

CPU = torch.device("cpu")
ROWS, COLUMNS = 4, 10


def logits(**changes: Any) -> torch.Tensor:
    return torch.randn(ROWS, COLUMNS, **changes)


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


GOOD: dict[str, Any] = {"logits": logits(), "target": ids(0, 9, -100, 3), "cu_seqlens": ids(0, 1, 4)}

# what is wrong -> (the arguments that differ from GOOD, what the message must say)
LOGPROB: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a vector": ({"logits": torch.randn(10)}, ["logits", "[10]", "[T, V] or [B, S, V] is wanted"]),
    "four dimensions": ({"logits": torch.randn(1, 1, 4, 10)}, ["logits", "[1, 1, 4, 10]", "[B, S, V] is wanted"]),
    "a batch with a flat target": ({"logits": torch.randn(1, 4, 10)}, ["target", "[4]", "[1, 4] is wanted"]),
    "a batch that overlaps": (
        {"logits": torch.randn(70).as_strided((2, 4, 10), (15, 10, 1)), "target": ids(*range(8)).view(2, 4)},
        ["logits", "overlap", "stride 15", ".contiguous()"],
    ),
    "id too large in a batch": (
        {"logits": torch.randn(2, 2, 10), "target": ids(0, 1, 10, 3).view(2, 2)},
        ["target[1, 0] = 10", "0..9"],
    ),
    "integer logits": ({"logits": torch.ones(4, 10, dtype=torch.long)}, ["logits", "torch.int64", "bfloat16"]),
    "complex logits": ({"logits": logits(dtype=torch.complex64)}, ["logits", "torch.complex64", "float32"]),
    "columns apart": ({"logits": torch.randn(10, 4).t()}, ["logits", "stride 4 between columns", ".contiguous()"]),
    "every other column": ({"logits": torch.randn(4, 20)[:, ::2]}, ["stride 2 between columns", ".contiguous()"]),
    "expanded rows": ({"logits": torch.randn(1, 10).expand(4, 10)}, ["logits", "overlap", "stride 0", ".contiguous()"]),
    "sliding rows": ({"logits": torch.randn(20).unfold(0, 10, 3)}, ["logits", "overlap", "stride 3", ".contiguous()"]),
    "id too large": ({"target": ids(0, 9, 10, 3)}, ["target[2] = 10", "0..9", "-100 (ignored)"]),
    "negative id": ({"target": ids(0, -1, 2, 3)}, ["target[1] = -1", "0..9", "-100 (ignored)"]),
    "id of the padding": ({"target": ids(0, 9, 2, 3), "vocab_valid": 9}, ["target[1] = 9", "0..8"]),
    "another ignore_index": ({"target": ids(0, -100, 2, 3), "ignore_index": -1}, ["target[1] = -100", "-1 (ignored)"]),
    "int16 target": ({"target": ids(0, 1, 2, 3).short()}, ["target", "torch.int16", "int64 or int32"]),
    "float target": ({"target": ids(0, 1, 2, 3).float()}, ["target", "torch.float32", "int64"]),
    "one target too few": ({"target": ids(0, 1, 2)}, ["target", "[3]", "[4] is wanted"]),
    "target as a column": ({"target": ids(0, 1, 2, 3)[:, None]}, ["target", "[4, 1]", "[4] is wanted"]),
    "target elsewhere": ({"target": ids(0, 1, 2, 3).to("meta")}, ["target is on meta", "cpu", "move"]),
    "offsets end early": ({"cu_seqlens": ids(0, 1, 3)}, ["cu_seqlens = [0, 1, 3]", "rise from 0 to 4"]),
    "offsets end late": ({"cu_seqlens": ids(0, 1, 5)}, ["cu_seqlens = [0, 1, 5]", "rise from 0 to 4"]),
    "offsets start late": ({"cu_seqlens": ids(1, 4)}, ["cu_seqlens = [1, 4]", "rise from 0 to 4"]),
    "offsets fall": ({"cu_seqlens": ids(0, 3, 1, 4)}, ["cu_seqlens = [0, 3, 1, 4]", "rise from 0 to 4"]),
    "no offsets": ({"cu_seqlens": ids()}, ["cu_seqlens", "[0]", "[B + 1] is wanted"]),
    "offsets in a matrix": ({"cu_seqlens": ids(0, 4)[None]}, ["cu_seqlens", "[1, 2]", "[B + 1] is wanted"]),
    "float offsets": ({"cu_seqlens": ids(0, 4).float()}, ["cu_seqlens", "torch.float32", "int64"]),
    "offsets elsewhere": ({"cu_seqlens": ids(0, 4).to("meta")}, ["cu_seqlens is on meta", "cpu", "move"]),
    "temperature 0": ({"temperature": 0.0}, ["temperature = 0.0", "above 0"]),
    "temperature below 0": ({"temperature": -1}, ["temperature = -1", "above 0"]),
    "temperature NaN": ({"temperature": float("nan")}, ["temperature = nan", "above 0"]),
    "temperature of a row 0": ({"temperature": torch.tensor([1.0, 1, 0, 1])}, ["temperature[2] = 0.0", "above 0"]),
    "temperatures too few": ({"temperature": torch.ones(3)}, ["temperature", "[3]", "a number or [4]"]),
    "vocab_valid too large": ({"vocab_valid": 11}, ["vocab_valid = 11", "0..10"]),
    "vocab_valid below 0": ({"vocab_valid": -1}, ["vocab_valid = -1", "0..10"]),
}


@pytest.mark.parametrize("wrong", LOGPROB)
def test_logprob_refuses(wrong, backend):
    """The same words whatever the kernels."""
    changes, parts = LOGPROB[wrong]
    with pytest.raises(ValueError) as refused:
        logprob(**{**GOOD, **changes}, backend=backend)
    message = str(refused.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


HEAD_GOOD: dict[str, Any] = {
    "hidden": torch.randn(6, 3),
    "weight": torch.randn(10, 3),
    "target": ids(0, 9, -100, 3),
    "rows": ids(0, 2, 4, 5),
}
HEAD: dict[str, tuple[dict[str, Any], list[str]]] = {
    "hidden states of four dimensions": ({"hidden": torch.randn(6, 1, 1, 3)}, ["hidden [6, 1, 1, 3]", "[T, H]"]),
    "rows of a batch": ({"hidden": torch.randn(6, 1, 3)}, ["hidden [6, 1, 3]", "rows", ".flatten(0, 1)"]),
    "another width": ({"weight": torch.randn(10, 4)}, ["hidden [6, 3], weight [10, 4]", "one H"]),
    "a transposed weight": ({"weight": torch.randn(3, 10)}, ["weight [3, 10]", "[V, H]"]),
    "temperatures of all rows": ({"temperature": torch.ones(6)}, ["temperature", "[6]", "a number or [4]"]),
    "integers": (
        {"hidden": torch.ones(6, 3).long(), "weight": torch.ones(10, 3).long()},
        ["torch.int64", "floating"],
    ),
    "rows as a mask": ({"rows": torch.ones(6, dtype=torch.bool)}, ["rows", "torch.bool", "int64 of [R]"]),
    "rows in a matrix": ({"rows": ids(0, 2, 4, 5)[None]}, ["rows", "[1, 4]", "[R]"]),
    "a target for each row of hidden": ({"target": ids(0, 1, 2, 3, 4, 5)}, ["target", "[6]", "[4] is wanted"]),
    "id too large": ({"target": ids(0, 1, 2, 10)}, ["target[3] = 10", "0..9"]),
    "id beyond all shards": ({"target": ids(0, 1, 2, 20), "shard": Shard(10, 10, 20)}, ["target[3] = 20", "0..19"]),
    "more ids than rows": ({"shard": Shard(0, 11, 11)}, ["vocab_valid = 11", "0..10"]),
    "offsets": ({"cu_seqlens": ids(0, 6)}, ["cu_seqlens = [0, 6]", "rise from 0 to 4"]),
    "temperature": ({"temperature": 0}, ["temperature = 0", "above 0"]),
    "a bias for each row": ({"bias": torch.zeros(6)}, ["bias", "[6]", "[10]"]),
    "a bias of integers": ({"bias": torch.zeros(10).long()}, ["bias", "torch.int64", "floating"]),
    "a bias elsewhere": ({"bias": torch.zeros(10, device="meta")}, ["bias", "on meta", "cpu"]),
    "logit_scale 0": ({"logit_scale": 0.0}, ["logit_scale = 0.0", "above 0"]),
    "logit_scale NaN": ({"logit_scale": float("nan")}, ["logit_scale = nan", "above 0"]),
    "softcap below 0": ({"softcap": -30.0}, ["softcap = -30.0", "above 0"]),
    "softcap without end": ({"softcap": float("inf")}, ["softcap = inf", "finite"]),
}


@pytest.mark.parametrize("wrong", HEAD)
def test_the_head_refuses(wrong, backend):
    """Before the product, which would name neither."""
    changes, parts = HEAD[wrong]
    with pytest.raises(ValueError) as refused:
        lm_head_logprob(**{**HEAD_GOOD, **changes}, backend=backend)
    message = str(refused.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def test_rows_beyond_the_hidden_states_raise():
    """torch itself refuses them."""
    with pytest.raises(IndexError):
        lm_head_logprob(**{**HEAD_GOOD, "rows": ids(0, 2, 4, 6)}, backend="torch")


def test_what_is_not_refused(backend):
    """Megatron's int32 offsets, strided targets and offsets, an ignored row, a target of another shard."""
    pairs = torch.stack([GOOD["target"], GOOD["target"]], 1)
    offsets = torch.stack([GOOD["cu_seqlens"], GOOD["cu_seqlens"]], 1)
    wanted = logprob(**GOOD, backend=backend)
    for changes in ({"cu_seqlens": GOOD["cu_seqlens"].int()}, {"target": pairs[:, 0], "cu_seqlens": offsets[:, 1]}):
        found = logprob(**{**GOOD, **changes}, backend=backend)
        assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))
    lm_head_logprob(**{**HEAD_GOOD, "target": pairs[:, 0], "shard": Shard(10, 10, 20)}, backend=backend)


def test_on_cpu_nothing_is_left_for_later():
    """raise_if_flagged is for devices whose values the host cannot see."""
    checks.raise_if_flagged()
    assert not checks._FLAGS


def test_a_flag_raised_on_a_device_is_told_once(monkeypatch):
    """A CUDA call only leaves a flag; the trainer asks for it where it waits for the device anyway."""
    flag = torch.tensor(True)
    monkeypatch.setitem(checks._FLAGS, torch.device("cuda", 0), flag)
    with pytest.raises(ValueError, match="target.*cu_seqlens.*out of range in an earlier call on cuda:0"):
        checks.raise_if_flagged()
    checks.raise_if_flagged()


@pytest.mark.parametrize("first", [torch.inference_mode, torch.no_grad, torch.enable_grad])
@pytest.mark.parametrize("then", [torch.inference_mode, torch.enable_grad])
def test_a_flag_made_in_any_mode_serves_in_any_other(first, then, monkeypatch):
    """Scoring under inference_mode often comes first, training after it."""
    monkeypatch.setattr(checks, "_FLAGS", {})
    with first():
        checks._flag(CPU).logical_or_(torch.tensor(False))
    with then():
        checks._flag(CPU).logical_or_(torch.tensor(True))
        with pytest.raises(ValueError, match="out of range"):
            checks.raise_if_flagged()
    checks.raise_if_flagged()
