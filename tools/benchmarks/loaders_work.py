"""The work of loaders.py: the store, and one epoch of it in a process of its own, by each provider."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from flowrl_mega.config import DataSettings
from flowrl_mega.data.dali import import_dali
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
WORKERS, TORCH_BATCH = 2, 256


def make(path: Path, count: int) -> MappedStore:
    random = np.random.default_rng(0)
    lengths = random.lognormal(4.5, 0.6, count).clip(8, 1024).astype(int)
    tokenizer = char_tokenizer("".join(map(chr, range(0x4E00, 0x4E00 + 20_000))))
    with new_store(path, tokenizer) as writer:
        for i, length in enumerate(lengths.tolist()):
            ids = random.integers(2, 20_000, length)
            writer.add(ids, {"id": f"random/{i}", "prompt": "p" * 4 * length, "kind": "math", "answer": str(i)})
    return MappedStore(path)


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
