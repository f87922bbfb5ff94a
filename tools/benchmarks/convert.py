"""Checkpoint conversion there and back, against a plain copy of the same bytes and against mbridge, in turns.

    python tools/benchmarks/convert.py [--gigabytes 1.5] [--shard-mb 250] [--rounds 5] [--providers NAME ...]
        [--folder DIR] [--json FILE]

A random bf16 Qwen2 is written by `save_pretrained`. A round: `copy` copies its files; `flowrl-mega` (the
converter's functions), `command` (tools/convert_ckpt.py, as users start it) and `mbridge` (through a stock GPTModel and
megatron.core.dist_checkpointing) convert it to a Megatron checkpoint, and that back. Each round begins with the next.

Every measurement is a process of its own. Its clock starts after its imports (`command`: before them) and stops when
all it wrote has been fsynced, by itself or by the benchmark. What is read has just been written, so it is in the page
cache for everyone; nothing else waits to be written. Memory is the growth of the resident set after the imports, mapped
files included. Whoever comes back with other bits ends the benchmark. Speeds and ratios are of medians over the rounds,
memory is the most of all rounds.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from convert_work import flush
from resident_memory import status_bytes
from workload import machine, turns, write

PROVIDERS = ("copy", "flowrl-mega", "command", "mbridge")
DIRECTIONS = ("hf2mcore", "mcore2hf")
COMMAND, WORK = Path(__file__).parents[1] / "convert_ckpt.py", Path(__file__).with_name("convert_work.py")
GOALS = {"speed_of_copy": 0.6, "peak_shards": 2.0}  # at least, at most; of flowrl-mega in either direction
Samples = dict[tuple[str, str], list[dict[str, float]]]  # of a provider and a direction, by round


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    import torch  # seconds, so only after the arguments have been looked at
    from convert_model import make, weight_files

    chosen = [name for name in PROVIDERS if name == "copy" or name in options.providers]
    not_run = {name: "not installed" for name in {"mbridge"} & {*chosen} if not importlib.util.find_spec(name)}
    providers = [name for name in chosen if name not in not_run]
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="convert-") as folder:
        source = Path(folder) / "source"
        make(source, int(options.gigabytes * 1e9), int(options.shard_mb * 1e6))
        sizes = [file.stat().st_size for file in weight_files(source)]
        samples: Samples = {}
        for provider in turns(providers, options.rounds):
            there_and_back(provider, source, Path(folder) / "work", samples)
    rows = summary(samples, sum(sizes), max(sizes))
    show(rows, not_run)
    header = machine(*packages(providers)) | {
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "page_cache": "warm: what is read has just been written",
        "bytes": sum(sizes),
        "shard_bytes": max(sizes),
        "files": len(sizes),
        "goals": GOALS,
        "not_run": not_run,
    }
    write(options.json, header, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Checkpoint conversion against a plain copy and against mbridge.")
    parser.add_argument("--gigabytes", type=float, default=1.5, help="size of the model")
    parser.add_argument("--shard-mb", type=float, default=250, help="size of its files, at most")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS, help="only these, and copy")
    parser.add_argument("--folder", help="a temporary folder is made here; needs four times the model's size")
    parser.add_argument("--json")
    return parser


def packages(providers: list[str]) -> list[str]:
    return ["torch", "megatron-core", "safetensors", *(name for name in providers if name == "mbridge")]


def there_and_back(provider: str, source: Path, folder: Path, samples: Samples) -> None:
    """Run one provider's part of a round and add it to `samples`; what it wrote is compared and deleted."""
    from convert_model import difference

    megatron, back = folder / "megatron", folder / "hf"
    folder.mkdir()
    steps = [("copy", source, back)]
    if provider != "copy":
        steps = list(zip(DIRECTIONS, (source, megatron), (megatron, back), strict=True))
    for direction, start, end in steps:
        samples.setdefault((provider, direction), []).append(measured(provider, direction, start, end))
    if found := difference(source, back):
        sys.exit(f"{provider}: what came back is not what was converted: {found}")
    shutil.rmtree(folder)


def measured(provider: str, direction: str, source: Path, target: Path) -> dict[str, float]:
    """One conversion, in a process of its own: its seconds and, where it reports it, memory."""
    os.sync()
    if provider == "command":
        given = {"hf2mcore": "--hf", "mcore2hf": "--ckpt"}[direction]
        start = time.perf_counter()
        run([sys.executable, str(COMMAND), direction, given, str(source), "--out", str(target)])
        flush(target)
        return {"seconds": time.perf_counter() - start}
    out = target.with_suffix(".json")
    anonymous = run([sys.executable, str(WORK), provider, direction, str(source), str(target), str(out)])
    found = json.loads(out.read_text())
    return found | {"anonymous_bytes": max(0, anonymous - found.pop("anonymous_before"))}


def run(command: list[str]) -> int:
    """Run to the end; the most anonymous memory that it was seen to hold (Linux keeps no such peak itself)."""
    most = 0
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        while process.poll() is None:
            with contextlib.suppress(OSError, StopIteration):  # it has just ended
                most = max(most, status_bytes("RssAnon", process.pid))
            time.sleep(0.005)
        if process.returncode:
            output.seek(0)
            sys.exit(f"{' '.join(command)}\nfailed with exit code {process.returncode}:\n{output.read()[-4000:]}")
    return most


def summary(samples: Samples, size: int, shard: int) -> list[dict[str, Any]]:
    """A row for each provider and direction, with all that was measured and what follows from it."""
    seconds = {key: statistics.median(sample["seconds"] for sample in of) for key, of in samples.items()}
    rows = []
    for (provider, direction), of in samples.items():
        median = seconds[provider, direction]
        row = {"provider": provider, "direction": direction, "seconds": median, "gb_per_second": size / 1e9 / median}
        row["speed_of_copy"] = seconds["copy", "copy"] / median
        if ("mbridge", direction) in seconds:
            row["speed_of_mbridge"] = seconds["mbridge", direction] / median
        for name in ("peak", "anonymous"):
            if f"{name}_bytes" in of[0]:
                row[f"{name}_bytes"] = max(sample[f"{name}_bytes"] for sample in of)
                row[f"{name}_shards"] = row[f"{name}_bytes"] / shard
        if provider == "flowrl-mega":
            row["goals_met"] = {
                "speed_of_copy": row["speed_of_copy"] >= GOALS["speed_of_copy"],
                "peak_shards": row["peak_shards"] <= GOALS["peak_shards"],
            }
        rows.append(row | {"samples": {name: [sample[name] for sample in of] for name in of[0]}})
    return rows


def show(rows: list[dict[str, Any]], not_run: dict[str, str]) -> None:
    print(f"{'':<24}{'s':>8}{'GB/s':>8}{'x copy':>9}{'x mbridge':>11}{'peak, shards':>14}{'anonymous':>11}")
    for row in rows:
        name = row["provider"] if row["provider"] == "copy" else f"{row['provider']} {row['direction']}"
        ratios = number(row["speed_of_copy"], 9) + number(row.get("speed_of_mbridge"), 11)
        memory = number(row.get("peak_shards"), 14) + number(row.get("anonymous_shards"), 11)
        missed = [f"{goal} {GOALS[goal]:g} missed" for goal, met in row.get("goals_met", {}).items() if not met]
        end = f"  {', '.join(missed)}" if missed else ""
        print(f"{name:<24}{row['seconds']:>8.2f}{row['gb_per_second']:>8.2f}{ratios}{memory}{end}".rstrip())
    for name, reason in not_run.items():
        print(f"{name:<24}  not run: {reason}")


def number(value: float | None, width: int) -> str:
    return f"{'' if value is None else f'{value:.2f}':>{width}}"


if __name__ == "__main__":
    main()
