"""The update phase of a FlowRL step: forward, backward and optimizer on recorded rollouts; tokens/s and MFU.

    python tools/benchmarks/update.py --shape 7b-layers --precision bf16-local bf16 delayed tensorwise blockwise
    python tools/benchmarks/update.py --shape 1.5b --precision bf16 tensorwise

Each precision is a process of its own, with random weights. MFU is the model's floating-point operations
(update_work.training_flops) over the time and the GPU's dense peak: of bf16, and for FP8 of FP8. The row "x bf16" is
the speed against bf16 in the same run. A precision that cannot run is named with the reason.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from workload import machine, write

PACKAGES = ("torch", "megatron-core")
SHAPES = ("7b-layers", "1.5b", "tiny")
PRECISIONS = ("fp32", "bf16-local", "bf16", "delayed", "tensorwise", "blockwise")
WARM_UP = 3  # FP8's delayed scales come from the updates before


def main() -> None:
    options = parser().parse_args()
    if options.out:
        Path(options.out).write_text(json.dumps(measure(options)))
        return
    rows = [in_own_process(options, precision) for precision in options.precision]
    compare(rows)
    print(f"{options.shape}: {options.sequences} x ({options.prompt} + {options.response}) tokens an update")
    print(f"{'precision':<12}{'s/update':>10}{'tokens/s':>12}{'TFLOP/s':>10}{'MFU':>8}{'x bf16':>8}{'peak GiB':>10}")
    for row in rows:
        show(row)
    write(options.json, machine(*PACKAGES) | {"transformer_engine": te_version()}, rows)
    if all("not_run" in row for row in rows):
        sys.exit("update: none of the precisions could run here")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Tokens/s and MFU of an update, by precision.")
    parser.add_argument("--shape", choices=SHAPES, default="7b-layers")
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS[1:]))
    parser.add_argument("--first-last-bf16", action="store_true", help="as a run has it: not all layers in FP8")
    parser.add_argument("--sequences", type=int, default=32)
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--response", type=int, default=1793, help="tokens; rows are prompt + response - 1")
    parser.add_argument("--microbatch-tokens", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5, help=f"timed updates, after {WARM_UP} of warm-up")
    parser.add_argument("--recompute", action="store_true", help="activations made again in the backward pass")
    parser.add_argument("--json")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser


def in_own_process(options: argparse.Namespace, precision: str) -> dict[str, Any]:
    """The row of one precision; where it failed, `not_run` with the last line of what it said."""
    given = [f"--{name}={getattr(options, name.replace('-', '_'))}" for name in
             ("shape", "sequences", "prompt", "response", "microbatch-tokens", "rounds")]  # fmt: skip
    given += [f"--{name}" for name in ("first-last-bf16", "recompute") if getattr(options, name.replace("-", "_"))]
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "row.json"
        command = [sys.executable, __file__, *given, "--precision", precision, "--out", str(out)]
        done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
        if done.returncode == 0:
            return json.loads(out.read_text())
    said = [line.strip() for line in done.stderr.splitlines() if line.strip()] or [f"exit code {done.returncode}"]
    return {"shape": options.shape, "precision": precision, "not_run": said[-1][:300]}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In its own process: the row of one precision."""
    import torch
    import update_work as work_of

    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.parallel.launch import rank_environment

    os.environ.update(rank_environment(0, 1))
    (precision,) = options.precision
    recompute = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    config = work_of.settings(precision, options.first_last_bf16, recompute if options.recompute else None)
    layout = layouts.init(config.parallel, config.seed)
    arch = work_of.SHAPES[options.shape]
    work = work_of.Work(options.sequences, options.prompt, options.response, options.microbatch_tokens)
    job = work_of.trainer(arch, config, layout)
    seconds = work_of.seconds_of_updates(job, work_of.recorded(arch, work, layout), WARM_UP, options.rounds)
    cuda = layout.device.type == "cuda"
    median, flops = statistics.median(seconds), work_of.training_flops(arch, work)
    peak = work_of.peak_tflops(torch.cuda.get_device_name() if cuda else None, precision)
    tflops = sum(flops.values()) / median / 1e12
    layouts.shutdown()
    return {
        "shape": options.shape,
        "architecture": {name: value for name, value in vars(arch).items() if isinstance(value, int | float | str)},
        "precision": precision,
        "settings": config.model.model_dump(),
        "recompute": options.recompute,
        **work._asdict(),
        "seconds": seconds,
        "seconds_per_update": median,
        "tokens_per_second": work.sequences * work.rows / median,
        "flops": flops,
        "tflops": tflops,
        "peak_tflops": peak,
        "mfu": peak and tflops / peak,
        "peak_bytes": torch.cuda.max_memory_allocated() if cuda else None,
    }


def compare(rows: list[dict[str, Any]]) -> None:
    """Adds the speed against Transformer Engine's bf16, where both ran."""
    bf16 = next((row["tokens_per_second"] for row in rows if row["precision"] == "bf16" and "mfu" in row), None)
    for row in rows:
        if bf16 and "mfu" in row:
            row["faster_than_bf16"] = row["tokens_per_second"] / bf16


def show(row: dict[str, Any]) -> None:
    if "not_run" in row:
        print(f"{row['precision']:<12}  not run: {row['not_run']}")
        return
    mfu = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
    ratio = f"{row['faster_than_bf16']:.2f}" if "faster_than_bf16" in row else ""
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.1f}"
    rates = f"{row['seconds_per_update']:>10.3f}{row['tokens_per_second']:>12,.0f}{row['tflops']:>10.1f}"
    print(f"{row['precision']:<12}{rates}{mfu:>8}{ratio:>8}{memory:>10}")


def te_version() -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("transformer-engine")
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
