"""train.sbatch's decisions, with stand-ins for srun and scontrol; tests/integration/test_slurm.py has the real ones."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "slurm" / "train.sbatch"
SCONTROL = """#!/bin/bash
case "$*" in
    "show hostnames "*) printf 'gpu-a\\ngpu-b\\n' ;;
    "show node gpu-a") printf 'NodeName=gpu-a Arch=x86_64\\n   NodeAddr=10.1.2.3 NodeHostName=gpu-a\\n' ;;
    *) echo "scontrol $*" >> said ;;
esac
"""
SRUN = """#!/bin/bash
echo "$MASTER_ADDR $OMP_NUM_THREADS ${*: -3}" >> said
exit "$CODE"
"""


@pytest.fixture
def run(tmp_path: Path):
    """Runs the script in tmp_path; gives its exit code, its messages, and what srun and scontrol were asked for."""
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(*arguments: str, **environment: str) -> tuple[int, str, list[str]]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", SCRIPT, *arguments], env={"PATH": path, **environment},
            cwd=tmp_path, capture_output=True, text=True, timeout=30,
        )  # fmt: skip
        said = tmp_path / "said"
        return done.returncode, done.stderr, said.read_text().splitlines() if said.exists() else []

    return call


JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "gpu-[a-b]", "SLURM_CPUS_PER_TASK": "6"}


@pytest.mark.parametrize(
    ("code", "restarts", "requeued"),
    [
        (0, "", False), (2, "", False), (70, "", False), (75, "", True), (75, "9", True),
        (1, "", True), (137, "1", True), (1, "2", False), (137, "9", False),
    ],
)  # fmt: skip
def test_what_goes_back_into_the_queue(run, code: int, restarts: str, requeued: bool) -> None:
    """Stopped on request always, a fault twice, what would end in the same way again never."""
    counted = {"SLURM_RESTART_COUNT": restarts} if restarts else {}
    found, errors, asked = run("my.yaml", "--steps=3", CODE=str(code), **JOB, **counted)
    assert asked[0] == "10.1.2.3 6 train my.yaml --steps=3"
    assert asked[1:] == (["scontrol requeue 7"] if requeued else [])
    assert found == (0 if requeued else code)
    assert len(errors.splitlines()) == (code != 0), "one message that says what happens, none where all is well"


def test_a_wrong_call_is_told_what_is_right(run) -> None:
    for arguments, job in (((), JOB), (("my.yaml",), {})):
        code, errors, asked = run(*arguments, CODE="0", **job)
        assert code == 2 and asked == []
        assert "sbatch examples/slurm/train.sbatch CONFIG.yaml" in errors and len(errors.splitlines()) == 1


def test_every_option_is_read_by_sbatch() -> None:
    """sbatch reads #SBATCH lines up to the first command, and no further."""
    lines = SCRIPT.read_text().splitlines()
    commands = [at for at, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(at for at, line in enumerate(lines) if line.startswith("#SBATCH")) < min(commands)
