"""The prompt store: tokenised prompts in a folder, memory-mapped, so that opening a million of them reads none.

    store.json                  what it holds, of which tokenizer, how it was made, and the size of every file
    tokens.bin, token_ends.npy  ids of all prompts one after the other, and where each ends (int64)
    rows.jsonl, row_ends.npy    what rewards read, one JSON object a line, and the byte after each line
    images.bin, image_ends.npy  where a prompt has an image: encoded bytes (PNG, JPEG); none for a prompt without

Ids are uint16 where the vocabulary allows, else uint32. `tools/prepare_data.py` makes stores.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from datetime import date
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np

from flowrl_mega.config import ConfigError
from flowrl_mega.data.chat import TEMPLATE_DATE
from flowrl_mega.data.fingerprint import Fingerprint
from flowrl_mega.data.modules import modules_of_tests
from flowrl_mega.data.prompts import Prompt, Row

FORMAT = 1
HEADER = "store.json"
PARTS = {"tokens": "tokens.bin", "rows": "rows.jsonl", "images": "images.bin"}
ENDS = {"tokens": "token_ends.npy", "rows": "row_ends.npy", "images": "image_ends.npy"}
PIECE = 1 << 24  # tokens that are looked at at once
FIX = "make it again with tools/prepare_data.py"


class StoredPrompt(Prompt):
    """A prompt whose row is decoded on first use: loaders return far more prompts than rewards read."""

    def __init__(self, index: int, token_ids: list[int], encoded: bytes, image: np.ndarray | None, where: str) -> None:
        # Past the frozen dataclass's own __init__, which would want the row.
        self.__dict__.update(index=index, token_ids=token_ids, encoded=encoded, image=image, where=where)

    @cached_property
    def row(self) -> Row:
        try:
            return json.loads(self.__dict__["encoded"])
        except ValueError:
            where = self.__dict__["where"]
            raise ConfigError(f"{where}: row {self.index} of the prompt store is damaged; {FIX}") from None


class MappedStore(Sequence[Prompt]):
    """The prompts of a store by index. Pickled as its path: every process maps the files itself.

    `header` is store.json. Raises ConfigError for a folder that is no store, an unfinished or a damaged one.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.header = read_header(self.path)
        self.has_images = "images.bin" in self.header["files"]
        self._tokens = self._map("tokens", np.dtype(self.header["dtype"]))
        self._rows = self._map("rows", np.dtype(np.uint8))
        self._token_ends = self._ends("tokens", len(self._tokens))
        self._row_ends = self._ends("rows", len(self._rows))
        if self.has_images:
            self._images = self._map("images", np.dtype(np.uint8))
            self._image_ends = self._ends("images", len(self._images))

    def __reduce__(self) -> tuple[Any, ...]:
        return MappedStore, (self.path,)

    def __len__(self) -> int:
        return self.header["count"]

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        i = range(len(self))[index]  # negative ones count from the end, others raise IndexError
        return StoredPrompt(i, self.tokens(i).tolist(), self.row_bytes(i), self._image(i), str(self.path))

    def tokens(self, i: int) -> np.ndarray:
        """[tokens of prompt i] uint16 or uint32: a view of the file."""
        return _part(self._tokens, self._token_ends, i)

    def row_bytes(self, i: int) -> bytes:
        """Prompt i's row as JSON in UTF-8."""
        return _part(self._rows, self._row_ends, i).tobytes()

    def image_bytes(self, i: int) -> bytes:
        """Prompt i's image, encoded; empty where it has none."""
        return _part(self._images, self._image_ends, i).tobytes() if self.has_images else b""

    def lengths(self) -> np.ndarray:
        """[count] int64: tokens of every prompt."""
        return np.diff(self._token_ends, prepend=0)

    def first_beyond(self, vocab: int) -> int | None:
        """The first prompt with a token id of `vocab` or more; reads all tokens."""
        for start in range(0, len(self._tokens), PIECE):
            found = np.flatnonzero(self._tokens[start : start + PIECE] >= vocab)
            if len(found):
                return int(np.searchsorted(self._token_ends, start + found[0], side="right"))
        return None

    def verify(self) -> None:
        """Read every file and compare with what was written; ConfigError names the first that has changed."""
        for name, said in self.header["files"].items():
            if _sha256(self.path / name) != said["sha256"]:
                raise ConfigError(f"{self.path}: {name} has changed since the prompt store was made; {FIX}")

    def _image(self, i: int) -> np.ndarray | None:
        encoded = self.image_bytes(i)
        if not encoded:
            return None
        try:
            return decode_image(encoded)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: the image of row {i} cannot be decoded ({error}); {FIX}") from None

    def _map(self, part: str, dtype: np.dtype) -> np.ndarray:
        return np.asarray(np.memmap(self.path / PARTS[part], dtype, mode="r"))

    def _ends(self, part: str, size: int) -> np.ndarray:
        try:
            ends = np.asarray(np.load(self.path / ENDS[part], mmap_mode="r"))
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.path}: {ENDS[part]} cannot be read ({error}); {FIX}") from None
        if ends.dtype != np.int64 or ends.shape != (len(self),) or ends[-1] != size:
            raise ConfigError(f"{self.path}: {ENDS[part]} does not fit {PARTS[part]}; {FIX}")
        return ends


def _part(data: np.ndarray, ends: np.ndarray, i: int) -> np.ndarray:
    return data[int(ends[i - 1]) if i else 0 : int(ends[i])]


def decode_image(encoded: bytes) -> np.ndarray:
    """[height, width, 3] uint8 of a PNG or JPEG; OSError or ValueError where it is neither, or broken."""
    from PIL import Image, ImageOps

    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))  # upright, as DALI decodes it


def read_header(path: Path) -> dict[str, Any]:
    """The contents of store.json. ConfigError if they have changed, or if a file has another length than they say."""
    try:
        header = json.loads((path / HEADER).read_text())
    except OSError as error:
        raise ConfigError(f"{path}: is no prompt store ({HEADER}: {error.strerror}); {FIX}") from None
    except ValueError:
        raise ConfigError(f"{path}: {HEADER} is damaged; {FIX}") from None
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        found = header.get("format") if isinstance(header, dict) else None
        raise ConfigError(f"{path}: is a prompt store of format {found!r}, and this version reads {FORMAT}; {FIX}")
    if header.pop("checksum", None) != _checksum(header):
        raise ConfigError(f"{path}: {HEADER} has changed since it was written; {FIX}")
    for name, said in header["files"].items():
        file = path / name
        size = file.stat().st_size if file.is_file() else None
        if size != said["bytes"]:
            found = "is missing" if size is None else f"has {size} bytes"
            raise ConfigError(f"{path}: {name} {found}, and {said['bytes']} were written; {FIX}")
    return header


def open_store(
    path: str | Path, tokenizer: Any, max_prompt_tokens: int, chat_template: bool, template_date: date = TEMPLATE_DATE
) -> MappedStore:
    """The store at `path`. ConfigError if it was made with another tokenizer, or does not fit the settings."""
    store = MappedStore(path)
    made, mine = Fingerprint(**store.header["tokenizer"]), Fingerprint.of(tokenizer)
    again = "prepare it again with --model naming this model's folder"
    if (made.vocabulary, made.probe) != (mine.vocabulary, mine.probe):
        raise ConfigError(
            f"{path}: was made with tokenizer {made.name!r} (vocabulary {made.size}), and the model's is "
            f"{mine.name!r} (vocabulary {mine.size}); {again}"
        )
    template = store.header["chat_template"]
    if chat_template != (template is not None):
        how, flag = ("without", "--chat-template") if chat_template else ("with", "--no-chat-template")
        raise ConfigError(
            f"data.chat_template = {str(chat_template).lower()}: {path} was made {how} the chat template; "
            f"set data.chat_template={str(not chat_template).lower()}, or prepare it again with {flag}"
        )
    if template is not None and template != mine.template:
        raise ConfigError(f"{path}: was made with another chat template than that of {mine.name!r}; {again}")
    made_on = (store.header["made"] or {}).get("template_date") if template is not None else None
    if made_on not in (None, str(template_date)):
        raise ConfigError(
            f"data.template_date = {template_date}: {path} was made with {made_on}; set data.template_date={made_on}, "
            f"or prepare it again with --template-date {template_date}"
        )
    if (longest := store.header["longest"]) > max_prompt_tokens:
        raise ConfigError(
            f"data.max_prompt_tokens = {max_prompt_tokens}: {path} has prompts of up to {longest} tokens; raise it, "
            f"or prepare it again with --max-prompt-tokens {max_prompt_tokens}"
        )
    return store


class StoreWriter:
    """Adds prompts one by one; only the offsets of their ends are kept in memory (8 bytes each)."""

    def __init__(self, folder: Path, dtype: np.dtype, files: Mapping[str, Any]) -> None:
        self.folder, self.dtype, self.files = folder, dtype, files
        self.ends = {part: array("q") for part in files}
        self.written = dict.fromkeys(files, 0)
        self.tasks: Counter[str] = Counter()
        self.kinds: Counter[str] = Counter()
        self.modules: Counter[str] = Counter()  # rows whose tests import each
        self.longest = 0

    def add(self, token_ids: Sequence[int], row: Row, image: bytes = b"") -> None:
        """The next prompt. `row` is JSON; `image` encoded bytes."""
        assert len(token_ids) > 0
        self._append("tokens", np.asarray(token_ids).astype(self.dtype).tobytes(), len(token_ids))
        line = json.dumps(row, ensure_ascii=False).encode() + b"\n"
        self._append("rows", line, len(line))
        self._append("images", image, len(image))
        self.tasks[row.get("task", "")] += 1
        self.kinds[row.get("kind", "")] += 1
        self.modules.update(modules_of_tests(row))
        self.longest = max(self.longest, len(token_ids))

    def _append(self, part: str, data: bytes, length: int) -> None:
        self.files[part].write(data)
        self.written[part] += length
        self.ends[part].append(self.written[part])

    @property
    def count(self) -> int:
        return len(self.ends["rows"])

    def finish(self, header: dict[str, Any]) -> None:
        if not self.written["images"]:
            del self.ends["images"]
            (self.folder / PARTS["images"]).unlink()
        for part, ends in self.ends.items():
            np.save(self.folder / ENDS[part], np.frombuffer(ends, np.int64))
        names = [names[part] for part in self.ends for names in (PARTS, ENDS)]
        header = {
            "format": FORMAT,
            "count": self.count,
            "tokens": self.written["tokens"],
            "longest": self.longest,
            "dtype": self.dtype.name,
            "tasks": dict(self.tasks),
            "kinds": dict(self.kinds),
            "modules": dict(self.modules),
            **header,
            "files": {
                name: {"bytes": (self.folder / name).stat().st_size, "sha256": _sha256(self.folder / name)}
                for name in names
            },
        }
        header["checksum"] = _checksum(header)
        (self.folder / HEADER).write_text(json.dumps(header, indent=1) + "\n")


@contextmanager
def new_store(
    path: str | Path, tokenizer: Any, *, chat_template: bool = False, made: Any = None
) -> Iterator[StoreWriter]:
    """A writer of a new store, which appears under `path` when the block ends without an error.

    `chat_template`: whether the prompts were made with the tokenizer's; `made`: JSON that says how. ConfigError if
    `path` exists, or if the block adds no prompt.
    """
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise ConfigError(f"{path}: exists already; remove it or choose another")
    mine = Fingerprint.of(tokenizer)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    dtype = np.dtype(np.uint16 if mine.size <= 1 << 16 else np.uint32)
    partial.mkdir(parents=True)
    try:
        with ExitStack() as stack:
            files = {part: stack.enter_context((partial / PARTS[part]).open("wb")) for part in PARTS}
            writer = StoreWriter(partial, dtype, files)
            yield writer
        if not writer.count:
            raise ConfigError(f"{path}: there are no prompts to store")
        template = mine.template if chat_template else None
        writer.finish({"tokenizer": mine.as_json(), "chat_template": template, "made": made})
        for file in (*partial.iterdir(), partial):
            _sync(file)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checksum(header: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(header, sort_keys=True).encode()).hexdigest()
