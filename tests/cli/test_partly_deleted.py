"""A checkpoint that is partly deleted: each of its files in turn, and each use of it, has one defined outcome.

Oracle: the same use of the whole checkpoint, which every one of them passes.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from convert_jobs import require_one_message, run
from jobs import Job, records

from flowrl_mega import checkpoint
from flowrl_mega.cli import main

pytestmark = pytest.mark.ranks

NEWEST = "step_6"
COPY = "make or copy it again"
BROKEN = ["broken checkpoint", f"remove RUN/checkpoints/{NEWEST} to resume from an older one"]
NO_TOKENIZER = ["its tokenizer cannot be loaded"]
FINE: list[str] = []
# file -> what is said of it when the run is resumed, when a new run starts from it, and when it is converted; FINE: it
# is not needed there
OUTCOMES: dict[str, tuple[list[str], list[str], list[str]]] = {
    ".metadata": ([*BROKEN, ".metadata is missing"], [".metadata is missing", COPY], ["holds no .metadata"]),
    "__0_0.distcp": ([*BROKEN, "__0_0.distcp is missing"], ["__0_0.distcp: is missing", COPY], ["is missing", COPY]),
    "__1_0.distcp": ([*BROKEN, "__1_0.distcp is missing"], ["__1_0.distcp: is missing", COPY], ["is missing", COPY]),
    "metadata.json": ([*BROKEN, "metadata.json is missing"], ["metadata.json is missing", COPY], FINE),
    "integrity.json": ([*BROKEN, "integrity.json cannot be read"], FINE, FINE),
    "config.json": (FINE, ["holds no config.json"], ["holds no config.json; put the model's there"]),
    "generation_config.json": (FINE, FINE, FINE),
    "hf_weight_map.json": (FINE, FINE, FINE),
    "tokenizer.json": (FINE, NO_TOKENIZER, ["and no tokenizer, and so does the export"]),
    "tokenizer_config.json": (FINE, FINE, FINE),
}
# of the export beside it (checkpoint.export_hf): said when a new run starts from it, and when it is converted
EXPORTED: dict[str, tuple[list[str], list[str]]] = {
    "config.json": (["holds no config.json"], ["holds no config.json"]),
    "generation_config.json": (FINE, FINE),
    "model.safetensors": (["holds no *.safetensors"], ["holds no *.safetensors"]),
    "tokenizer.json": (NO_TOKENIZER, FINE),
    "tokenizer_config.json": (FINE, FINE),
    "log_z/log_z.safetensors": (FINE, ["log_z': holds no *.safetensors"]),
    "log_z/log_z.json": (FINE, FINE),
}
ENDS_WELL = ("and no tokenizer, and so does the export",)  # a line, and exit code 0


@pytest.fixture(scope="module")
def whole(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The finished run with its two checkpoints; the newest with an export. Not to be changed."""
    folder = shutil.copytree(finished / "run", tmp_path_factory.mktemp("whole") / "run")
    newest = folder / "checkpoints" / NEWEST
    checkpoint.megatron_to_hf(newest, newest / "hf", show=False)
    return folder


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_tables_have_every_file(whole: Path) -> None:
    newest = whole / "checkpoints" / NEWEST
    assert files(newest) == OUTCOMES.keys() | {f"hf/{name}" for name in EXPORTED}


Use = Callable[[Path, Path, Path], int]  # (settings of the run, the copied run, a new folder) -> exit code
USES: dict[str, Use] = {
    "resume": lambda config, copy, new: main(["train", str(config), f"--run_dir={copy}", "--steps=8", "--dry-run"]),
    "start": lambda config, copy, new: main(
        ["train", str(config), f"--run_dir={new}", f"--model.path={copy / 'checkpoints' / NEWEST}", "--dry-run"]
    ),
    "convert": lambda config, copy, new: run("mcore2hf", "--ckpt", copy / "checkpoints" / NEWEST, "--out", new),
    "start from the export": lambda config, copy, new: main(
        ["train", str(config), f"--run_dir={new}", f"--model.path={copy / 'checkpoints' / NEWEST / 'hf'}", "--dry-run"]
    ),
    "convert the export": lambda config, copy, new: run(
        "hf2mcore", "--hf", copy / "checkpoints" / NEWEST / "hf", "--out", new
    ),
}
CASES = [(name, use, said) for name, of in OUTCOMES.items() for use, said in zip(USES, of, strict=False)]
CASES += [(f"hf/{name}", "resume", FINE) for name in EXPORTED]
CASES += [
    (f"hf/{name}", use, said) for name, of in EXPORTED.items() for use, said in zip(list(USES)[3:], of, strict=True)
]
CASES += [("", use, FINE) for use in USES]  # nothing is deleted


@pytest.mark.parametrize(("name", "use", "said"), CASES, ids=[f"{use}, {name or 'whole'}" for name, use, _ in CASES])
def test_one_file_is_gone(
    name: str, use: str, said: list[str], whole: Path, finished: Path, tmp_path: Path, capfd: Any
) -> None:
    """It goes on, or it is one message that names the file and what to do; no traceback, and nothing is written."""
    copy = shutil.copytree(whole, tmp_path / "run", copy_function=link)
    if name:
        (copy / "checkpoints" / NEWEST / name).unlink()
    before = files(tmp_path)
    code = USES[use](finished / "config.yaml", copy, tmp_path / "new")
    message = capfd.readouterr().err.replace(str(copy), "RUN")
    assert code == (2 if said and not any(part in ENDS_WELL for part in said) else 0), message
    assert all(part in message for part in said), message
    if code:
        require_one_message(message.replace("flowrl-mega: ", "convert_ckpt: "))
        assert files(tmp_path) == before
    elif use != "resume":  # which may say that the settings are others
        assert message.count("\n") == len(said), message


def link(source: str, target: str) -> None:
    """Copies share their bytes: some of the files are large, and none is changed."""
    Path(target).hardlink_to(source)


def test_resumed_without_what_stands_beside_the_weights(whole: Path, finished: Path, tmp_path: Path) -> None:
    """All that a resume does not need, gone at once: the same steps to the bit, and the next checkpoint has them."""
    for kind in ("whole", "partly"):
        copy = shutil.copytree(whole, tmp_path / kind)
        gone = [n for n, said in OUTCOMES.items() if said[0] == FINE] if kind == "partly" else []
        for name in gone:
            (copy / "checkpoints" / NEWEST / name).unlink()
        arguments = ["train", str(finished / "config.yaml"), f"--run_dir={copy}", "--steps=8"]
        Job(arguments, tmp_path / f"{kind} log").run()
        assert files(copy / "checkpoints" / "step_8") == OUTCOMES.keys()
    for name in ("metrics", "samples", "evaluation"):
        assert records(tmp_path / "partly", name) == records(tmp_path / "whole", name)


def test_the_older_one_serves_as_the_message_says(whole: Path, finished: Path, tmp_path: Path, capfd: Any) -> None:
    copy = shutil.copytree(whole, tmp_path / "run")
    for path in (copy / "checkpoints" / NEWEST).iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    resume = ["train", str(finished / "config.yaml"), f"--run_dir={copy}", "--steps=8", "--dry-run"]
    assert main(resume) == 2
    assert f"remove {copy}/checkpoints/{NEWEST} to resume from an older one" in capfd.readouterr().err
    (copy / "checkpoints" / NEWEST).rmdir()
    assert main(resume) == 0
    assert f"resuming {copy}/checkpoints/step_4" in capfd.readouterr().out
