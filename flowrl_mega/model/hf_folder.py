"""A Hugging Face model folder: which tensors it holds, whether they fit its config.json, reading and writing them."""

from __future__ import annotations

import json
import math
import os
import re
import struct
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.names import hf_shapes

EMBEDDING, HEAD, STEM = "model.embed_tokens.weight", "lm_head.weight", "embed_tokens.weight"
INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
CODES = {dtype: code for code, dtype in DTYPES.items()}
# What stands beside the weights and goes with them wherever they go.
SIDE_FILES = (
    "config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*",
    "merges.txt", "*.model", "*.tiktoken", "chat_template.*", "LICENSE*", "NOTICE*",
)  # fmt: skip


def side_files(path: Path) -> list[Path]:
    """config.json, generation config, tokenizer and chat template of a model folder."""
    return sorted({file for pattern in SIDE_FILES for file in path.glob(pattern) if file.is_file()})


class Stored(NamedTuple):
    """A tensor as its file's header describes it."""

    file: Path
    code: str  # its type, as safetensors calls it
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.code]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


class HfFolder:
    """The safetensors of one folder. Only their headers are read before `read` asks for a tensor.

    With an index a tensor is that of the file which the index names for it, and what it does not name is left alone:
    files may hold older copies, or tensors of another version. ConfigError where a tensor is not in its file, or where
    it is in two files and there is no index.
    """

    def __init__(self, path: str | Path) -> None:
        self.path, named = Path(path), _index(Path(path))
        headers = [_header(file) for file in _weight_files(self.path, named)]
        self.tensors = _only_copies(headers) if named is None else _as_named(headers, named, self.path)
        for name, stored in self.tensors.items():
            _check_type(name, stored)
        self.left_alone: list[str] = []  # what the index does not name: tensors, and files of weights
        if named is not None:
            copies = [(name, stored.file) for header in headers for name, stored in header.items()]
            self.left_alone = [f"{name!r} in {file.name}" for name, file in copies if named.get(name) != file.name]
            files = sorted(file.name for file in self.path.glob("model*.safetensors"))
            self.left_alone += [file for file in files if file not in named.values()]

    def tell_left_alone(self) -> None:
        """Say on stderr, once in a job, what is not read though it lies there."""
        if self.left_alone and os.environ.get("RANK", "0") == "0":
            more = f" and {len(self.left_alone) - 3} more" if len(self.left_alone) > 3 else ""
            what = ", ".join(self.left_alone[:3])
            print(f"{self.path}: left alone, as {INDEX} does not name it: {what}{more}", file=sys.stderr)

    @property
    def weight_map(self) -> dict[str, str]:
        """The file name of each tensor."""
        return {name: stored.file.name for name, stored in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        """The tensor, mapped from its file: the pages that are looked at count as memory until it is let go."""
        stored = self.tensors[name]
        try:
            mapped = np.memmap(stored.file, np.uint8, "c", stored.offset, (stored.bytes,))
        except OSError as error:
            raise ConfigError(f"{stored.file}: cannot be read ({error.strerror}); get the model folder again") from None
        return torch.from_numpy(mapped).view(stored.dtype).view(stored.shape)

    def check(self, arch: Architecture) -> None:
        """Refuse a folder whose tensors are not exactly those that its config.json promises."""
        wanted, found = hf_shapes(arch), dict(self.tensors)
        if arch.tied:
            self._check_tied_head(found)
        config = self.path / "config.json"
        if missing := [name for name in wanted if name not in found]:
            raise ConfigError(f"{self.path}: {_lack(missing, list(found), config)}")
        for name, shape in wanted.items():
            stored = found.pop(name)
            if stored.shape != shape:
                raise ConfigError(f"{stored.file}: {name!r} {_disagreement(name, stored.shape, shape, config)}")
        if unexpected := sorted(n for n in found if not n.endswith("rotary_emb.inv_freq")):
            raise ConfigError(
                f"{found[unexpected[0]].file}: unexpected tensor {unexpected[0]!r}; "
                f"a {arch.model_type} model as {config} describes it has no place for it"
            )

    def _check_tied_head(self, found: dict[str, Stored]) -> None:
        """Some folders hold a tied head as well; then it must be the embedding."""
        if not found.pop(HEAD, None) or EMBEDDING not in found:
            return
        if not torch.equal(self.read(HEAD), self.read(EMBEDDING)):
            raise ConfigError(
                f"{self.path / 'config.json'}: tie_word_embeddings = true, but {HEAD!r} is another tensor than "
                f"{EMBEDDING!r}; set it to false"
            )


def _lack(missing: list[str], found: list[str], config: Path) -> str:
    """Why tensors of the model are missing, in words, and what to do: the flag, the prefix, or another model."""
    tie = f"where the model's head is its embedding, set tie_word_embeddings = true in {config}"
    if missing == [HEAD]:
        return f"holds no tensor {HEAD!r}; {tie}, or else get the model folder again: it is incomplete"
    prefixes = [name.removesuffix(STEM) for name in found if name.endswith(STEM)]
    trunk = [name.removeprefix("model.") for name in missing if name != HEAD]
    if len(prefixes) == 1 and prefixes[0] != "model." and all(prefixes[0] + name in found for name in trunk):
        lack = f"names its tensors without the prefix 'model.': {prefixes[0] + trunk[0]!r} for 'model.{trunk[0]}'"
        if prefixes[0]:
            return f"{lack}; rename them (load_file and save_file of safetensors.torch)"
        if any(name.endswith(HEAD) for name in missing):
            return f"{lack}, and holds no {HEAD!r}: a model without a head; get the whole one, or {tie} first"
        return f"{lack}; load it with transformers' AutoModelForCausalLM, which adds it, and save_pretrained() that"
    return f"holds no tensor {missing[0]!r}; incomplete, or {config} is of another model"


def _disagreement(name: str, found: tuple[int, ...], wanted: tuple[int, ...], config: Path) -> str:
    text = f"has shape {found}, but {config} makes it {wanted}"
    vocabulary = name.endswith(("embed_tokens.weight", "lm_head.weight")) and found[1:] == wanted[1:]
    return f"{text}; set its vocab_size = {found[0]}" if vocabulary else f"{text}; one of the two is of another model"


def _index(path: Path) -> dict[str, str] | None:
    """The name of each tensor's file, as the folder's index has it; None without one."""
    index = path / INDEX
    if not index.is_file():
        return None
    try:
        named = {name: str(Path(file)) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{index}: not an index of safetensors ({error!r}); get the model folder again") from None
    for file in sorted(set(named.values())):
        if Path(file).name != file:
            raise ConfigError(f"{index}: names {file!r}, which is no file of this folder; get the model folder again")
        if not (path / file).is_file():
            raise ConfigError(f"{path}: {file} is missing, which {INDEX} names; get the model folder again")
    return named


SHARD = re.compile(r"(.+)-\d+-of-(\d+)")


def _weight_files(path: Path, named: dict[str, str] | None) -> list[Path]:
    """The files that an index names; without one, model*.safetensors, or else all there are.

    Some folders hold the same weights once more under the names of another format (Mistral's consolidated.safetensors).
    """
    if named is not None:
        return [path / name for name in sorted(set(named.values()))]
    files = sorted(path.glob("model*.safetensors")) or sorted(path.glob("*.safetensors"))
    if not files:
        other = next(path.glob("*.bin"), None) or next(path.glob("*.pt"), None)
        fix = f"{other.name} must be saved as safetensors first" if other else "give a Hugging Face model folder"
        raise ConfigError(f"{str(path)!r}: holds no *.safetensors; {fix}")
    _refuse_two_sets(path, files)
    return files


def _refuse_two_sets(path: Path, files: list[Path]) -> None:
    """model-00001-of-00003 beside model-00001-of-00002, or beside model.safetensors, is what two saves left."""
    sets: dict[tuple[str, str], list[str]] = defaultdict(list)
    for file in files:
        shard = SHARD.fullmatch(file.stem)
        sets[(shard[1], shard[2]) if shard else ("", "")].append(file.name)
    if len(sets) > 1:
        first, second, *_ = (names[0] for names in sets.values())
        raise ConfigError(
            f"{path}: {first} and {second} are of two sets of files, and no {INDEX} says which one counts; "
            "remove one set, or get the model folder again"
        )


def _header(file: Path) -> dict[str, Stored]:
    """The tensors of one file, checked by the library; it keeps their offsets to itself, so they are read here."""
    try:
        with safe_open(file, framework="pt"), open(file, "rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
    except OSError as error:
        raise ConfigError(f"{file}: cannot be read ({error}); get the model folder again") from None
    except Exception as error:  # the Rust reader has an exception class of its own
        raise ConfigError(f"{file}: broken or cut off ({error}); get the model folder again") from None
    header.pop("__metadata__", None)
    return {
        name: Stored(file, entry["dtype"], tuple(entry["shape"]), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }


def _only_copies(headers: list[dict[str, Stored]]) -> dict[str, Stored]:
    """The tensors of all files; refuses one that is in two."""
    tensors: dict[str, Stored] = {}
    for header in headers:
        for name, stored in header.items():
            if (other := tensors.setdefault(name, stored)) is not stored:
                raise ConfigError(
                    f"{stored.file.parent}: {other.file.name} and {stored.file.name} both hold {name!r}, and no "
                    f"{INDEX} says which one counts; remove one of them, or get the model folder again"
                )
    return tensors


def _as_named(headers: list[dict[str, Stored]], named: dict[str, str], path: Path) -> dict[str, Stored]:
    """The tensors of the index, each from the file that it names; refuses one that is not there."""
    copies = {(name, stored.file.name): stored for header in headers for name, stored in header.items()}
    for name, file in named.items():
        if (name, file) not in copies:
            raise ConfigError(
                f"{path / file}: holds no tensor {name!r}, and {INDEX} says that it does; get the model folder again"
            )
    return {name: copies[name, file] for name, file in named.items()}


def _check_type(name: str, stored: Stored) -> None:
    """Refuse types that the policy cannot have."""
    if stored.code not in DTYPES:
        supported = ", ".join(DTYPES)
        raise ConfigError(
            f"{stored.file}: {name!r} is of type {stored.code}, not one of {supported}; save it unquantized"
        )


WRITE_BYTES = 1 << 20  # bytes: a write of a whole mapped tensor at once takes twice as long, as does its fsync (ext4)


def write_in_pieces(file: BinaryIO, data: memoryview) -> None:
    for start in range(0, len(data), WRITE_BYTES):
        file.write(data[start : start + WRITE_BYTES])


class ToWrite(NamedTuple):
    """A tensor that `write_safetensors` asks for."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


def write_safetensors(file: Path, tensors: Iterable[ToWrite], read: Callable[[str], Tensor]) -> None:
    """Write one file, holding one tensor at a time (the library wants all of them at once).

    The format: the header's length in 8 bytes, the header as JSON, the tensors' bytes one after another
    (https://huggingface.co/docs/safetensors#format).
    """
    aligned = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in aligned:
        start, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(file, "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        for name, dtype, shape in aligned:
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == (dtype, shape), name
            write_in_pieces(out, tensor.reshape(-1).view(torch.uint8).numpy().data)
