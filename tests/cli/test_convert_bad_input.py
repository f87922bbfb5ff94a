"""convert_ckpt and wrong input: exit code 2, one message that names thing, value and fix, and nothing left behind."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from convert_jobs import refused, tool
from safetensors.torch import load_file, save_file
from tiny_models import make
from torch import Tensor
from transformers import AutoModelForCausalLM

from flowrl_mega.checkpoint import stream

Capture = pytest.CaptureFixture[str]
Change = Callable[[Path], Any]
unchanged: Change = lambda folder: None  # noqa: E731  for what is wrong as it is
LAST = "model.layers.1.mlp.down_proj.weight"
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
STORED = "embedding.word_embeddings.weight"
SINGLE, INDEX, MAP, DATA = "model.safetensors", "model.safetensors.index.json", "hf_weight_map.json", "__0_0.distcp"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models in one file or in several, and their checkpoints. Not to be changed."""
    base = tmp_path_factory.mktemp("folders")
    found = {name: base / name for name in ("tied", "untied", "files", "tied ckpt", "files ckpt", "nothing")}
    make("llama", found["tied"])
    make("mistral", found["untied"])
    AutoModelForCausalLM.from_pretrained(found["untied"]).save_pretrained(found["files"], max_shard_size="20KB")
    for name in ("tied", "files"):
        assert tool().main(["hf2mcore", "--hf", str(found[name]), "--out", str(found[f"{name} ckpt"])]) == 0
    return found


@pytest.fixture
def copied(folders: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """A copy, to be changed, of one of the folders; "nothing" gives a path where there is none."""

    def copy(name: str) -> Path:
        if folders[name].is_dir():
            shutil.copytree(folders[name], tmp_path / "copy")
        return tmp_path / "copy"

    return copy


def write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text)


def config(**changes: Any) -> Change:
    """config.json with other values."""
    return edited("config.json", lambda tree: {**tree, **changes})


def edited(name: str, new: Callable[[Any], Any]) -> Change:
    """A JSON file with other contents."""
    return lambda folder: (folder / name).write_text(json.dumps(new(json.loads((folder / name).read_text()))))


without_flag = edited("config.json", lambda tree: {k: v for k, v in tree.items() if k != "tie_word_embeddings"})


def to(file: Callable[[str], Any]) -> Change:
    """The map of names to files, with other files."""
    return edited(MAP, lambda names: {name: file(name) for name in names})


def remove(name: str) -> Change:
    return lambda folder: next(folder.glob(name)).unlink()


def cut(name: str, size: float) -> Change:
    """To so many bytes, or to this share of them."""

    def change(folder: Path) -> None:
        file = next(folder.glob(name))
        os.truncate(file, int(size if size > 1 else size * file.stat().st_size))

    return change


def tensor(name: str, new: Callable[[Tensor], Tensor] | None) -> Change:
    """This tensor of the safetensors anew, of what it was; None removes it."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / SINGLE)
        old = tensors.pop(name, torch.ones(3))
        save_file({**tensors, **({name: new(old).contiguous()} if new else {})}, folder / SINGLE)

    return change


def stored(key: str, new: Callable[[Tensor], Tensor]) -> Change:
    """This tensor of the checkpoint anew, of what it was; all are written again."""

    def change(folder: Path) -> None:
        reader = stream.Reader(folder)
        tensors = {k: reader.read(k, (0,) * len(shape), shape) for k, shape in reader.shapes.items()}
        tensors[key] = new(tensors[key])
        (folder / DATA).unlink()
        (folder / ".metadata").unlink()
        chunks = [
            stream.Chunk(k, (0,) * t.dim(), tuple(t.shape), tuple(t.shape), t.dtype, partial(Tensor.clone, t))
            for k, t in tensors.items()
        ]
        stream.write(folder, chunks, {}, lambda size: None)

    return change


def rows(count: int) -> Callable[[Tensor], Tensor]:
    return lambda tensor: tensor.repeat(-(-count // len(tensor)), 1)[:count]


def tied_to(new: Callable[[Tensor], Tensor]) -> Change:
    """config.json says that the head is the embedding, and there is a head."""
    return lambda folder: (config(tie_word_embeddings=True)(folder), tensor(HEAD, new)(folder))


def log_z(folder: Path) -> None:
    (folder / "log_z").mkdir()
    save_file({"value": torch.ones(1).char()}, folder / "log_z" / "log_z.safetensors")


NO_FOLDER = ["--hf = '", "/copy'", "no config.json", "give a Hugging Face model folder"]
BROKEN = ["/copy/model.safetensors: broken or cut off", "get the model folder again"]
# which folder, how it is changed, what the message must contain: the thing and its value, and the fix
HF: dict[str, tuple[str, Change, list[str]]] = {
    "no such folder": ("nothing", unchanged, NO_FOLDER),
    "no config": ("tied", remove("config.json"), NO_FOLDER),
    "broken config": ("tied", write("config.json", "{"), ["/copy/config.json: not valid JSON", "again"]),
    "config of nothing": ("tied", write("config.json", "[]"), ["config.json: model_type = None", "one of llama"]),
    "config of numbers": ("tied", write("config.json", "[1]"), ["/copy/config.json: not valid JSON", "again"]),
    "empty config": ("tied", cut("config.json", 0), ["/copy/config.json: not valid JSON", "again"]),
    "unknown type": ("tied", config(model_type="mamba"), ["model_type = 'mamba'", "one of llama, mistral, qwen2"]),
    "no size": ("tied", config(hidden_size=None), ["config.json: refused by transformers", "hidden_size", "again"]),
    "empty": ("tied", cut(SINGLE, 0), BROKEN),
    "cut in the length": ("tied", cut(SINGLE, 5), BROKEN),
    "cut in the header": ("tied", cut(SINGLE, 1000), BROKEN),
    "cut in the data": ("tied", cut(SINGLE, 0.5), BROKEN),
    "cut at the end": ("tied", cut(SINGLE, 0.9999), BROKEN),
    "cut file of many": ("files", cut("model-00003*", 0.9), ["/model-00003-of-00005.safetensors: broken", "again"]),
    "missing file": ("files", remove("model-00002*"), ["model-00002-of-00005.safetensors is missing", "again"]),
    "broken index": ("files", write(INDEX, "{"), [f"{INDEX}: not an index", "get the model folder again"]),
    "index of nothing": ("files", write(INDEX, "{}"), [f"{INDEX}: not an index", "weight_map", "again"]),
    "index of numbers": ("files", write(INDEX, '{"weight_map": {"x": 1}}'), [f"{INDEX}: not an index", "again"]),
    "missing tensor": ("untied", tensor(LAST, None), [f"no tensor '{LAST}'", "incomplete, or", "of another model"]),
    "unexpected tensor": ("untied", tensor("more", Tensor.exp), ["unexpected tensor 'more'", "config.json"]),
    "wrong shape": ("untied", tensor(LAST, Tensor.t), [f"'{LAST}' has shape (48, 32)", "(32, 48)", "another model"]),
    "fewer rows": ("untied", tensor(HEAD, rows(90)), [f"'{HEAD}' has shape (90, 32)", "set its vocab_size = 90"]),
    "more rows": ("tied", tensor(EMBEDDING, rows(128)), [EMBEDDING, "(128, 32)", "set its vocab_size = 128"]),
    "more layers": ("tied", config(num_hidden_layers=3), ["no tensor 'model.layers.2.", "config.json"]),
    "fewer layers": ("tied", config(num_hidden_layers=1), ["unexpected tensor 'model.layers.1.", "config.json"]),
    "other heads": ("tied", config(num_key_value_heads=1), ["k_proj.weight' has shape (16, 32)", "(8, 32)"]),
    "another head": ("untied", tied_to(Tensor.exp), ["tie_word_embeddings = true", HEAD, "set it to false"]),
    "no head": ("tied", config(tie_word_embeddings=False), [f"no tensor '{HEAD}'", "config.json"]),
    "quantized": ("tied", tensor(LAST, Tensor.char), [f"'{LAST}' is of type I8", "F32, BF16, F16", "unquantized"]),
    "quantized head": ("untied", tied_to(Tensor.char), [f"'{HEAD}' is of type I8", "unquantized"]),
    "quantized log Z": ("tied", log_z, ["log_z.safetensors: 'value' is of type I8", "unquantized"]),
    "mixed types": ("tied", tensor(LAST, Tensor.bfloat16), [f"'{LAST}' is of another type", "--dtype"]),
    "pickled": (
        "tied",
        lambda folder: (folder / SINGLE).rename(folder / "pytorch_model.bin"),
        ["holds no *.safetensors", "pytorch_model.bin must be saved as safetensors first"],
    ),
    "no weights": ("tied", remove(SINGLE), ["holds no *.safetensors", "give a Hugging Face model folder"]),
    "a checkpoint": ("tied ckpt", unchanged, ["holds no *.safetensors", "give a Hugging Face model folder"]),
}  # fmt: skip


def test_one_dtype_cures_mixed_types(copied: Callable[[str], Path], tmp_path: Path, capfd: Capture) -> None:
    """As the message says; and all that was fp32 is now bf16."""
    folder = copied("tied")
    tensor(LAST, Tensor.bfloat16)(folder)
    arguments = ["hf2mcore", "--hf", str(folder), "--out", str(tmp_path / "out"), "--dtype", "bf16"]
    assert tool().main(arguments) == 0
    assert capfd.readouterr() == ("", "")
    assert set(stream.Reader(tmp_path / "out").dtypes.values()) == {torch.bfloat16}


NO_CHECKPOINT = ["--ckpt = '", "/copy': holds no .metadata", "give a checkpoint that"]
AGAIN, MAP_FIX = "make or copy it again", "remove it for files of 5 GB"
NO_HEAD, A_HEAD = "no tensor 'output_layer.weight'", "unexpected tensor 'output_layer.weight'"
TIED, UNTIED = "set tie_word_embeddings = true in ", "set tie_word_embeddings = false in "
MEGATRON: dict[str, tuple[str, Change, list[str]]] = {
    "no such folder": ("nothing", unchanged, NO_CHECKPOINT),
    "a model folder": ("tied", unchanged, NO_CHECKPOINT),
    "no metadata": ("tied ckpt", remove(".metadata"), NO_CHECKPOINT),
    "empty metadata": ("tied ckpt", cut(".metadata", 0), ["/copy/.metadata: cannot be read", AGAIN]),
    "cut metadata": ("tied ckpt", cut(".metadata", 0.5), ["/copy/.metadata: cannot be read", AGAIN]),
    "no config": ("tied ckpt", remove("config.json"), ["--ckpt = '", "no config.json; put the model's there"]),
    "missing data": ("tied ckpt", remove(DATA), [f"/copy/{DATA}: is missing", AGAIN]),
    "cut data": ("tied ckpt", cut(DATA, 5000), [f"/copy/{DATA}: is cut off, 5000 bytes of 1", AGAIN]),
    "cut at the end": ("tied ckpt", cut(DATA, 0.9999), [f"/copy/{DATA}: is cut off", AGAIN]),
    "broken data": ("tied ckpt", write(DATA, "x" * 200000), [f"'{STORED}' cannot be read", AGAIN]),
    "more layers": ("tied ckpt", config(num_hidden_layers=3), ["(2, 32) instead of (3, 32)", "config.json"]),
    "fewer layers": ("tied ckpt", config(num_hidden_layers=1), ["(2, 32) instead of (1, 32)", "config.json"]),
    "other size": ("tied ckpt", config(hidden_size=64), [STORED, "(101, 32) instead of (101, 64)", "config.json"]),
    "more rows": ("tied ckpt", config(vocab_size=102), [STORED, "(101, 32) instead of (102, 32)", "config.json"]),
    "far fewer rows": ("tied ckpt", stored(STORED, rows(101 + 8192)), [STORED, "(8293, 32) instead of (101, 32)"]),
    "no head": ("tied ckpt", config(tie_word_embeddings=False), [NO_HEAD, TIED]),
    "no flag": ("tied ckpt", without_flag, [NO_HEAD, TIED]),
    "a head": ("files ckpt", config(tie_word_embeddings=True), [A_HEAD, UNTIED]),
    "quantized": ("tied ckpt", stored(STORED, Tensor.char), [STORED, "type torch.int8", "fp32, bf16 or fp16"]),
    "broken map": ("tied ckpt", write(MAP, "{"), [f"/copy/{MAP}: no map of names", MAP_FIX]),
    "map of numbers": ("tied ckpt", to(len), [f"/copy/{MAP}: no map of names", MAP_FIX]),
    "map of nothing": ("tied ckpt", write(MAP, "{}"), [f"/copy/{MAP}: does not fit", "'model.", MAP_FIX]),
    "another's map": ("files ckpt", edited(MAP, lambda m: m | {"x": SINGLE}), [f"{MAP}: does not fit", "'x'", MAP_FIX]),
    "map to elsewhere": ("tied ckpt", to("../{}.safetensors".format), [f"{MAP}: does not fit", MAP_FIX]),
    "map to config": ("tied ckpt", to(lambda name: "config.json"), [f"{MAP}: does not fit", MAP_FIX]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("command", "case"), [*(("hf2mcore --hf", case) for case in HF), *(("mcore2hf --ckpt", case) for case in MEGATRON)]
)
def test_refused(command: str, case: str, copied: Callable[[str], Path], tmp_path: Path, capfd: Capture) -> None:
    name, change, parts = (HF if "--hf" in command else MEGATRON)[case]
    folder = copied(name)
    change(folder)
    message = refused(capfd, tmp_path, *command.split(), folder, "--out", tmp_path / "new" / "out")
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("stored_rows", [104, 101 + 8191])
def test_padded_rows_are_cut_off(
    stored_rows: int, copied: Callable[[str], Path], folders: dict[str, Path], tmp_path: Path
) -> None:
    """Megatron stores the vocabulary as long as tensor parallelism made it: a multiple of 128 tp rows at most."""
    folder = copied("tied ckpt")
    stored(STORED, rows(stored_rows))(folder)
    assert stream.Reader(folder).shapes[STORED] == (stored_rows, 32)
    assert tool().main(["mcore2hf", "--ckpt", str(folder), "--out", str(tmp_path / "out")]) == 0
    found, wanted = load_file(tmp_path / "out" / SINGLE), load_file(folders["tied"] / SINGLE)
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


VERIFY: dict[str, tuple[str, list[str], list[str]]] = {
    "does not divide": ("tied ckpt", ["--tp", "3"], ["--tp = 3", "4 attention heads", "use one of 1, 2"]),
    "no ranks": ("tied ckpt", ["--tp", "0"], ["--tp = 0", "use 1 or more"]),
    "less than none": ("tied ckpt", ["--tp=-2"], ["--tp = -2", "use 1 or more"]),
    "another model": ("files ckpt", [], ["--ckpt = '", "of another model than --hf", HEAD, "the two of one model"]),
    "a model folder": ("tied", [], NO_CHECKPOINT),
}  # fmt: skip


@pytest.mark.parametrize("case", VERIFY)
def test_verify(
    case: str, folders: dict[str, Path], copied: Callable[[str], Path], tmp_path: Path, capfd: Capture
) -> None:
    """Found before any rank is started."""
    name, options, parts = VERIFY[case]
    message = refused(capfd, tmp_path, "verify", "--hf", folders["tied"], "--ckpt", copied(name), *options)
    assert all(part in message for part in parts), message
