"""One run folder, one run: a file in it that names its owner keeps every other launch out.

The file appears whole, by link(2) or O_EXCL, which shared file systems honour too; locks of the kernel, which some of
them lack and others keep to one host, only order those launches of one host that find the same dead owner.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

import psutil

from flowrl_mega.config import ConfigError
from flowrl_mega.file_lock import wait_for

FILE = "run.lock"
PATIENCE_S = 1.0  # for an owner that is still writing its name, where there are no links
ATTEMPTS = 100  # others' locks come and go meanwhile


@dataclass(frozen=True)
class Owner:
    """The process that launched a run, such that it can be told whether it still lives."""

    host: str
    machine: str  # two hosts may have one name
    boot: str  # the kernel's name for the time since it started
    namespace: str  # of pids: those of another container say nothing here
    pid: int
    started: str  # of the process, after the boot: a pid is used again
    since: str
    slurm_job: str = ""
    slurm_restarts: int = 0

    @classmethod
    def here(cls) -> Owner:
        return cls(
            host=socket.gethostname(),
            machine=_text("/etc/machine-id"),
            boot=_text("/proc/sys/kernel/random/boot_id"),
            namespace=_target("/proc/self/ns/pid"),
            pid=os.getpid(),
            started=started(os.getpid()) or "",
            since=datetime.now().isoformat(" ", "seconds"),
            slurm_job=os.environ.get("SLURM_JOB_ID", ""),
            slurm_restarts=_number(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )

    def is_dead(self, here: Owner) -> bool:
        """True where that is certain: gone from this host, ended by its restart, or requeued by SLURM as `here`."""
        if self.slurm_job and self.slurm_job == here.slurm_job and self.slurm_restarts < here.slurm_restarts:
            return True
        if (self.host, self.machine) != (here.host, here.machine):
            return False
        if self.boot != here.boot:
            return True
        return self.namespace == here.namespace and not is_running(self.pid, self.started)

    def __str__(self) -> str:
        return f"host {self.host}, pid {self.pid}, since {self.since}"


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Hold the folder's lock; the folder is made if it is missing, and goes again where nothing was put into it.

    A dead owner's is taken over with a line on stderr. Raises ConfigError where another one lives or may live.
    """
    path, mine = run_dir.absolute() / FILE, Owner.here()
    made = [folder for folder in path.parents if not os.path.exists(folder)]
    text = json.dumps(asdict(mine)) + "\n"
    try:
        try:
            _acquire(run_dir, path, mine, text)
        except OSError as error:
            raise ConfigError(
                f"run_dir = {str(run_dir)!r}: cannot be written ({error.strerror}); mend that, or choose another"
            ) from None
        _HELD[path] = text
        try:
            yield
        finally:
            if os.getpid() == mine.pid:  # no child of ours that comes here by an exception
                _release(path)
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def is_locked(run_dir: Path) -> bool:
    """Whether a run is under way there, or its owner died without a word."""
    return (run_dir / FILE).exists()


_HELD: dict[Path, str] = {}


def release_all() -> None:
    """Remove what this process holds, before an os._exit."""
    for path in list(_HELD):
        _release(path)


def _release(path: Path) -> None:
    """Remove our file; somebody else's of this name stays."""
    text = _HELD.pop(path, None)
    with suppress(OSError):
        if text and path.read_text() == text:
            path.unlink()


def _acquire(run_dir: Path, path: Path, mine: Owner, text: str) -> None:
    for _ in range(ATTEMPTS):
        path.parent.mkdir(parents=True, exist_ok=True)
        if _created(path, text):
            return
        found = _read(path)
        if found is None:
            continue
        owner = _owner(found)
        if owner is None or not owner.is_dead(mine):
            raise ConfigError(f"run_dir = {str(run_dir)!r}: {_refusal(path, owner, mine)}")
        if _replaced(path, text, found):
            print(f"flowrl-mega: {path}: taken over, its owner is gone ({owner})", file=sys.stderr, flush=True)
            return
    raise ConfigError(f"{path}: comes and goes; another program starts runs in this folder: end it, or choose another")


def _refusal(path: Path, owner: Owner | None, mine: Owner) -> str:
    if owner is None:
        return f"{path} does not name its owner; remove it if no run is under way there, or choose another run_dir"
    if (owner.host, owner.machine, owner.namespace) == (mine.host, mine.machine, mine.namespace):
        return f"a run is under way there ({owner}); wait for it, end it, or choose another run_dir"
    return (
        f"is held by a run that cannot be seen from here, {mine.host} ({owner}); choose another run_dir, or remove "
        f"{path} if that run is dead"
    )


def _created(path: Path, text: str) -> bool:
    """Whether the file is ours now; False where there is one already."""
    with _draft(path, text) as draft:
        try:
            os.link(draft, path)
            return True
        except OSError:  # there is one already, or there are no links here
            if draft.stat().st_nlink == 2:  # the link was made: over NFS its answer may be lost, and it is made again
                return True
    try:
        with path.open("x") as file:
            file.write(text)
        return True
    except FileExistsError:
        return False


def _replaced(path: Path, text: str, dead: str) -> bool:
    """Whether a dead owner's file is ours now; False where another launch was first."""
    try:
        with path.open("r+") as file:
            wait_for(file)
            if file.read() != dead or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return False
            with _draft(path, text) as draft:
                draft.replace(path)
    except FileNotFoundError:
        return False
    return path.read_text() == text


@contextmanager
def _draft(path: Path, text: str) -> Iterator[Path]:
    """The whole text under another name beside it."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    draft.unlink(missing_ok=True)  # an earlier process's, which may be a second name of the lock itself
    try:
        with draft.open("x") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        yield draft
    finally:
        draft.unlink(missing_ok=True)


def _read(path: Path) -> str | None:
    """What the file says, once it names an owner; None where it is gone."""
    end = time.monotonic() + PATIENCE_S
    try:
        while _owner(text := path.read_text(errors="replace")) is None and time.monotonic() < end:
            time.sleep(0.02)
    except FileNotFoundError:
        return None
    return text


def _owner(text: str) -> Owner | None:
    try:
        owner = Owner(**json.loads(text))
    except (ValueError, TypeError):
        return None
    whole = isinstance(owner.pid, int) and 0 < owner.pid < 2**31 and isinstance(owner.slurm_restarts, int)
    return owner if whole else None


def is_running(pid: int, start: str) -> bool:
    """Whether the process of this pid that was `started` then runs; one that nobody but root may look at may be it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    return started(pid) in (start, None)


def started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; "" for a zombie, None for one that cannot be looked at.

    Not psutil's time, which moves with the clock; where there is no /proc, that is all there is.
    """
    if sys.platform == "linux":
        fields = _text(f"/proc/{pid}/stat").rpartition(")")[2].split()
        return ("" if fields[0] in "ZX" else fields[19]) if fields else None
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        return "" if process.status() == psutil.STATUS_ZOMBIE else f"{process.create_time():.0f}"
    return None


def _text(path: str) -> str:
    """A small file's text; "" where it cannot be read."""
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _number(text: str) -> int:
    return int(text) if text.isdecimal() else 0
