"""What ranks run to see whether copies of log Z stay the same where a GPU's sums would differ in the last bits."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from on_ranks import start
from torch import Tensor

from flowrl_mega.experience import Experience
from flowrl_mega.model import policy
from flowrl_mega.parallel import schedule


def trained(path: Path, steps: list[Experience], case: dict[str, Any], averaged: bool) -> dict[str, Tensor]:
    """Weights of the partition function and the value head, whose inputs rank 1 has summed in another order."""
    job, real = start(path, **case), policy.prompt_mean_parts

    def prompt_mean_parts(*args: Any) -> tuple[Tensor, Tensor]:
        sums, tokens = real(*args)
        return sums * (1 + 1e-6 * dist.get_rank() * torch.linspace(-1, 1, sums.shape[1])), tokens

    with ExitStack() as patches:
        patches.enter_context(patch.object(policy, "prompt_mean_parts", prompt_mean_parts))
        if not averaged:
            patches.enter_context(patch.object(schedule, "_average_over_tp", lambda model: None))
        for step in steps:
            for mini_batch in job.trainer.micro_batches(step):
                job.trainer.update(mini_batch)
    (stage,) = job.models.policy.stages
    heads = {name: p.detach().clone() for name, p in stage.named_parameters() if not name.startswith("gpt.")}
    job.close()
    return heads
