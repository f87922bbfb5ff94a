"""Hugging Face folder <-> Megatron checkpoint, one tensor at a time; several ranks share the work where there are any.

A converted checkpoint is Megatron's own format, with the model folder's config.json, tokenizer and so on beside it, as
the trainer's checkpoints have them: either can be converted back, or trained from, on its own.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor

from flowrl_mega.checkpoint import stream
from flowrl_mega.checkpoint.folder import sync
from flowrl_mega.checkpoint.output import check_target, written
from flowrl_mega.checkpoint.policy_tensors import (
    HEAD,
    WEIGHT_MAP,
    MegatronTensors,
    checkpoint_architecture,
    read_side_files,
    write_side_files,
)
from flowrl_mega.checkpoint.progress import progress
from flowrl_mega.checkpoint.stream import Chunk, Reader
from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import Architecture, read_architecture
from flowrl_mega.model.hf_folder import INDEX, SINGLE, HfFolder, ToWrite, side_files, write_safetensors
from flowrl_mega.model.names import CheckpointSlot, checkpoint_slots, joined_shape, kind_of, to_whole
from flowrl_mega.parallel.layout import raise_on_all_ranks, rank, world

LOG_Z = "log_z"  # a folder of its own: inference servers load every *.safetensors that lies beside config.json


def hf_to_megatron(hf: Path, out: Path, dtype: torch.dtype | None = None, show: bool = True) -> None:
    """Write the model of the Hugging Face folder `hf` as a Megatron distributed checkpoint `out`. Collective.

    `dtype` None keeps every tensor's own. ConfigError where the input is wrong or the disk full; then nothing is left.
    """
    with raise_on_all_ranks():
        arch = read_architecture(hf, "--hf")
        folder = HfFolder(hf)
        folder.check(arch)
        folder.tell_left_alone()
        chunks, log_z, side = list(_model_chunks(folder, arch, dtype)), _log_z_chunks(hf), read_side_files(hf)
        check_target(out, sum(chunk.bytes for chunk in chunks + log_z))
    first, mine = rank() == 0, my_chunks(chunks)
    with progress("hf2mcore", sum(chunk.bytes for chunk in mine), show) as done, written(out) as folder_so_far:
        stream.write(folder_so_far, mine + log_z if first else mine, _objects(arch) if first else {}, done)
        if first:
            write_side_files(side, folder_so_far)


def megatron_to_hf(ckpt: Path, out: Path, show: bool = True) -> None:
    """Write the policy in the Megatron checkpoint `ckpt` as a Hugging Face folder `out`. Collective.

    Reads the checkpoint only: its tensors, and the side files that stand in it. The partition function goes to
    out/log_z. ConfigError as in `hf_to_megatron`.
    """
    with raise_on_all_ranks():
        tensors = MegatronTensors(ckpt, checkpoint_architecture(ckpt))
        files = _files(ckpt, tensors)
        check_target(out, sum(tensors.bytes(name) for names in files.values() for name in names))
    mine = dict(sorted(files.items())[rank() :: world()])
    total = sum(tensors.bytes(name) for names in mine.values() for name in names)
    with progress("mcore2hf", total, show) as done, written(out) as folder:
        with ThreadPoolExecutor(1) as disk:  # waits for a file to be on it while the next one is written
            waiting = []
            for file, names in mine.items():
                described = [tensors.to_write(name) for name in names]
                write_safetensors(folder / file, described, partial(tensors.read, done=done))
                waiting.append(disk.submit(sync, folder / file))
            for finished in waiting:
                finished.result()
        if rank() == 0:
            _write_beside_weights(ckpt, folder, tensors, files)


def _objects(arch: Architecture) -> dict[str, Any]:
    """Objects that a load asks for besides tensors, all empty: the common state, and an extra state (FP8's scales) for
    each module that has one under some layer spec or version of Transformer Engine."""
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]
    modules += ["self_attention.core_attention"]
    modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"] if arch.qk_norm else []
    keys = [
        stream.object_key(f"decoder.layers.{module}._extra_state", layer, arch.layers)
        for module in modules
        for layer in range(arch.layers)
    ]
    keys += [stream.object_key("decoder.final_layernorm._extra_state")]
    return {**dict.fromkeys(keys), stream.object_key("common_state"): {}}


def _model_chunks(folder: HfFolder, arch: Architecture, dtype: torch.dtype | None) -> Iterator[Chunk]:
    """Every tensor of the model as Megatron lays it out, in the order of the files."""
    first_of_key: dict[str, torch.dtype] = {}
    for slot in checkpoint_slots(arch):
        for name in slot.hf:
            found = dtype or folder.tensors[name].dtype
            if first_of_key.setdefault(slot.key, found) != found:
                raise ConfigError(
                    f"{folder.tensors[name].file}: {name!r} is of another type than its like in other layers; "
                    "make them one with --dtype"
                )
        stored_as = first_of_key[slot.key]
        if kind_of(slot.name) == "gate_up":  # two rectangles of one tensor need not be joined
            for half, name in enumerate(slot.hf):
                yield _chunk(slot, arch, folder, (name,), half, stored_as)
        else:
            yield _chunk(slot, arch, folder, slot.hf, None, stored_as)


def _chunk(
    slot: CheckpointSlot,
    arch: Architecture,
    folder: HfFolder,
    names: tuple[str, ...],
    half: int | None,
    dtype: torch.dtype,
) -> Chunk:
    shape = joined_shape([folder.tensors[name].shape for name in names])
    offset, total = (0,) * len(shape), shape
    if half is not None:
        offset, total = (half * shape[0], *offset[1:]), (2 * shape[0], *shape[1:])
    if slot.layer is not None:
        offset, shape, total = (slot.layer, *offset), (1, *shape), (arch.layers, *total)

    def read() -> Tensor:
        parts = [folder.read(name).to(dtype) for name in names]
        return parts[0] if half is not None else to_whole(slot.name, parts, arch)

    return Chunk(slot.key, offset, shape, total, dtype, read)


def _log_z_chunks(hf: Path) -> list[Chunk]:
    """The partition function that an earlier export put beside the model, if there is one."""
    if not (hf / LOG_Z).is_dir():
        return []
    folder = HfFolder(hf / LOG_Z)
    return [
        Chunk(f"partition.{name}", (0,) * len(t.shape), t.shape, t.shape, t.dtype, partial(folder.read, name))
        for name, t in folder.tensors.items()
    ]


def _kind(keys: Sequence[str]) -> str | None:
    """The kind of the partition function that has these tensors; None without any."""
    if not keys:
        return None
    return "constant" if keys == ["partition.value"] else "mlp"


def _files(ckpt: Path, tensors: MegatronTensors) -> dict[str, list[str]]:
    """The names of the tensors that go into each file: as the original had them, or else files of at most 5 GB."""
    names = [name for name in tensors.slots if not (tensors.arch.tied and name == HEAD)]
    if (ckpt / WEIGHT_MAP).is_file():
        file_of = _stored_map(ckpt / WEIGHT_MAP, set(names), set(tensors.slots))
    else:
        shapes = {name: tensors.to_write(name) for name in names}
        size = lambda tensor: tensors.bytes(tensor.name)  # noqa: E731
        split = split_state_dict_into_shards_factory(
            shapes, get_storage_size=size, filename_pattern="model{suffix}.safetensors", max_shard_size="5GB"
        )
        file_of = {name: file for file, held in split.filename_to_tensors.items() for name in held}
    files: dict[str, list[str]] = {}
    for name in tensors.slots:  # in Megatron's order, so that q, k and v come one after another
        if name in file_of:
            files.setdefault(file_of[name], []).append(name)
    return files


def _stored_map(path: Path, needed: set[str], known: set[str]) -> dict[str, str]:
    """The original's file of each tensor; refuses a map that would make no model folder of these tensors."""
    try:
        file_of = dict(json.loads(path.read_text()))
        wrong = sorted(file_of.keys() - known | needed - file_of.keys())
        wrong += [n for n, file in file_of.items() if Path(file).name != file or not file.endswith(".safetensors")]
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: no map of names ({error}); remove it for files of 5 GB") from None
    if wrong:
        raise ConfigError(f"{path}: does not fit config.json at {wrong[0]!r}; remove it for files of 5 GB")
    return file_of


def _write_beside_weights(ckpt: Path, folder: Path, tensors: MegatronTensors, files: dict[str, list[str]]) -> None:
    """config.json with the type of the weights, tokenizer and so on, the index of several files, and log Z."""
    side = {file.name: file.read_bytes() for file in side_files(ckpt)}
    config = json.loads(side["config.json"])
    typed = _with_type(config, {tensors.dtype(name) for name in tensors.shapes})
    if typed != config:
        side["config.json"] = json.dumps(typed, indent=2).encode()
    write_side_files(side, folder)
    vocabulary = [n for n in side if n.startswith(("tokenizer.", "vocab.")) or n.endswith((".model", ".tiktoken"))]
    if "tokenizer_config.json" in side and not vocabulary:  # that of a tokenizer which has been deleted
        print(f"{ckpt}: holds tokenizer_config.json and no tokenizer, and so does the export", file=sys.stderr)
    if list(files) != [SINGLE]:
        file_of = {name: file for file, names in files.items() for name in names}
        total = sum(tensors.bytes(name) for name in file_of)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))}
        (folder / INDEX).write_text(json.dumps(index, indent=2))
    _write_log_z(tensors.reader, folder / LOG_Z)


def _with_type(config: dict[str, Any], dtypes: set[torch.dtype]) -> dict[str, Any]:
    """config.json with the type of the weights under each of its two names that it has: some readers go by `dtype`,
    older ones by `torch_dtype`. Weights of several types keep what was said, the same under both."""
    names = [name for name in ("dtype", "torch_dtype") if name in config] or ["dtype"]
    said = next((config[name] for name in names if config.get(name)), None)
    value = str(*dtypes).removeprefix("torch.") if len(dtypes) == 1 else said
    return {**config, **dict.fromkeys(names, value)} if value else config


def _write_log_z(reader: Reader, folder: Path) -> None:
    """The partition function's state_dict, with what one must know to build it."""
    keys = [key for key in reader.shapes if key.startswith("partition.")]
    if not keys:
        return
    folder.mkdir()
    described = [ToWrite(key.removeprefix("partition."), reader.dtypes[key], reader.shapes[key]) for key in keys]

    def read(name: str) -> Tensor:
        shape = reader.shapes[f"partition.{name}"]
        return reader.read(f"partition.{name}", (0,) * len(shape), shape)

    write_safetensors(folder / "log_z.safetensors", described, read)
    about = {"kind": _kind(keys), "input": "mean of the last hidden states over the prompt's tokens", "output": "log Z"}
    (folder / "log_z.json").write_text(json.dumps(about, indent=2) + "\n")


def my_chunks(chunks: list[Chunk]) -> list[Chunk]:
    """The chunks that this rank writes: a contiguous run, so that ranks read different files, and about as many bytes
    as any other rank's."""
    total, before, mine = sum(chunk.bytes for chunk in chunks), 0, []
    for chunk in chunks:
        if int((before + chunk.bytes / 2) * world() / total) == rank():
            mine.append(chunk)
        before += chunk.bytes
    return mine
