"""Loaders of prompts, mmap, DALI's two orders and torch's DataLoader: tokens a second of CPU time, in turns.

    python tools/benchmarks/loaders.py [--prompts 200000] [--take 128] [--rounds 5] [--providers NAME ...]
        [--folder DIR] [--json FILE]

The store has ragged prompts of random ids (log-normal, 8 to 1024 tokens, 107 in the mean) and rows of some 400 bytes. A
measurement is a process of its own, in which a provider is opened, gives one epoch in calls of `--take` prompts and is
closed; the clocks start after its imports, with the store open and the page cache warm. CPU time is that of the process
with all its threads and of its workers. What is given are the trainer's prompts: lists of ids, the row read but not
parsed. Whoever does not give every token of the store exactly once ends the benchmark.

`torch` and `torch.lists`: DataLoader with two persistent workers, whole batches of 256 looked up at once, four of them
ahead for each worker, and nothing collated. A batch comes back through shared memory as one flat tensor, or through the
pipe as lists; rows are read in the main process, as with DALI. DALI's records are written beforehand; the seconds that
took are in the results. Each round begins with the next provider; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workload import in_turns, machine, write

if TYPE_CHECKING:
    from flowrl_mega.data.store import MappedStore

PROVIDERS = ("mmap", "dali.index", "dali.reader", "torch", "torch.lists")


def main() -> None:
    options = parser().parse_args()
    from loaders_work import make, measured  # seconds, so only after the arguments have been looked at

    if options.provider:
        print(json.dumps(measured(options.provider, options.folder, options.take)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="loaders-") as folder:
        store = make(Path(folder) / "store", options.prompts)
        providers, writing = prepared(options.providers, store)
        load = os.getloadavg()[0]
        samples = in_turns(
            {name: partial(in_a_process, name, store, options.take) for name in providers}, options.rounds
        )
        rows = [row(name, samples[name], store.header["tokens"]) for name in providers]
    for found in rows:
        print(f"{found['provider']:12} {found['mtok_per_cpu_s']:6.2f} Mtok/CPU-s {found['mtok_per_s']:6.2f} Mtok/s")
    packages = ["torch", "numpy", *(["nvidia-dali-cuda130"] if "dali.index" in providers else [])]
    told = {"load_before": load, "prompts": len(store), "tokens": store.header["tokens"], "take": options.take}
    write(options.json, machine(*packages) | told | writing, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Loaders of prompts, by CPU time.")
    parser.add_argument("--prompts", type=int, default=200_000)
    parser.add_argument("--take", type=int, default=128, help="prompts a call")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--providers", nargs="+", choices=PROVIDERS, default=PROVIDERS)
    parser.add_argument("--folder", help="where the store is made; with --provider, the store")
    parser.add_argument("--json")
    parser.add_argument("--provider", help=argparse.SUPPRESS)  # a measurement's own process
    return parser


def prepared(chosen: list[str], store: MappedStore) -> tuple[list[str], dict[str, float]]:
    """Returns who can take part, and the seconds that writing DALI's records took."""
    from flowrl_mega.config import ConfigError
    from flowrl_mega.data.dali import import_dali
    from flowrl_mega.data.dali_records import records_of

    try:
        import_dali()
    except ConfigError as error:
        print(f"dali: not run, {error}")
        return [name for name in chosen if not name.startswith("dali")], {}
    began = time.perf_counter()
    records_of(store)
    return list(chosen), {"records_seconds": time.perf_counter() - began}


def in_a_process(provider: str, store: MappedStore, take: int) -> dict[str, float]:
    arguments = ["--provider", provider, "--folder", str(store.path), "--take", str(take)]
    done = subprocess.run([sys.executable, __file__, *arguments], stdout=subprocess.PIPE, text=True, timeout=1800)
    if done.returncode:
        sys.exit(f"{provider} failed")
    return json.loads(done.stdout.splitlines()[-1])


def row(provider: str, samples: list[dict[str, float]], tokens: int) -> dict[str, Any]:
    median = {name: statistics.median(sample[name] for sample in samples) for name in ("cpu_s", "wall_s")}
    speeds = {"mtok_per_cpu_s": tokens / median["cpu_s"] / 1e6, "mtok_per_s": tokens / median["wall_s"] / 1e6}
    return {"provider": provider, **speeds, **median, "samples": samples}


if __name__ == "__main__":
    main()
