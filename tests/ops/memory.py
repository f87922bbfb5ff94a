"""What a function allocates, as torch's CPU allocator tells it to the profiler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Allocated(NamedTuple):
    """In bytes."""

    peak: int  # beyond what there was before
    largest: int  # of a single tensor


def allocated(function: Callable[[], Any]) -> Allocated:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = largest = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()  # negative where memory is given back
        peak, largest = max(peak, live), max(largest, event.nbytes())
    return Allocated(peak, largest)
