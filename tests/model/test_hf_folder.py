"""Which tensor is read where a model folder holds several copies, and which folders are refused for it.

The oracle is the model that the folder was cut from: copies that do not count are all sevens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.hf_folder import INDEX, SINGLE, HfFolder

ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
HEAD, NORM = "lm_head.weight", "model.norm.weight"
Files = dict[str, dict[str, Tensor]]


class Cut:
    """A model in two files, the halves of its sorted names; `index` maps the names to them. A case changes both."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        self.tensors, names = tensors, sorted(tensors)
        self.files: Files = {ONE: self.of(*names[:13]), TWO: self.of(*names[13:])}
        self.index: dict[str, str] | None = {name: file for file, held in self.files.items() for name in held}
        self.bytes: dict[str, bytes] = {}  # of files that are no safetensors

    def of(self, *names: str) -> dict[str, Tensor]:
        return {name: self.tensors[name] for name in names}

    def stale(self, *names: str) -> dict[str, Tensor]:
        return {name: torch.full_like(self.tensors[name], 7) for name in names}

    def write(self, folder: Path) -> Path:
        for file, held in self.files.items():
            save_file(held, folder / file, metadata={"format": "pt"})
        for file, content in self.bytes.items():
            (folder / file).write_bytes(content)
        if self.index is not None:
            (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": self.index}))
        return folder


@pytest.fixture
def cut(tiny_model: Callable[..., Path], tmp_path: Path) -> Cut:
    model = tiny_model("qwen2")
    (tmp_path / "config.json").write_text((model / "config.json").read_text())
    return Cut(load_file(model / SINGLE))


def moved(cut: Cut, name: str, to: str) -> None:
    """The index names another file for it than the one that has it."""
    assert cut.index
    cut.index[name] = to


def without_index(cut: Cut, **files: dict[str, Tensor]) -> None:
    cut.index = None
    cut.files |= {f"{name.replace('_', '-')}.safetensors": held for name, held in files.items()}


def renamed(cut: Cut, *names: str) -> None:
    without_index(cut)
    cut.files = dict(zip(names, cut.files.values(), strict=True))


# case -> the change, and what is left alone
READ: dict[str, tuple[Callable[[Cut], None], list[str]]] = {
    "as saved": (lambda c: None, []),
    "a stale copy in a later file": (lambda c: c.files[TWO].update(c.stale(HEAD)), [f"'{HEAD}' in {TWO}"]),
    "a stale copy in an earlier file": (lambda c: c.files[ONE].update(c.stale(NORM)), [f"'{NORM}' in {ONE}"]),
    "a tensor of another version": (lambda c: c.files[TWO].update(old=torch.ones(3)), [f"'old' in {TWO}"]),
    "one of a type that no policy has": (lambda c: c.files[ONE].update(n=torch.ones(3).long()), [f"'n' in {ONE}"]),
    "a whole file beside": (lambda c: c.files.update({SINGLE: c.stale(HEAD, NORM)}), [SINGLE]),
    "a broken file beside": (lambda c: c.bytes.update({SINGLE: b"x"}), [SINGLE]),
    "an index with ./": (lambda c: moved(c, NORM, f"./{TWO}"), []),
    "a third of three": (
        lambda c: c.files.update({"model-00003-of-00003.safetensors": c.stale(HEAD)}),
        ["model-00003-of-00003.safetensors"],
    ),
    "another format beside": (lambda c: c.files.update({"consolidated.safetensors": c.stale(HEAD)}), []),
    "no index": (without_index, []),
    "no index, another format beside": (lambda c: without_index(c, consolidated=c.stale(HEAD)), []),
    "no index, names of one's own": (lambda c: renamed(c, "first.safetensors", "second.safetensors"), []),
    "no index, names that begin alike": (lambda c: renamed(c, "model_a.safetensors", "model_b.safetensors"), []),
}  # fmt: skip


@pytest.mark.parametrize("case", READ)
def test_a_tensor_is_that_of_the_file_which_the_index_names(
    case: str, cut: Cut, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change, left_alone = READ[case]
    change(cut)
    folder = HfFolder(cut.write(tmp_path))
    folder.check(read_architecture(tmp_path))
    assert folder.tensors.keys() == cut.tensors.keys() == folder.weight_map.keys()
    assert all(torch.equal(folder.read(name), tensor) for name, tensor in cut.tensors.items())
    assert folder.left_alone == left_alone
    folder.tell_left_alone()
    said = capsys.readouterr().err
    assert said.count("\n") == bool(left_alone) and all(what in said for what in left_alone), said


REFUSED: dict[str, tuple[Callable[[Cut], None], list[str]]] = {
    "not in the file that the index names": (
        lambda c: moved(c, NORM, ONE),
        [f"{ONE}: holds no tensor '{NORM}'", f"{INDEX} says that it does", "get the model folder again"],
    ),
    "not there, but another has a stale copy": (
        lambda c: (c.files[ONE].update(c.stale(NORM)), c.files[TWO].pop(NORM)),
        [f"{TWO}: holds no tensor '{NORM}'", INDEX],
    ),
    "an index of elsewhere": (lambda c: moved(c, NORM, f"../{SINGLE}"), [INDEX, "'../model.safetensors'"]),
    "two sets of shards": (
        lambda c: without_index(c, **{f"model_0000{n}_of_00003": c.stale(HEAD) for n in (1, 2, 3)}),
        [ONE, "model-00001-of-00003.safetensors", "two sets", "remove one set"],
    ),
    "a shard of another set": (
        lambda c: renamed(c, ONE, "model-00002-of-00003.safetensors"),
        [ONE, "model-00002-of-00003.safetensors", "two sets"],
    ),
    "shards and a whole file": (
        lambda c: without_index(c, model=c.stale(HEAD)), [ONE, SINGLE, "two sets", "remove one set"],
    ),
    "shards that share a tensor": (
        lambda c: (without_index(c), c.files[TWO].update(c.stale(HEAD))),
        [ONE, TWO, f"both hold '{HEAD}'", "remove one of them"],
    ),
    "two copies under names of one's own": (
        lambda c: (renamed(c, "a.safetensors", "b.safetensors"), c.files["b.safetensors"].update(c.stale(HEAD))),
        ["a.safetensors and b.safetensors both hold"],
    ),
    "two saves": (
        lambda c: (renamed(c, SINGLE, "model.fp16.safetensors"), c.files[SINGLE].update(c.stale(NORM))),
        ["model.fp16.safetensors", SINGLE, "both hold"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_leaves_open_which_tensor_counts_is_refused(case: str, cut: Cut, tmp_path: Path) -> None:
    """One of the copies would be taken, and nobody would know."""
    change, parts = REFUSED[case]
    change(cut)
    with pytest.raises(ConfigError) as refusal:
        HfFolder(cut.write(tmp_path)).check(read_architecture(tmp_path))
    message = str(refusal.value)
    assert str(tmp_path) in message and all(part in message for part in parts), message
