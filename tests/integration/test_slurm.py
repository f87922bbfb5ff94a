"""The project's own sbatch under a real SLURM of two nodes: the same numbers as on one, and gone on with when stopped.

Settings of the site are given as the script says, to sbatch; .venv is a link to the environment of these tests.
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import pytest
from jobs import Job, records, write_config
from slurm_cluster import NODES, Cluster, missing
from slurm_jobs import ROOT, SCRIPT, ended, log, submit, until
from tiny_models import make

from flowrl_mega.checkpoint.folder import checkpoints

# Slow enough to be stopped in time; and it tells which rank is where.
REWARD = """
import os, time
from flowrl_mega.rewards import sums

def score(row, response):
    time.sleep(0.1)
    with open("places", "a") as file:
        print(os.environ.get("SLURMD_NODENAME"), os.environ["RANK"], os.environ["LOCAL_RANK"], file=file)
    return sums.score(row, response)
"""
# For what is between SLURM and the script alone: as the trainer answers SIGTERM, without its start of ten seconds.
# SIGTERM goes to each process of a rank: one that waited for a single sleep could see that end first, and end with 0.
STAND_IN = """
trap 'touch saved.$SLURM_PROCID; exit 75' TERM
if [ "$SLURM_RESTART_COUNT" ]; then touch gone_on.$SLURM_PROCID; exit 0; fi
echo training
for _ in $(seq 1000); do sleep 0.2 & wait; done  # which SIGTERM interrupts
"""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.servers,
    pytest.mark.timeout(300),
    pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model"), vocab=15)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where sbatch is called, with an environment in it as `make setup` makes one."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "slow.py").write_text(REWARD)
    return tmp_path


@pytest.fixture(scope="module", autouse=True)
def warned(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A job whose time is over when the script's own #SBATCH --signal says that it nearly is, and its folder.

    Begun before all tests: SLURM looks at time limits every 30 s.
    """
    folder = tmp_path_factory.mktemp("warned")
    return submit(cluster, folder, "any.yaml", script=with_stand_in(folder), site=("--time=30",)), folder


def with_stand_in(folder: Path) -> Path:
    """The script with the `command` of another site, in `folder`."""
    (folder / "stand_in.sh").write_text(STAND_IN)
    text, edits = re.subn(r"^command=.*", f"command=(bash {folder}/stand_in.sh)", SCRIPT.read_text(), flags=re.M)
    assert edits == 1
    (folder / "train.sbatch").write_text(text)
    return folder / "train.sbatch"


def config(folder: Path, model: Path, tp: int, dp: int, steps: int) -> Path:
    parallel = {"tp": tp, "dp": dp, "timeout_s": 60}
    return write_config(folder, model, steps=steps, parallel=parallel, checkpoint={"every": 0})


def on_one_node(folder: Path, model: Path, tp: int, dp: int, steps: int) -> Path:
    """The run folder of ranks on one node, which no SLURM started and nothing disturbed."""
    folder.mkdir()
    Job(["train", str(config(folder, model, tp, dp, steps))], folder / "log", world=tp * dp).run()
    return folder / "run"


def assert_same_records(found: Path, wanted: Path) -> None:
    for name in ("metrics", "samples", "evaluation"):
        rows = records(wanted, name)
        assert rows and records(found, name) == rows, name


def test_two_nodes_train_as_one(cluster: Cluster, model: Path, work: Path) -> None:
    """TP inside a node, DP across: each tensor-parallel pair has a node of its own, and all records are those of four
    ranks on one node, to the bit."""
    layout = {"tp": 2, "dp": 2, "steps": 2}
    number = submit(cluster, work, str(config(work, model, **layout)), f"--reward={work}/slow.py:score")
    job = ended(cluster, number, work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), job["log"]
    places = {tuple(line.split()) for line in (work / "places").read_text().splitlines()}
    assert places == {(node, str(2 * n + local), str(local)) for n, node in enumerate(NODES) for local in (0, 1)}
    assert_same_records(work / "run", on_one_node(work / "one", model, **layout))


def test_stopped_on_request_the_job_goes_on(cluster: Cluster, model: Path, work: Path) -> None:
    """SIGTERM to the steps, as SLURM warns of the time limit: a checkpoint, exit code 75, back into the queue, and
    the same run to its end; its records are those of one that nobody stopped, to the bit."""
    layout = {"tp": 2, "dp": 1, "steps": 4}
    arguments = (str(config(work, model, **layout)), f"--reward={work}/slow.py:score")
    number = submit(cluster, work, *arguments, ranks=1)
    metrics = work / "run" / "metrics.jsonl"
    until(lambda: metrics.exists() and "\n" in metrics.read_text(), work)
    cluster.call("scancel", "--signal=TERM", number)
    until(lambda: cluster.job(number)["Restarts"] == "1", work)
    done = len(records(work / "run", "metrics"))
    assert 1 <= done < layout["steps"], "stopped too late to show anything"
    assert [path.name for path in checkpoints(work / "run")] == [f"step_{done}"]
    job = ended(cluster, number, work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job["log"]
    assert job["log"].count("stopped on request, with a checkpoint saved") == 1
    assert_same_records(work / "run", on_one_node(work / "one", model, **layout))


def test_wrong_input_is_told_once_and_not_tried_again(cluster: Cluster, model: Path, work: Path) -> None:
    job = ended(cluster, submit(cluster, work, str(config(work, model, 2, 2, 2)), "--rollout.groupsize=4"), work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), job["log"]
    assert job["log"].count("rollout.groupsize: no such setting; did you mean 'group_size'?") == 1, job["log"]
    assert "not requeued" in job["log"] and "Traceback" not in job["log"]


def test_cancelled_it_does_not_come_back(cluster: Cluster, work: Path) -> None:
    """scancel, too, begins with a SIGTERM, at which the ranks save and end with 75."""
    number = submit(cluster, work, "any.yaml", script=with_stand_in(work))
    until(lambda: log(work).count("training") == 4, work)
    cluster.call("scancel", number)
    job = ended(cluster, number, work)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), job["log"]
    assert "requeue" not in job["log"]


def test_warned_of_the_time_limit_it_goes_on(cluster: Cluster, warned: tuple[str, Path]) -> None:
    assert_went_on(ended(cluster, *warned), warned[1])


def test_pre_empted_it_goes_on(cluster: Cluster, work: Path) -> None:
    """A job of higher priority takes the nodes: the ranks have the partition's grace time to save, and come back."""
    number = submit(cluster, work, "any.yaml", script=with_stand_in(work), site=("--exclusive",))
    until(lambda: log(work).count("training") == 4, work)
    high = ("--partition=high", "--nodes=2", "--exclusive", f"--output={work}/high", "--wrap=true")
    other = cluster.call("sbatch", "--parsable", *high, cwd=work)
    assert cluster.wait(other, 60)["JobState"] == "COMPLETED"
    assert_went_on(ended(cluster, number, work), work)


# In a task: its own CPUs, and those of what it starts as the rollout's servers are started.
MASKS = """
import os, subprocess, sys
from flowrl_mega.rollout.processes import popen

show = "import os; print(*sorted(os.sched_getaffinity(0)))"
subprocess.run([sys.executable, "-c", show])
popen([sys.executable, "-c", show], dict(os.environ), sys.stdout).wait()
"""


def test_servers_are_not_bound_to_the_cpus_of_their_rank(tmp_path: Path) -> None:
    """srun gives each task CPUs of its own, which what it starts inherits; a server may use all that the job has."""
    cpus = sorted(os.sched_getaffinity(0))
    cluster = Cluster(tmp_path, cpus_per_node=len(cpus), task_plugin="affinity")
    try:
        step = ("srun", "--nodes=1", f"--ntasks={len(cpus)}", "--cpus-per-task=1", "--label")
        said = cluster.call(*step, sys.executable, "-c", MASKS, timeout=200, PYTHONPATH=str(ROOT))
    finally:
        cluster.close()
    found: dict[str, list[str]] = {}
    for line in said.splitlines():
        task, _, mask = line.partition(": ")
        found.setdefault(task, []).append(mask)
    whole = " ".join(map(str, cpus))
    assert sorted(bound for bound, _ in found.values()) == [str(cpu) for cpu in cpus], "each task is on one CPU"
    assert all(free == whole for _, free in found.values())
    assert len(cpus) > 1, "a machine of one core shows nothing"


def assert_went_on(job: dict[str, str], folder: Path) -> None:
    """Every rank of the stand-in has saved, and has come back once."""
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job["log"]
    for deed in ("saved", "gone_on"):
        assert len(list(folder.glob(f"{deed}.*"))) == 4, job["log"]
