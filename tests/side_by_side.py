"""`make test`: the tests that start ranks and all others, as two runs of pytest side by side.

    python tests/side_by_side.py [ARGUMENT FOR PYTEST ...]

What the run with ranks writes appears as it comes, what the other has written after it, and then the last lines of
both once more. The exit status is the first bad one; a run of which no test was asked for is no failure.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SELECTED = "not integration and not exact and not tools"
NOTHING_ASKED_FOR = 5  # pytest's exit status where no test is selected


class Run:
    """pytest on one half of the tests, in a process group of its own; its output goes to a file."""

    def __init__(self, half: str, arguments: list[str], output: Path) -> None:
        self.output = output
        command = [sys.executable, "-m", "pytest", "-q", str(Path(__file__).parent), "-m", f"{SELECTED} and {half}"]
        # Each has a cache of its own: both write down which tests failed last.
        command += ["-o", f"cache_dir=.pytest_cache/{half.replace(' ', '_')}", *arguments]
        if sys.stdout.isatty():
            command.append("--color=yes")
        with open(output, "wb") as file:
            self.process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, process_group=0
            )

    def interrupt(self) -> None:
        """As Ctrl-C does it: pytest tells what was done so far."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGINT)

    def show(self) -> None:
        """Passes on what it writes, until it ends."""
        with open(self.output, "rb") as file:
            while True:
                ended = self.process.poll() is not None
                sys.stdout.buffer.write(file.read())
                sys.stdout.flush()
                if ended:
                    return
                time.sleep(0.1)

    def last_line(self) -> str:
        return (self.output.read_text(errors="replace").splitlines() or [""])[-1]


def status(codes: list[int]) -> int:
    """The exit status of all; for a run that a signal ended it is the shell's number."""
    bad = [code if code > 0 else 128 - code for code in codes if code not in (0, NOTHING_ASKED_FOR)]
    return (bad or sorted(codes))[0]


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory() as folder:
        runs = [Run(half, arguments, Path(folder) / half) for half in ("ranks", "not ranks")]
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: [run.interrupt() for run in runs])
        for run in runs:
            run.show()
        print("", *(run.last_line() for run in runs), sep="\n")
    return status([run.process.returncode for run in runs])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
