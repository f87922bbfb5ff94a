"""train.sbatch's decisions, with stand-ins for SLURM's commands; tests/integration/test_slurm.py has the real ones."""

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
    for name, text in (("scontrol", SCONTROL), ("srun", SRUN), ("scancel", SCANCEL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)

    def call(*arguments: str, script: Path = SCRIPT, **environment: str) -> tuple[int, str, list[str]]:
        path = f"{tmp_path}:{os.environ['PATH']}"
        done = subprocess.run(
            ["bash", script, *arguments], env={"PATH": path, **environment},
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


NODES = {**JOB, "SLURM_JOB_NUM_NODES": "4", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_ON_NODE": "48"}
# The servers' step lasts until it is told to end; with TROUBLE it ends at once, with that exit code, and the trainer's
# is told. Either takes a while to end. It is the step that is to be told: at SIGTERM srun itself kills it.
SCANCEL = """#!/bin/bash
[ "$*" = "--signal=TERM 7" ] && kill -USR1 "$(cat waiting)"
"""
SRUN_OF_TWO = """#!/bin/bash
exec > /dev/null 2>&1
echo "$*" >> said
until_told() {
    trap "sleep 0.3; echo ended $1 >> said; exit 0" USR1
    echo $$ > waiting; echo "$1 waits" >> said; sleep 20 & wait
}
case "$*" in
    *" serve "*) if [ "$TROUBLE" ]; then until grep -q "trainer waits" said; do sleep 0.01; done; exit "$TROUBLE"; fi
        until_told servers ;;
    *" train "*)
        [ "$TROUBLE" ] && until_told trainer
        until grep -q "servers waits" said; do sleep 0.01; done
        exit "$CODE" ;;
esac
"""


def test_the_last_nodes_generate(run, tmp_path: Path) -> None:
    """Each step on nodes of its own; settings that were given win over those of the split; the trainer's end is the
    job's, once the servers have ended in order: SLURM kills what a script leaves behind."""
    (tmp_path / "srun").write_text(SRUN_OF_TWO)
    arguments = ("--rollout-nodes=1", "my.yaml", "--rollout.ahead=2")
    code, errors, asked = run(*arguments, CODE="70", **NODES)
    split = "my.yaml --rollout.nodes=1 --rollout.colocated=false --rollout.ahead=1 --rollout.ahead=2"
    serve, train = sorted((words for words in asked if "--nodes" in words), key=lambda words: " train " in words)
    assert "--nodes=1 --relative=3 --ntasks=1 --ntasks-per-node=1 --cpus-per-task=48" in serve
    assert serve.endswith(f" serve {split}")
    assert "--nodes=3 --relative=0 --ntasks=24 --wait=120 --cpus-per-task=6" in train and train.endswith(
        f" train {split}"
    )
    assert code == 70 and len(errors.splitlines()) == 1 and asked[-1] == "ended servers"


@pytest.mark.parametrize("trouble", ["2", "1"])
def test_servers_that_end_early_end_the_job(run, tmp_path: Path, trouble: str) -> None:
    """A trainer would wait for them for a quarter of an hour."""
    (tmp_path / "srun").write_text(SRUN_OF_TWO)
    code, errors, asked = run("--rollout-nodes=1", "my.yaml", CODE="0", TROUBLE=trouble, **NODES)
    assert code == (2 if trouble == "2" else 0) and f"have ended with exit code {trouble}" in errors
    assert asked[3:] == ["ended trainer"] + ["scontrol requeue 7"] * (trouble == "1")


@pytest.mark.parametrize("nodes", ["4", "-1", "x", ""])
def test_somebody_must_train(run, nodes: str) -> None:
    code, errors, asked = run(f"--rollout-nodes={nodes}", "my.yaml", CODE="0", **NODES)
    assert code == 2 and asked == [] and f"--rollout-nodes={nodes}: must be a number below the job's 4 nodes" in errors


def test_a_wrong_call_is_told_what_is_right(run) -> None:
    for arguments, job in (((), JOB), (("my.yaml",), {})):
        code, errors, asked = run(*arguments, CODE="0", **job)
        assert code == 2 and asked == []
        assert "sbatch examples/slurm/train.sbatch CONFIG.yaml" in errors and len(errors.splitlines()) == 1


@pytest.mark.parametrize(
    ("lines", "command"),
    [
        ([], ".venv/bin/python -m flowrl_mega.cli"),
        (["command=(apptainer "], "apptainer exec --nv flowrl-mega.sif /opt/flowrl-mega/.venv/bin/flowrl-mega"),
        (["command=(/opt/", "container=("], "/opt/flowrl-mega/.venv/bin/flowrl-mega"),
    ],
)
def test_the_site_block_has_a_line_for_each_container(run, tmp_path: Path, lines: list[str], command: str) -> None:
    """Made a line of the script, it is what srun is given; pyxis sees the folder of the job at its own path."""
    (tmp_path / "srun").write_text('#!/bin/bash\nprintf "%s\\n" "$@" >> said\n')
    text = SCRIPT.read_text()
    for line in lines:
        assert text.count(f"\n# {line}") == 1
        text = text.replace(f"\n# {line}", f"\n{line}")
    (tmp_path / "site.sbatch").write_text(text)
    code, _, asked = run("my.yaml", script=tmp_path / "site.sbatch", CODE="0", **JOB)
    assert code == 0 and " ".join(asked).endswith(f" --cpus-per-task=6 {command} train my.yaml")
    pyxis = [f"--container-image={tmp_path}/flowrl-mega.sqsh", f"--container-mounts={tmp_path}:{tmp_path}"]
    pyxis.append(f"--container-workdir={tmp_path}")
    assert [word for word in asked if word.startswith("--container")] == (pyxis if "container=(" in lines else [])


def test_every_option_is_read_by_sbatch() -> None:
    """sbatch reads #SBATCH lines up to the first command, and no further."""
    lines = SCRIPT.read_text().splitlines()
    commands = [at for at, line in enumerate(lines) if line and not line.startswith("#")]
    assert max(at for at, line in enumerate(lines) if line.startswith("#SBATCH")) < min(commands)
