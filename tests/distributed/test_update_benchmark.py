"""tools/benchmarks/update.py: what it calls the model's work is what torch counts, and what it times trains."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from on_update import counted, row, trained, update, update_work

pytestmark = [pytest.mark.tools, pytest.mark.ranks]
MATRICES = ("aten.mm", "aten.addmm", "aten.addmm_")


@pytest.mark.parametrize("work", [(4, 8, 25, 64), (6, 9, 40, 1000)])
def test_operations_are_those_that_torch_counts(work, ranks1):
    """Of matrices exactly, with those of the partition function (three matrices of the prompts' means), which we leave
    out. torch's formula for attention is of all pairs, ours of the half that a causal mask leaves, and ours is of
    forward and backward."""
    found, ours, partition = ranks1.run(counted, "tiny", work)[0]
    assert sum(found.get(kernel, 0) for kernel in MATRICES) == ours["layers"] + ours["head"] + 6 * work[0] * partition
    attention = sum(n for kernel, n in found.items() if "attention" in kernel and "backward" not in kernel)
    assert attention / 2 == ours["attention"] / 3


def test_a_whole_model_has_the_operations_of_its_parameters():
    """6 N a token is what Qwen2.5-1.5B's card makes of it: 1.31 billion parameters without the embedding."""
    arch = update_work.SHAPES["1.5b"]
    one = update_work.training_flops(arch, update_work.Work(1, 1, 1, 1))
    assert one["layers"] / 6 == pytest.approx(1.31e9, rel=0.005)
    assert (one["layers"] + one["head"]) / 6 == pytest.approx(1.54e9, rel=0.005)


def test_the_planned_memory_has_18_bytes_a_parameter():
    """Of the card's 1.54 billion, and then what a row keeps: at least its input to each norm."""

    def planned(*work):
        return update_work.planned_bytes(arch, update_work.Work(*work))

    arch = update_work.SHAPES["1.5b"]
    assert planned(1, 1, 1, 1) / 18 == pytest.approx(1.54e9, rel=0.005)
    assert planned(9, 256, 1, 8192) - planned(1, 256, 1, 8192) > 8 * 256 * arch.layers * 2 * 2 * arch.hidden
    assert planned(99, 256, 1, 9 * 256) == planned(9, 256, 1, 8192), "of one micro-batch"


def test_the_cut_model_has_a_head_in_proportion():
    """Its reason to be: the head's share of the work is that of the whole model, 28 layers and 152064 tokens."""
    cut, work = update_work.SHAPES["7b-layers"], update_work.Work(1, 256, 1793, 1)
    whole = update_work._shape(28, cut.hidden, cut.heads, cut.kv_heads, cut.ffn, 152064, tied=False)
    shares = [found["head"] / sum(found.values()) for found in
              (update_work.training_flops(arch, work) for arch in (cut, whole))]  # fmt: skip
    assert shares[0] == pytest.approx(shares[1], rel=0.01)


def test_what_is_timed_moves_the_weights(ranks1):
    seconds, moved = ranks1.run(trained, (4, 8, 25, 64))[0]
    assert len(seconds) == 2 and min(seconds) > 0
    assert moved


@pytest.mark.parametrize(("gpu", "peaks"), [("NVIDIA H100 80GB HBM3", (989.4, 1978.9)), ("NVIDIA H100 PCIe", None)])
def test_no_peak_is_made_up(gpu, peaks):
    """The PCIe card is another one, with another peak."""
    found = tuple(update_work.peak_tflops(gpu, precision) for precision in ("bf16", "tensorwise"))
    assert found == (peaks or (None, None))


def test_a_row_counts_the_rows_that_are_computed(ranks1):
    """32 of each sequence's 33 tokens: its last one is no input."""
    work = ["--shape=tiny", "--precision=fp32", "--sequences=4", "--prompt=8", "--response=25", "--rounds=1"]
    found = ranks1.run(row, work)[0]
    assert found["tokens_per_second"] == pytest.approx(4 * 32 / found["seconds_per_update"])
    assert found["mfu"] is None


def test_the_command_names_what_did_not_run(tmp_path: Path, monkeypatch, capsys):
    """A precision each in a process, here two that only say what they would: a figure, and the reason for none."""
    python = tmp_path / "python"
    made = {"precision": "bf16", "tokens_per_second": 10, "seconds_per_update": 1, "tflops": 1, "mfu": 0.5}
    python.write_text(
        "#!/bin/sh\nwhile [ $# -gt 2 ]; do [ $1 = --precision ] && p=$2; shift; done\n"
        f"[ $p = bf16 ] || {{ echo out of memory >&2; exit 1; }}\necho '{json.dumps(made | {'peak_bytes': 0})}' > $2\n"
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(sys, "argv", ["update.py", "--precision", "bf16", "blockwise", "--json", f"{tmp_path}/rows"])
    update.main()
    bf16, fp8 = json.loads((tmp_path / "rows").read_text())["rows"]
    assert bf16["faster_than_bf16"] == 1 and fp8["not_run"] == "out of memory"
    assert "blockwise     not run: out of memory" in capsys.readouterr().out
