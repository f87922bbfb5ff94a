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
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from workload import machine, turns, write

from flowrl_mega.config import ConfigError, DataSettings
from flowrl_mega.data.dali import import_dali
from flowrl_mega.data.dali_records import records_of
from flowrl_mega.data.loaders import open_loader
from flowrl_mega.data.order import permutation
from flowrl_mega.data.prompts import Prompt
from flowrl_mega.data.store import MappedStore, StoredPrompt, new_store
from flowrl_mega.data.tokenizer import char_tokenizer

OURS = {
    "mmap": DataSettings(),
    "dali.index": DataSettings(loader="dali"),
    "dali.reader": DataSettings(loader="dali", dali={"shuffle": "reader"}),
}
PROVIDERS = (*OURS, "torch", "torch.lists")
WORKERS, TORCH_BATCH = 2, 256


def main() -> None:
    options = parser().parse_args()
    if options.provider:
        print(json.dumps(measured(options.provider, options.folder, options.take)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="loaders-") as folder:
        store = make(Path(folder) / "store", options.prompts)
        providers, writing = prepared(options.providers, store)
        load = os.getloadavg()[0]
        samples: dict[str, list[dict[str, float]]] = {name: [] for name in providers}
        for name in turns(providers, options.rounds):
            samples[name].append(in_a_process(name, store, options.take))
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


def make(path: Path, count: int) -> MappedStore:
    random = np.random.default_rng(0)
    lengths = random.lognormal(4.5, 0.6, count).clip(8, 1024).astype(int)
    tokenizer = char_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 20_000))))
    with new_store(path, tokenizer) as writer:
        for i, length in enumerate(lengths.tolist()):
            ids = random.integers(2, 20_000, length)
            writer.add(ids, {"id": f"random/{i}", "prompt": "p" * 4 * length, "kind": "math", "answer": str(i)})
    return MappedStore(path)


def prepared(chosen: list[str], store: MappedStore) -> tuple[list[str], dict[str, float]]:
    """Who can take part, and the seconds that writing DALI's records took."""
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


# One measurement


def measured(provider: str, path: str, take: int) -> dict[str, float]:
    store = MappedStore(path)
    lengths = store.lengths()
    import_dali() if provider.startswith("dali") else None
    began, cpu = time.perf_counter(), cpu_seconds()
    tokens, indices = 0, []
    for prompts in epoch(provider, store, take):
        tokens += sum(len(prompt.token_ids) for prompt in prompts)
        indices += [prompt.index for prompt in prompts]
    found = {"cpu_s": cpu_seconds() - cpu, "wall_s": time.perf_counter() - began}
    assert tokens == lengths.sum() and sorted(indices) == list(range(len(store))), f"{provider}: not the epoch"
    return found


def cpu_seconds() -> float:
    """Of this process with its threads, and of its children that have ended."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


def epoch(provider: str, store: MappedStore, take: int) -> Iterator[list[Prompt]]:
    """One epoch's prompts in lists of `take`; opened before and closed after."""
    if provider not in OURS:
        yield from torch_epoch(store, take, lists=provider == "torch.lists")
        return
    loader = open_loader(OURS[provider], store, seed=0)
    for start in range(0, len(store), take):
        yield loader.next(min(take, len(store) - start))
    loader.close()


class Batches(Dataset):
    """For DataLoader: `__getitems__` is given all indices of a batch at once."""

    def __init__(self, store: MappedStore, lists: bool) -> None:
        self.store, self.lists = store, lists

    def __len__(self) -> int:
        return len(self.store)

    def __getitems__(self, indices: list[int]) -> Any:
        ids = [self.store.tokens(i).astype(np.int32) for i in indices]
        if self.lists:
            return indices, [tokens.tolist() for tokens in ids]
        return torch.tensor([indices, [*map(len, ids)]]), torch.from_numpy(np.concatenate(ids))


def torch_epoch(store: MappedStore, take: int, lists: bool) -> Iterator[list[Prompt]]:
    order = permutation(0, 0, len(store)).tolist()
    batches = DataLoader(
        Batches(store, lists),
        batch_size=TORCH_BATCH,
        sampler=order,  # type: ignore[arg-type]
        num_workers=WORKERS,
        collate_fn=same,
        prefetch_factor=4,
        persistent_workers=True,
    )
    ready: list[Prompt] = []
    for batch in batches:
        ready += prompts_of(store, *(batch if lists else split(*batch)))
        while len(ready) >= take:
            yield ready[:take]
            del ready[:take]
    if ready:
        yield ready
    del batches  # its workers end, and their CPU time is counted


def same(batch: Any) -> Any:
    return batch


def split(heads: torch.Tensor, flat: torch.Tensor) -> tuple[list[int], list[list[int]]]:
    (indices, lengths), ids, end = heads.tolist(), flat.numpy().tolist(), 0
    return indices, [ids[end : (end := end + length)] for length in lengths]


def prompts_of(store: MappedStore, indices: list[int], ids: list[list[int]]) -> list[Prompt]:
    where = str(store.path)
    return [StoredPrompt(i, each, store.row_bytes(i), None, where) for i, each in zip(indices, ids, strict=True)]


if __name__ == "__main__":
    main()
