"""What ranks run to see what settings of the section `megatron` do."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import flowrl_mega.parallel  # noqa: F401  before megatron is imported

# isort: split
from megatron.core.pipeline_parallel import schedules
from megatron.core.tensor_parallel import random
from megatron.core.transformer.mlp import MLP
from on_layouts import Trained, walk
from torch import Tensor

from flowrl_mega.experience import Experience
from flowrl_mega.model.layers import PackedAttention


class Seen(NamedTuple):
    """What was trained, and how often this rank called what the settings are about."""

    trained: Trained
    calls: Counter[str]


def watched(path: Path, steps: list[Experience], case: dict[str, Any]) -> Seen:
    with counted() as calls:
        (trained,) = walk(path, steps, [case])
    return Seen(trained, calls)


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Forwards of attention and MLP, outputs let go once they are sent, saved inputs gathered from shards."""
    calls: Counter[str] = Counter()

    def counting(name: str, function: Any) -> Any:
        def counts(*args: Any, **kwargs: Any) -> Any:
            calls[name] += 1
            return function(*args, **kwargs)

        return counts

    def letting_go(output: Any, wanted: bool = False) -> Any:
        let_go(output, wanted)
        calls["let go"] += bool(wanted) and isinstance(output, Tensor) and output.numel() == 1

    let_go = schedules.deallocate_output_tensor
    with (
        patch.object(PackedAttention, "forward", counting("attention", PackedAttention.forward)),
        patch.object(MLP, "forward", counting("mlp", MLP.forward)),
        patch.object(random, "gather_split_1d_tensor", counting("gathered", random.gather_split_1d_tensor)),
        patch.object(schedules, "deallocate_output_tensor", letting_go),
    ):
        yield calls
