"""Metrics that say how they reduce.

Whoever makes a metric wraps its values in one of these types, which say what becomes of them over an update (all its
micro-batches, on all data-parallel ranks) and over the updates of a step. monitor/step_metrics.py does the reducing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

import torch
from torch import Tensor


class Mean:
    """The mean over an update's sequences; over a step's updates, the mean of theirs.

    values: [B], one for each sequence of a micro-batch, or a sum that was taken over `count` sequences, or a number of
    the whole update. They are detached: a metric must not keep a micro-batch's graph alive.
    """

    def __init__(self, values: Tensor | float, count: int | None = None) -> None:
        self.values: Final = _detached(values)
        self.count: Final = self.values.numel() if count is None else count

    # A mean is made of itself alone, where `FromMeans` is made of several.
    figure = staticmethod(float)

    @property
    def means(self) -> tuple[Mean, ...]:
        return (self,)


class Max:
    """The largest value of an update; over a step's updates, the largest of theirs. For counters, too."""

    def __init__(self, values: Tensor | float) -> None:
        self.values: Final = _detached(values)


class FromMeans:
    """A figure of an update's means, such as a ratio or a variance; over a step's updates, the mean of theirs.

    `figure` gets each of `means` reduced over the whole update, in order. Means of the micro-batches' own figures would
    differ: a ratio of means is not a mean of ratios.
    """

    def __init__(self, figure: Callable[..., float], *means: Mean) -> None:
        self.figure: Final = figure
        self.means: Final = means


class GroupGap:
    """The mean over an update's prompts of |the mean over the prompt's answers|; over a step's updates, the mean of
    theirs. What is noise from answer to answer averages out, what the answers to a prompt share stays.

    values: [B], one for each sequence of a micro-batch.  group: [B], its prompt's number among the step's `groups`.
    """

    def __init__(self, values: Tensor, group: Tensor, groups: int) -> None:
        parts = torch.stack([values.detach().double(), torch.ones_like(values, dtype=torch.float64)])
        self.values: Final = parts[0]
        self.sums: Final = parts.new_zeros(2, groups).index_add_(1, group, parts)  # of the values, and of ones


Metric = Mean | Max | FromMeans | GroupGap
Report = Mapping[str, Metric]  # of one micro-batch
Update = Mapping[str, Mean | Max]  # of one update, each metric a single number


def _detached(values: Tensor | float) -> Tensor:
    return values.detach() if isinstance(values, Tensor) else torch.tensor(values, dtype=torch.float64)
