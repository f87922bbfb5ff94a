"""Time and memory of several providers that do the same work on the same tensors.

A provider is a function of (leaves..., target) that returns log-probs with a gradient, and the entropy (or None).
"""

from __future__ import annotations

import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from resident_memory import resident_growth
from torch import Tensor
from workload import turns

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PASSES = ("forward", "forward+backward")
Provider = Callable[..., tuple[Tensor, Tensor | None]]


class NotRun(Exception):
    """Why a provider is not part of this run."""


class Case(NamedTuple):
    """What a provider is given. Never handed out itself: providers may overwrite their input."""

    leaves: tuple[Tensor, ...]  # what gradients are asked for: (logits [T, V],) or (hidden [T, H], weight [V, H])
    target: Tensor  # [T] int64
    upstream: Tensor  # [T] fp32, gradient of the loss with respect to each log-prob

    def fresh(self) -> Case:
        return self._replace(leaves=tuple(leaf.clone() for leaf in self.leaves))


class Result(NamedTuple):
    logp: Tensor  # [T]
    entropy: Tensor | None  # [T]
    gradients: tuple[Tensor, ...]  # of the leaves; empty after "forward"


class Setting(NamedTuple):
    """One comparison: who takes part, with what input, measured against what."""

    title: str
    providers: dict[str, Callable[[str], Provider]]  # a loader each: given the device, it may raise NotRun
    case: Case
    shape: dict[str, Any]  # what describes it in a row of the results
    floor: Callable[[str], dict[str, Callable[[Case], Any]]]  # of a pass: works to time
    floor_seconds: Callable[[str, dict[str, float]], float]  # of a pass and those works' seconds
    floor_work: tuple[float, str]  # amount and unit of the forward pass; forward and backward is three times that
    errors: Callable[[Case, Result], dict[str, Any]]  # of each output, against the oracle


def step(provider: Provider, case: Case, pass_: str) -> Result:
    """One call: without gradient, or with it and the backward pass.

    Gradients are asked for by autograd.grad: `.grad` of a leaf would copy the gradient that a provider wrote in place.
    """
    if pass_ == "forward":
        with torch.no_grad():
            logp, entropy = provider(*case.leaves, case.target)
        return Result(logp, entropy, ())
    leaves = [leaf.requires_grad_() for leaf in case.leaves]
    logp, entropy = provider(*leaves, case.target)
    return Result(logp.detach(), entropy, torch.autograd.grad(logp, leaves, case.upstream.to(logp.dtype)))


def interleaved(works: dict[str, Callable[[Case], Any]], case: Case, rounds: int) -> dict[str, float]:
    """Median seconds of each. They take turns, each round begins with the next one; copies are made off the clock."""
    seconds: dict[str, list[float]] = {name: [] for name in works}
    for name in turns(works, rounds):
        seconds[name].append(_seconds(works[name], case.fresh()))
    return {name: statistics.median(values) for name, values in seconds.items()}


def _seconds(work: Callable[[Case], Any], case: Case) -> float:
    if not case.target.is_cuda:
        start = time.perf_counter()
        work(case)
        return time.perf_counter() - start
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    events[0].record()
    work(case)
    events[1].record()
    torch.cuda.synchronize()
    return events[0].elapsed_time(events[1]) / 1e3


def peak_extra_bytes(work: Callable[[Case], Any], case: Case) -> int:
    """The most that one call holds above its inputs (what it returns is counted). For a process that does only this.

    A first call, not counted, loads, compiles and builds. On CPU the figure is the growth of the resident set, so the
    process must be one whose malloc gives freed blocks back at once: see `memory_of`.
    """
    work(case.fresh())
    inputs = case.fresh()
    if case.target.is_cuda:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = work(inputs)  # noqa: F841
        return torch.cuda.max_memory_allocated() - before
    return resident_growth(lambda: work(inputs))


def memory_of(script: str, arguments: list[str]) -> int | None:
    """Run a benchmark script once more, in a fresh process that writes peak_extra_bytes to `--out`; None: it failed."""
    # Blocks above 64 KiB are mapped and unmapped one by one, so that the resident set is what is in use.
    malloc = {"MALLOC_MMAP_THRESHOLD_": str(64 << 10), "MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_TOP_PAD_": "0"}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "bytes.json"
        command = [sys.executable, script, *arguments, "--out", str(out)]
        done = subprocess.run(command, env=os.environ | malloc, stdout=subprocess.DEVNULL, timeout=1800, check=False)
        return json.loads(out.read_text()) if done.returncode == 0 else None
