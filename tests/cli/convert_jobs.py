"""tools/convert_ckpt.py as tests run it: in this process, or in forked ones, alone or as the ranks of a job."""

from __future__ import annotations

import ctypes
import errno
import importlib.util
import io
import os
import signal
import sys
import time
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from jobs import FORKSERVER
from safetensors.torch import load_file
from torch import Tensor

from flowrl_mega.checkpoint import folder, stream
from flowrl_mega.model import hf_folder
from flowrl_mega.parallel.launch import rank_environment, rendezvous_store

COMMANDS = ("hf2mcore", "mcore2hf")


@cache
def tool() -> ModuleType:
    path = Path(__file__).parents[2] / "tools" / "convert_ckpt.py"
    spec = importlib.util.spec_from_file_location("convert_ckpt", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(*arguments: str | Path) -> int:
    return tool().main([str(argument) for argument in arguments])


def listing(folder: Path) -> list[tuple[Path, int]]:
    """All that lies in the folder, however deep and hidden, with the sizes of files."""
    return sorted((path, path.lstat().st_size * (not path.is_dir())) for path in folder.rglob("*"))


def refused(capfd: Any, folder: Path, *arguments: str | Path) -> str:
    """The message, after a look at how it was given and at what is left in `folder`."""
    before = listing(folder)
    assert run(*arguments) == 2
    said = capfd.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    require_one_message(said.err)
    assert listing(folder) == before, "nothing may be left"
    return said.err


def require_one_message(text: str) -> None:
    assert text.startswith("convert_ckpt: ") and text.endswith("\n") and text.count("\n") == 1, text


class Example:
    """5 MB as each command makes them: a model of three files, and its checkpoint of one. Not to be changed."""

    def __init__(self, base: Path, file_size: str = "2MB", **size: int) -> None:
        from tiny_models import make  # not in forked processes: transformers' models take it a second
        from transformers import AutoModelForCausalLM

        small = make("mistral", base / "small", **{"hidden_size": 256, "intermediate_size": 512, **size})
        self.model, self.done = base / "model", {command: base / command for command in COMMANDS}
        AutoModelForCausalLM.from_pretrained(small).save_pretrained(self.model, max_shard_size=file_size)
        self.inputs = {"hf2mcore": ["--hf", str(self.model)], "mcore2hf": ["--ckpt", str(self.done["hf2mcore"])]}
        for command, out in self.done.items():
            assert run(*self.arguments(command, out)) == 0

    def arguments(self, command: str, out: str | Path) -> list[str]:
        """The command line that makes it once more, as this folder."""
        return [command, *self.inputs[command], "--out", str(out)]

    def require_made(self, command: str, out: Path) -> None:
        """The same tensors, and the same files but for those of a checkpoint, which depend on how many ranks wrote."""
        found, wanted = weights(out), weights(self.done[command])
        assert found.keys() == wanted.keys() and len(wanted) >= 9
        for name, tensor in wanted.items():
            assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
        names, wanted_names = (
            {p.name for p in f.iterdir() if p.suffix != ".distcp"} for f in (out, self.done[command])
        )
        assert names == wanted_names


def weights(folder: Path) -> dict[str, Tensor]:
    """Every tensor of either format, as torch or safetensors reads it."""
    if not (folder / ".metadata").exists():
        return {
            name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()
        }
    described = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    tensors = {key: torch.empty(m.size, dtype=m.properties.dtype) for key, m in described if hasattr(m, "properties")}
    with warnings.catch_warnings(action="ignore"):  # that there are no ranks
        dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    return tensors


class Forked:
    """Processes that run convert_ckpt with these arguments; their output goes to `log`.

    `world` 0 is a process that nobody launched; else it is that many ranks in torchrun's environment. `before` is what
    each runs first.
    """

    def __init__(
        self, arguments: list[str], log: Path, world: int = 0, before: Callable[[], Any] | None = None
    ) -> None:
        self.store, self.log = rendezvous_store(), log
        environments = [rank_environment(rank, world, self.store.port) for rank in range(world)] or [{}]
        self.processes = [
            FORKSERVER.Process(target=_run, args=(arguments, environment, log, before), daemon=True)
            for environment in environments
        ]
        for process in self.processes:
            process.start()

    def codes(self, timeout: float = 60) -> list[int | None]:
        """The exit codes, by rank; -9 is that of a process which did not end in time."""
        end = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
            process.kill()
            process.join()
        return [process.exitcode for process in self.processes]


def _run(arguments: list[str], environment: dict[str, str], log: Path, before: Callable[[], Any] | None) -> None:
    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may have told us to ignore it
    if before:
        before()
    sys.exit(run(*arguments))


class _File(io.BufferedWriter):
    """Does something as soon as `after` bytes have been written to it."""

    def __init__(self, path: Path, after: int, act: Callable[[], Any]) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.after, self.act = after, act

    def write(self, data: Any) -> int:
        if self.tell() >= self.after:
            self.act()
        return super().write(data)


def in_the_middle(act: Callable[[], Any], rank: int | None = None, after: int = 300_000) -> None:
    """Let this process (if it is `rank`) run `act` in the middle of each file of weights that it writes."""

    def opened(path: Path, mode: str) -> Any:
        return _File(path, after, act) if mode == "wb" else open(path, mode)

    if rank is None or os.environ["RANK"] == str(rank):
        stream.open = hf_folder.open = opened  # type: ignore[attr-defined]


def report_files() -> None:
    """Let this process say on which file of weights it works."""

    def opened(path: Path, mode: str) -> Any:
        if mode == "wb":
            os.write(
                1, f"rank {os.environ['RANK']} writes {path.name}\n".encode()
            )  # in one go, beside the other rank's
        return open(path, mode)

    stream.open = hf_folder.open = opened  # type: ignore[attr-defined]


def fail(error: Exception, *args: Any, **kwargs: Any) -> None:
    raise error


def fail_in_folder(step: str) -> None:
    """Let rank 0 fail in this step of making a folder; the others never get there."""
    setattr(folder, step, lambda *paths: fail(OSError(errno.EIO, "Input/output error")))


def hide_config(rank: int) -> None:
    """Let only this rank find no config.json, as on a node where a disk is not mounted."""
    real = Path.is_file
    if os.environ["RANK"] == str(rank):
        Path.is_file = lambda path: path.name != "config.json" and real(path)  # type: ignore[method-assign]


def measure_growth(warm_up: list[str], arguments: list[str], result: Path) -> None:
    """By how many bytes this process's memory grows at most, pages of mapped files included; after a first run.

    glibc gives back what is larger than its threshold when it is freed. By itself it raises that to 32 MB by and by;
    then how much it keeps differs from process to process.
    """
    m_mmap_threshold = -3
    ctypes.CDLL(None).mallopt(m_mmap_threshold, 1 << 17)
    run(*warm_up)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is now what there is
    run(*arguments)
    result.write_text(str(_status("VmHWM") - before))


def _status(name: str) -> int:
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return 1024 * int(line.split()[1])
