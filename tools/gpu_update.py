"""One update in bf16 with Transformer Engine's layers, looked at closely, for tools/gpu_check.sh.

    NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 python tools/gpu_update.py TRACE.json.gz [--shape 7b-layers] [--sequences 16] ...

Which backend Transformer Engine chose for attention; how often the host waits for the GPU, in an update and in one of
half as many micro-batches; the peak of memory beside what update_work.planned_bytes says; and a profiler's trace. The
last line printed is JSON, an entry for each; what cannot be had is an entry with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
WARM_UP = 2
SHOWN = 5  # lines that wait, kernels that take longest


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Attention backend, host waits, peak memory and trace of an update.")
    parser.add_argument("trace", type=Path, help="the profiler's trace, gzipped, for chrome://tracing or Perfetto")
    parser.add_argument("--shape", default="7b-layers", help="of tools/benchmarks/update_work.py")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=1793, help="tokens; rows are prompt + response - 1")
    parser.add_argument("--microbatch-tokens", type=int, default=8192)
    return parser


def main() -> None:
    options = parser().parse_args()
    sys.path[:0] = [str(REPO), str(REPO / "tools" / "benchmarks")]
    import update_work

    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.parallel.launch import rank_environment

    chosen = Backends()
    logging.getLogger("DotProductAttention").addHandler(chosen)
    os.environ.update(rank_environment(0, 1))
    config = update_work.settings(options.precision, first_last_bf16=False)
    layout = layouts.init(config.parallel, config.seed)
    work = update_work.Work(options.sequences, options.prompt, options.response, options.microbatch_tokens)
    job = update_work.trainer(update_work.SHAPES[options.shape], config, layout)
    batches = update_work.recorded(job.models.policy.arch, work, layout)
    for _ in range(WARM_UP):
        job.update(batches)
    planned = update_work.planned_bytes(job.models.policy.arch, work)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "attention": lambda: {"backends": sorted(chosen.found)},
        "waits": lambda: waits(lambda part: job.update(batches[:part]), len(batches)),
        "memory": lambda: {"peak": peak(lambda: job.update(batches)), "planned": planned},
        "trace": lambda: profile(lambda: job.update(batches), options.trace),
    }
    found = {name: attempted(part) for name, part in parts.items()}
    layouts.shutdown()
    print(json.dumps(found))


def attempted(part: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return part()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}".split("\n")[0]}


class Backends(logging.Handler):
    """Keeps what Transformer Engine's attention says that it is running with; it does with NVTE_DEBUG=1."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        before, running, name = record.getMessage().partition("Running with ")
        if running and not before and "backend" in name:
            self.found.add(name.replace(" backend", ""))


def waits(update: Callable[[int], Any], count: int) -> dict[str, Any]:
    """Of an update of `count` micro-batches, of one of half as many, and by line of the former."""
    import torch

    by_line = {}
    for part in (count, count // 2):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                update(part)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        lines = [
            f"{Path(w.filename).name}:{w.lineno}" for w in caught if "synchronizing CUDA operation" in str(w.message)
        ]
        by_line[part] = Counter(lines)
    whole, half = by_line[count], by_line[count // 2]
    each = (whole.total() - half.total()) / (count - count // 2)
    return {"update": whole.total(), "micro_batches": count, "each": each, "lines": whole.most_common(SHOWN)}


def peak(update: Callable[[], Any]) -> int:
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    update()
    return torch.cuda.max_memory_allocated()


def profile(update: Callable[[], Any], trace: Path) -> dict[str, Any]:
    """Of one update; the share of it that the GPU was busy, and its longest kernels."""
    import torch
    from torch.profiler import DeviceType, ProfilerActivity

    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
        torch.cuda.synchronize()
        began = time.perf_counter()
        update()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - began
    plain = trace.with_suffix("")
    found.export_chrome_trace(str(plain))
    trace.write_bytes(gzip.compress(plain.read_bytes()))
    plain.unlink()
    kernels: Counter[str] = Counter()
    for event in found.events():
        if event.device_type == DeviceType.CUDA:
            kernels[event.name[:60]] += event.self_device_time_total
    longest = [(name, us / 1e6) for name, us in kernels.most_common(SHOWN)]
    busy = kernels.total() / 1e6 / seconds
    return {"seconds": seconds, "busy": busy, "longest": longest, "bytes": trace.stat().st_size}


if __name__ == "__main__":
    main()
