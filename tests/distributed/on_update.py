"""What a rank runs to count the floating-point operations of the update benchmark."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from flowrl_mega.parallel import layout as layouts

TOOLS = Path(__file__).parents[2] / "tools" / "benchmarks"
sys.path.insert(0, str(TOOLS))

import update  # noqa: E402
import update_work  # noqa: E402

aten = torch.ops.aten
# What its counter does not look for.
ALSO = {
    aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1],
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
}


def counted(shape: str, work: tuple[int, int, int, int]) -> tuple[dict[str, int], dict[str, float], int]:
    """torch's count of one update by kernel, ours by part, and the weights of the partition function's matrices."""
    config = update_work.settings("fp32", first_last_bf16=False)
    layout = layouts.init(config.parallel, config.seed)
    arch, what = update_work.SHAPES[shape], update_work.Work(*work)
    trainer = update_work.trainer(arch, config, layout)
    batches = update_work.recorded(arch, what, layout)
    with FlopCounterMode(display=False, custom_mapping=ALSO) as counter:
        trainer.update(batches)
    found: Counter[str] = Counter()
    for kernel, operations in counter.get_flop_counts()["Global"].items():
        found[str(kernel)] += operations
    matrices = sum(p.numel() for p in trainer.models.policy.partition.parameters() if p.dim() == 2)
    return dict(found), update_work.training_flops(arch, what), matrices


def trained(work: tuple[int, int, int, int]) -> tuple[list[float], bool]:
    """Seconds of two updates, and whether all weights have moved."""
    config = update_work.settings("fp32", first_last_bf16=False)
    layout = layouts.init(config.parallel, config.seed)
    arch = update_work.SHAPES["tiny"]
    trainer = update_work.trainer(arch, config, layout)
    before = [p.detach().clone() for _, p in trainer.models.policy.named_parameters() if p.dim() == 2]
    seconds = update_work.seconds_of_updates(trainer, update_work.recorded(arch, update_work.Work(*work), layout), 1, 2)
    after = [p for _, p in trainer.models.policy.named_parameters() if p.dim() == 2]
    return seconds, not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def row(arguments: list[str]) -> dict[str, Any]:
    """What the tool's own process for one precision gives."""
    return update.measure(update.parser().parse_args(arguments))
