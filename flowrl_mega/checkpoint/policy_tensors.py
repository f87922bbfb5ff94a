"""The policy in a Megatron checkpoint, as Hugging Face tensors; and the files that go with a model's weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowrl_mega.checkpoint.folder import is_megatron
from flowrl_mega.checkpoint.stream import Reader
from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import Architecture, read_architecture
from flowrl_mega.model.hf_folder import CODES, EMBEDDING, HEAD, HfFolder, ToWrite, side_files
from flowrl_mega.model.names import CheckpointSlot, checkpoint_slots, hf_shapes, joined_shape, kind_of, to_named

WEIGHT_MAP = "hf_weight_map.json"  # which file of the Hugging Face folder holds which tensor
OUTPUT = "output_layer.weight"  # the head, where it is not the embedding
MOST_PADDING = 128 * 64  # rows of the vocabulary: Megatron fills it up to a multiple of 128 tp


def checkpoint_architecture(ckpt: Path) -> Architecture:
    """The architecture in a Megatron checkpoint's config.json; refuses a folder that is no checkpoint, or has none."""
    fixes = {".metadata": "give a checkpoint that hf2mcore or the trainer made", "config.json": "put the model's there"}
    for file, fix in fixes.items():
        if not (ckpt / file).is_file():
            raise ConfigError(f"--ckpt = {str(ckpt)!r}: holds no {file}; {fix}")
    return read_architecture(ckpt, "--ckpt")


class MegatronTensors:
    """The Hugging Face tensors that a Megatron checkpoint holds, by name; refuses what its config.json does not fit."""

    def __init__(self, ckpt: Path, arch: Architecture) -> None:
        self.arch, self.reader = arch, Reader(ckpt)
        self.shapes = hf_shapes(arch)
        self.slots = {name: slot for slot in checkpoint_slots(arch) for name in slot.hf}
        if arch.tied:
            self.slots[HEAD], self.shapes[HEAD] = self.slots[EMBEDDING], self.shapes[EMBEDDING]
        self._last: tuple[CheckpointSlot, list[Tensor]] | None = None  # q, k and v come from one read
        self._check()

    def _check(self) -> None:
        folder, found = self.reader.folder, self.reader.shapes
        fix = f"{folder / 'config.json'} is of another model, put the right one there"
        known = {slot.key for slot in self.slots.values()}
        model = ("embedding.", "decoder.", "output_layer.")
        missing = sorted(known - found.keys())
        unexpected = sorted(key for key in found if key.startswith(model) and key not in known)
        if [OUTPUT] in (missing, unexpected):  # all the rest is there
            what, tied = ("holds no", "true") if missing else ("unexpected", "false")
            raise ConfigError(
                f"{folder}: {what} tensor {OUTPUT!r}; set tie_word_embeddings = {tied} in {folder / 'config.json'}"
            )
        for slot in dict.fromkeys(self.slots.values()):
            if slot.key not in found:
                raise ConfigError(f"{folder}: holds no tensor {slot.key!r}; {fix}, or the checkpoint is no policy")
            if (dtype := self.reader.dtypes[slot.key]) not in CODES:
                raise ConfigError(f"{folder}: {slot.key!r} is of type {dtype}; save it as fp32, bf16 or fp16")
            shape, wanted = found[slot.key], self._total_shape(slot)
            padded = kind_of(slot.name) == "vocab" and 0 < shape[0] - wanted[0] < MOST_PADDING
            if shape != wanted and not (padded and shape[1:] == wanted[1:]):
                raise ConfigError(f"{folder}: {slot.key!r} has shape {shape} instead of {wanted}; {fix}")
        if unexpected:
            raise ConfigError(f"{folder}: unexpected tensor {unexpected[0]!r}; {fix}")

    def _whole_shape(self, slot: CheckpointSlot) -> tuple[int, ...]:
        return joined_shape([self.shapes[name] for name in slot.hf])

    def _total_shape(self, slot: CheckpointSlot) -> tuple[int, ...]:
        return (*(() if slot.layer is None else (self.arch.layers,)), *self._whole_shape(slot))

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtypes[self.slots[name].key]

    def bytes(self, name: str) -> int:
        return self.dtype(name).itemsize * torch.Size(self.shapes[name]).numel()

    def to_write(self, name: str) -> ToWrite:
        return ToWrite(name, self.dtype(name), self.shapes[name])

    def read(self, name: str, done: Any = lambda size: None) -> Tensor:
        """The tensor under its Hugging Face name."""
        slot = self.slots[name]
        done(self.bytes(name))
        if kind_of(slot.name) == "gate_up":  # each is a rectangle of its own
            shape = self.shapes[name]
            return self._rectangle(slot, (slot.hf.index(name) * shape[0], 0), shape)
        if self._last is None or self._last[0] != slot:
            self._last = None  # let go of before the next is read
            shape = self._whole_shape(slot)
            whole = self._rectangle(slot, (0,) * len(shape), shape)
            self._last = (slot, to_named(slot.name, whole, self.arch))
        return self._last[1][slot.hf.index(name) if name in slot.hf else 0]

    def _rectangle(self, slot: CheckpointSlot, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The rectangle of this shape at `offset` of the `whole` tensor in `slot`."""
        if slot.layer is None:
            return self.reader.read(slot.key, offset, shape)
        return self.reader.read(slot.key, (slot.layer, *offset), (1, *shape))[0]


def critic_in_checkpoint(path: Path, arch: Architecture, setting: str) -> None:
    """Refuse to go on from a run's checkpoint whose critic, a model of its own, has other sizes than `arch`.

    `setting` is where the user said which model the critic is.
    """
    found, shapes = Reader(path).shapes, hf_shapes(arch)
    for slot in checkpoint_slots(arch):
        key = f"critic.{slot.key}"
        layers = () if slot.layer is None else (arch.layers,)
        wanted = (*layers, *joined_shape([shapes[name] for name in slot.hf]))
        if kind_of(slot.name) != "vocab" and found.get(key, wanted) != wanted:  # padding makes the vocabulary longer
            raise ConfigError(
                f"{setting}: the critic in {path} is of another model: its {key!r} is {found[key]}, this one's would "
                f"be {wanted}; name the model that it was, or choose another run_dir"
            )


def read_side_files(model: str | Path) -> dict[str, bytes]:
    """The files beside the weights of a model folder (or checkpoint), by name: read early, as they may go away."""
    path = Path(model)
    files = {file.name: file.read_bytes() for file in side_files(path)}
    if (path / WEIGHT_MAP).is_file():
        return {**files, WEIGHT_MAP: (path / WEIGHT_MAP).read_bytes()}
    if is_megatron(path):  # that somebody else made
        return files
    names = HfFolder(path).weight_map
    kept = {name: file for name, file in names.items() if not name.endswith("rotary_emb.inv_freq")}
    return {**files, WEIGHT_MAP: json.dumps(kept, indent=1, sort_keys=True).encode()}


def write_side_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
