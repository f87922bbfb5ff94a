"""convert_ckpt at work: several ranks, progress, memory, verify, and exit codes."""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import termios
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import convert_jobs
import pytest
from convert_jobs import COMMANDS, Example, Forked, fail, listing, require_one_message, run, tool
from jobs import FORKSERVER
from safetensors.torch import load_file, save_file
from tiny_models import make

from flowrl_mega import checkpoint
from flowrl_mega.checkpoint import progress
from flowrl_mega.checkpoint.verify import prompts
from flowrl_mega.parallel import launch

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

both = pytest.mark.parametrize("command", COMMANDS)


@both
def test_ranks_share_the_work(command: str, example: Example, work: Path, tmp_path: Path) -> None:
    """Each file of weights is written by one of them, both write some, and the tensors are those of a single one."""
    job = Forked(example.arguments(command, work / "out"), tmp_path / "log", world=2, before=convert_jobs.report_files)
    assert job.codes() == [0, 0], job.log.read_text()
    written = re.findall(r"rank (\d) writes (.+)\n", job.log.read_text())
    files = {file: rank for rank, file in written}
    assert len(files) == len(written) and set(files.values()) == {"0", "1"}
    assert set(files) == {file.name for file in (work / "out").iterdir() if file.suffix in (".distcp", ".safetensors")}
    sizes = sorted(file.stat().st_size for file in (work / "out").iterdir() if file.name in files)
    assert sizes[-1] < 0.6 * sum(sizes)
    example.require_made(command, work / "out")


@both
def test_wrong_input_on_all_ranks(command: str, example: Example, work: Path, tmp_path: Path) -> None:
    (work / "out").mkdir()
    job = Forked(example.arguments(command, work / "out"), tmp_path / "log", world=2)
    assert job.codes() == [2, 2]
    require_one_message(job.log.read_text())
    assert "exists already" in job.log.read_text() and listing(work) == [(work / "out", 0)]


@pytest.mark.parametrize("rank", [0, 1])
@both
def test_wrong_input_on_one_rank(command: str, rank: int, example: Example, work: Path, tmp_path: Path) -> None:
    """A disk that one node lacks: the other rank must not wait for it, and the message must not be lost."""
    before = partial(convert_jobs.hide_config, rank)
    job = Forked(example.arguments(command, work / "out"), tmp_path / "log", world=2, before=before)
    assert job.codes() == [2, 2]
    require_one_message(job.log.read_text())
    assert "holds no config.json" in job.log.read_text()
    assert listing(work) == []


@pytest.mark.parametrize("rank", [0, 1])
@both
def test_a_full_disk_on_one_rank(command: str, rank: int, example: Example, work: Path, tmp_path: Path) -> None:
    full = partial(fail, OSError(errno.ENOSPC, "No space left on device"))
    before = partial(convert_jobs.in_the_middle, full, rank)
    job = Forked(example.arguments(command, work / "new" / "out"), tmp_path / "log", world=2, before=before)
    assert job.codes() == [2, 2], job.log.read_text()
    require_one_message(job.log.read_text())
    assert "out': cannot be written (No space left on device); choose another" in job.log.read_text()
    assert listing(work) == []


@pytest.mark.parametrize("step", ["_make", "_finish"])
@both
def test_a_folder_that_fails_on_rank_0(command: str, step: str, example: Example, work: Path, tmp_path: Path) -> None:
    """Only rank 0 makes it and gives it its name; the others must hear of it."""
    before = partial(convert_jobs.fail_in_folder, step)
    job = Forked(example.arguments(command, work / "new" / "out"), tmp_path / "log", world=2, before=before)
    assert job.codes() == [2, 2], job.log.read_text()
    require_one_message(job.log.read_text())
    assert "cannot be written (Input/output error)" in job.log.read_text() and listing(work) == []


@both
def test_a_bar_on_a_terminal(command: str, example: Example, work: Path, tmp_path: Path) -> None:
    terminal, other_end = pty.openpty()
    termios.tcsetwinsize(other_end, (25, 120))
    os.set_blocking(terminal, False)  # nothing to read is an error
    job = Forked(
        example.arguments(command, work / "out"), tmp_path / "log", before=partial(to_terminal, os.ttyname(other_end))
    )
    assert job.codes() == [0]
    last = rf"{command}: 100%.*4\.\d+M/4\.\d+M \[\d\d:\d\d<\d\d:\d\d, +[\d.]+[kMG]?B/s\]"
    shown, end = "", time.monotonic() + 30
    while not re.search(last, shown):  # the kernel hands on what was written when it has time for it
        assert time.monotonic() < end, shown
        with contextlib.suppress(BlockingIOError):
            shown += os.read(terminal, 1 << 16).decode()
        time.sleep(0.01)
    assert job.log.read_text() == ""


def to_terminal(name: str) -> None:
    sys.stderr = open(name, "w")  # noqa: SIM115


@both
def test_lines_elsewhere(command: str, example: Example, work: Path, monkeypatch: Patch, capfd: Capture) -> None:
    """A log file of a long copy gets a line every 15 s; here each tensor takes 5."""
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=partial(next, itertools.count(step=5))))
    assert run(*example.arguments(command, work / "out")) == 0
    number = r"([\d.]+)([kM])B"
    line = rf"{command}: {number} of 4\.93MB, {number}/s, (\d\d):(\d\d) left"
    for count, found in enumerate(capfd.readouterr().err.splitlines(), start=1):
        done, unit, pace, pace_unit, minutes, seconds = re.fullmatch(line, found).groups()
        bytes_done = float(done) * {"k": 1e3, "M": 1e6}[unit]
        assert float(pace) * 1e3 == pytest.approx(bytes_done / (15 * count), rel=0.01) and pace_unit == "k"
        left = (4.93e6 - bytes_done) / bytes_done * 15 * count
        assert 60 * int(minutes) + int(seconds) == pytest.approx(left, rel=0.05, abs=2)
    assert count >= 5


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the Linux kernel's measure")
@both
def test_memory(command: str, large: Example, work: Path, tmp_path: Path) -> None:
    """Of a model of 63 MB in six files, not even one file is ever in memory: some 2 MB are, as tensors have 1 MB."""
    sizes = sorted(file.stat().st_size for file in large.model.glob("*.safetensors"))
    assert len(sizes) == 6 and sum(sizes) > 60e6
    lines = [large.arguments(command, work / name) for name in ("warm_up", "out")]
    job = FORKSERVER.Process(target=convert_jobs.measure_growth, args=(*lines, tmp_path / "growth"))
    job.start()
    job.join(60)
    large.require_made(command, work / "out")
    growth = int((tmp_path / "growth").read_text())
    assert 0 < growth < sizes[-1], (growth, sizes)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Example:
    size = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 16}
    return Example(tmp_path_factory.mktemp("large"), "12MB", **size)


def verify(hf: Path, ckpt: Path, log: Path) -> tuple[list[int | None], str]:
    job = Forked(["verify", "--hf", str(hf), "--ckpt", str(ckpt)], log, world=1)
    return job.codes(), log.read_text()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, so that nobody looks at the embedding of a token that is in no prompt."""
    return make("mistral", tmp_path_factory.mktemp("small") / "model")


UNUSED = min(set(range(101)) - {token for sequence in prompts(101) for token in sequence.prompt})


@pytest.mark.parametrize(
    ("name", "index"),
    [
        ("model.embed_tokens.weight", [UNUSED, 3]),
        ("model.layers.1.self_attn.k_proj.weight", [9, 30]),
        ("model.layers.0.mlp.up_proj.weight", [47, 0]),
        ("model.norm.weight", [31]),
        ("lm_head.weight", [100, 31]),
    ],
)
def test_verify_finds_one_element(name: str, index: list[int], small: Path, tmp_path: Path) -> None:
    """By the tensors: no logit depends on the first of them."""
    shutil.copytree(small, tmp_path / "changed")
    tensors = load_file(small / "model.safetensors")
    before = tensors[name][tuple(index)].item()
    tensors[name][tuple(index)] += 1e-2
    save_file(tensors, tmp_path / "changed" / "model.safetensors")
    checkpoint.hf_to_megatron(tmp_path / "changed", tmp_path / "ckpt")
    codes, said = verify(small, tmp_path / "ckpt", tmp_path / "log")
    assert codes == [1] and said.endswith("\nNOT the same model\n"), said
    where = f"at {name}{index}: {before + 1e-2:.6g} in the checkpoint, {before:.6g} in the folder\n"
    assert f"tensors  {len(tensors)} compared: largest difference 0.01 {where}" in said
    logits = float(re.search(r"logits   largest difference (\S+) of", said)[1])
    assert (logits < 1e-5) == (name == "model.embed_tokens.weight")


def test_verify_finds_nothing(small: Path, tmp_path: Path, monkeypatch: Patch, capfd: Capture) -> None:
    """As two ranks, where the vocabulary of 101 is padded; forked here instead of started, which takes long."""

    def forked(command: list[str], world: int, agreed: tuple[int, int]) -> int:
        assert command[:2] == [sys.executable, tool().__file__]
        job = Forked(command[2:], tmp_path / "log", world)
        return 0 if job.codes() == [0] * world else 1

    monkeypatch.setattr(launch, "launch", forked)
    checkpoint.hf_to_megatron(small, tmp_path / "ckpt")
    assert run("verify", "--hf", small, "--ckpt", tmp_path / "ckpt", "--tp", "2") == 0
    said = (tmp_path / "log").read_text()
    assert said.count("all equal") == 1 and said.endswith("\nthe same model\n") and said.count("\n") == 3, said
    assert capfd.readouterr() == ("", "")


def test_verify_goes_by_the_index(tmp_path: Path) -> None:
    """transformers lets the last file win. A checkpoint of the copy that the index does not name is another model."""
    hf = make("llama", tmp_path / "hf")  # with a tied head
    tensors, name, other = load_file(hf / "model.safetensors"), "model.norm.weight", "model.embed_tokens.weight"
    stale = 7 * tensors[name]
    save_file({**tensors, name: stale}, hf / "model.safetensors")
    checkpoint.hf_to_megatron(hf, tmp_path / "stale")
    (hf / "model.safetensors").unlink()
    save_file({n: tensor for n, tensor in tensors.items() if n != other}, hf / "model-1.safetensors")
    save_file({other: tensors[other], name: stale}, hf / "model-2.safetensors")
    files = {n: f"model-{2 if n == other else 1}.safetensors" for n in tensors}
    (hf / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    checkpoint.hf_to_megatron(hf, tmp_path / "right")
    codes, said = verify(hf, tmp_path / "right", tmp_path / "log")
    assert codes == [0] and said.count(f"'{name}' in model-2.safetensors") == 1, said
    codes, said = verify(hf, tmp_path / "stale", tmp_path / "log 2")
    assert codes == [1] and f"at {name}[" in said, said
    assert float(re.search(r"logits   largest difference (\S+) of", said)[1]) > 1e-2


def test_as_a_program() -> None:
    """It answers before it imports torch; and an abbreviated option is none, as it may become another's."""
    program = [sys.executable, "-X", "importtime", tool().__file__]
    environment = {**os.environ, "PYTHONPATH": str(Path(checkpoint.__file__).parents[2])}
    for arguments, code, part in ((["--help"], 0, "hf2mcore"), (["verify", "--h=x", "--ckpt=x"], 2, "--hf")):
        job = subprocess.run([*program, *arguments], env=environment, capture_output=True, text=True, timeout=60)
        assert job.returncode == code and part in (job.stderr if code else job.stdout)
        assert " torch\n" not in job.stderr and " argparse\n" in job.stderr, "the list of imports"


def test_verify_of_broken_data(small: Path, tmp_path: Path) -> None:
    """Of the right size, so that only a rank that reads it finds out; 1 would mean that it could be compared."""
    checkpoint.hf_to_megatron(small, tmp_path / "ckpt")
    data = tmp_path / "ckpt" / "__0_0.distcp"
    data.write_bytes(b"x" * data.stat().st_size)
    codes, said = verify(small, tmp_path / "ckpt", tmp_path / "log")
    assert codes == [2]
    require_one_message(said)
    assert f"{tmp_path}/ckpt: is not a checkpoint of this model (invalid load key, 'x'.)" in said


def test_a_fault_is_no_difference(example: Example, work: Path, monkeypatch: Patch, capfd: Capture) -> None:
    """Python's own exit code after a traceback is 1, which means something else here."""
    monkeypatch.setattr(checkpoint, "hf_to_megatron", partial(fail, ZeroDivisionError("a fault")))
    assert run(*example.arguments("hf2mcore", work / "out")) == 70
    assert capfd.readouterr().err.endswith("ZeroDivisionError: a fault\n")
