"""What launchers say to a rank, and what nobody should: left over, set by hand, or half of it."""

from __future__ import annotations

import os

import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.launched import PLACE, speaks, started_by_launcher

SRUN = {
    "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9",
    "SLURM_LOCALID": "1", "SLURM_NTASKS": "16", "SLURM_LAUNCH_NODE_IPADDR": "10.0.0.1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
}  # fmt: skip


@pytest.fixture
def clean(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    others = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
    monkeypatch.setattr(os, "environ", {name: value for name, value in others.items() if name not in PLACE})
    return monkeypatch


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("gpu07", "gpu07"),
        ("gpu07,gpu09", "gpu07"),
        ("gpu[003-010]", "gpu003"),
        ("gpu[003,005-007],login1", "gpu003"),
        ("rack[1-2]-gpu[04-08]", "rack1-gpu04"),
        ("node1.cluster,node2.cluster", "node1.cluster"),
    ],
)
def test_srun(nodes: str, first: str, clean: pytest.MonkeyPatch) -> None:
    """Rank 0 listens on the step's first host, which need not be where srun was called (the launch node)."""
    os.environ.update(SRUN, SLURM_STEP_NODELIST=nodes)
    assert started_by_launcher()
    found = {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    assert found == {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "MASTER_ADDR": first}
    assert os.environ["LOCAL_WORLD_SIZE"] == "8"
    assert 1024 < int(os.environ["MASTER_PORT"]) < 32768, "below the ports that the system hands out"


@pytest.mark.parametrize(
    ("tasks", "node", "here"),
    [("8(x2)", "1", 8), ("8", "0", 8), ("4(x2),3", "1", 4), ("4(x2),3", "2", 3), ("1,12(x3)", "3", 12), ("2,1", "", 2)],
)
def test_nodes_of_unlike_numbers_of_tasks(tasks: str, node: str, here: int, clean: pytest.MonkeyPatch) -> None:
    """Each node shares its GPUs out between the ranks and the servers that it has itself."""
    os.environ.update(SRUN, SLURM_STEP_NODELIST="a", SLURM_STEP_TASKS_PER_NODE=tasks, SLURM_NODEID=node)
    assert started_by_launcher()
    assert os.environ["LOCAL_WORLD_SIZE"] == str(here)


def test_steps_of_one_job_have_ports_of_their_own(clean: pytest.MonkeyPatch) -> None:
    ports = set()
    for job, step in [("4711", "0"), ("4711", "1"), ("4712", "0")]:
        os.environ.update(SRUN, SLURM_STEP_NODELIST="a", SLURM_JOB_ID=job, SLURM_STEP_ID=step)
        os.environ.pop("MASTER_PORT", None)
        for name in ("RANK", "WORLD_SIZE"):
            os.environ.pop(name, None)
        assert started_by_launcher()
        ports.add(os.environ["MASTER_PORT"])
    assert len(ports) == 3


@pytest.mark.parametrize(
    "environment",
    [
        {},
        {"SLURM_PROCID": "0", "SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # an sbatch script, outside srun
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"},  # srun --pty bash
        {"SLURM_PROCID": "5"},  # left over
        {"SLURM_PROCID": "five"},
        {"SLURM_STEP_NUM_TASKS": "16", "SLURM_STEP_NODELIST": "a"},
        {"MASTER_ADDR": "nowhere", "MASTER_PORT": "http"},
        {"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "-1"},
        {"RANK": "", "WORLD_SIZE": "", "SLURM_PROCID": ""},
    ],
)
def test_alone(environment: dict[str, str], clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    os.environ.update(environment)
    assert speaks() and not started_by_launcher() and speaks()
    assert not os.environ.keys() & set(PLACE)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("environment", "line"),
    [
        ({"RANK": "0"}, "RANK = '0' without WORLD_SIZE"),
        ({"RANK": "3", "LOCAL_RANK": "7", "MASTER_PORT": "http"}, "RANK = '3' without WORLD_SIZE"),
        ({"RANK": "zero", "WORLD_SIZE": ""}, "RANK = 'zero' without WORLD_SIZE"),
        ({"WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "8"}, "WORLD_SIZE = '8' without RANK"),
        ({"WORLD_SIZE": "8", "SLURM_PROCID": "3"}, "WORLD_SIZE = '8' without RANK"),
    ],
)
def test_half_a_place_is_left_over(
    environment: dict[str, str], line: str, clean: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The process is one of its own, and says once what it does not look at."""
    os.environ.update(environment)
    assert speaks()
    assert not started_by_launcher() and not started_by_launcher()
    assert not os.environ.keys() & set(PLACE) and speaks()
    assert capsys.readouterr().err == f"flowrl-mega: {line}: left over, and not looked at\n"


def test_half_a_place_beside_sruns_words(clean: pytest.MonkeyPatch) -> None:
    """As where a script exports WORLD_SIZE before srun."""
    os.environ.update(SRUN, SLURM_STEP_NODELIST="a", WORLD_SIZE="8", LOCAL_RANK="0")
    assert started_by_launcher()
    assert [os.environ[name] for name in PLACE] == ["9", "16", "1", "8"]


MEET = {"MASTER_ADDR": "there", "MASTER_PORT": "29500"}
PAIR = {"RANK": "1", "WORLD_SIZE": "2"}
NO_NUMBER, CURE, CURE_SLURM = "is no whole number", "unset RANK and WORLD_SIZE", "start the ranks with srun"
# the environment -> what the message has; whether the process of this place says it
REFUSED: dict[str, tuple[dict[str, str], list[str], bool]] = {
    "a text": ({**PAIR, "RANK": "one"}, ["RANK = 'one'", NO_NUMBER, CURE], True),
    "a fraction": ({**PAIR, "RANK": "0.0"}, ["RANK = '0.0'", NO_NUMBER], True),
    "below 0": ({**PAIR, "RANK": "-1"}, ["RANK = '-1'", NO_NUMBER], True),
    "a world of text": ({"RANK": "0", "WORLD_SIZE": "two"}, ["WORLD_SIZE = 'two'", NO_NUMBER, CURE], True),
    "no world": ({"RANK": "0", "WORLD_SIZE": "0"}, ["RANK = 0, WORLD_SIZE = 0"], True),
    "beyond the world": ({"RANK": "2", "WORLD_SIZE": "2"}, ["RANK = 2, WORLD_SIZE = 2", "from 0 to 1", CURE], True),
    "a local text": ({**PAIR, **MEET, "LOCAL_RANK": "x"}, ["LOCAL_RANK = 'x'", NO_NUMBER], False),
    "a local world": ({**PAIR, **MEET, "LOCAL_WORLD_SIZE": ""}, ["LOCAL_WORLD_SIZE = ''", NO_NUMBER], False),
    "no meeting": (PAIR, ["RANK = 1, WORLD_SIZE = 2: MASTER_ADDR and MASTER_PORT", "not set", CURE], False),
    "of rank 0": ({**PAIR, "RANK": "0", "MASTER_PORT": "1"}, ["MASTER_ADDR, where ranks meet, not set"], True),
    "no address": ({**PAIR, **MEET, "MASTER_ADDR": ""}, ["MASTER_ADDR, where", "torchrun or srun"], False),
    "a port of text": ({**PAIR, **MEET, "MASTER_PORT": "http"}, ["MASTER_PORT = 'http'", NO_NUMBER], False),
    "no port": ({**PAIR, **MEET, "MASTER_PORT": "65536"}, ["MASTER_PORT = '65536'", "is no port"], False),
    "port 0": ({**PAIR, **MEET, "MASTER_PORT": "0"}, ["MASTER_PORT = '0'", "is no port"], False),
    "srun: tasks": ({**SRUN, "SLURM_STEP_NUM_TASKS": "many"}, ["SLURM_STEP_NUM_TASKS = 'many'", NO_NUMBER], True),
    "srun: rank": ({**SRUN, "SLURM_PROCID": "x"}, ["SLURM_PROCID = 'x'", NO_NUMBER, CURE_SLURM], True),
    "srun: beyond": ({**SRUN, "SLURM_PROCID": "16"}, ["SLURM_PROCID = 16, SLURM_STEP_NUM_TASKS = 16"], True),
    "srun: rank alone": (
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"},
        ["SLURM_LOCALID, SLURM_STEP_NODELIST, SLURM_JOB_ID, SLURM_STEP_ID not set", "unset SLURM_PROCID"],
        True,
    ),
    "srun: no nodes": (SRUN, ["SLURM_PROCID = 9, SLURM_STEP_NUM_TASKS = 16: SLURM_STEP_NODELIST not set"], False),
    "srun: no host": ({**SRUN, "SLURM_STEP_NODELIST": ","}, ["SLURM_STEP_NODELIST = ','", "names no host"], False),
    "srun: local": ({**SRUN, **MEET, "SLURM_LOCALID": "x"}, ["SLURM_LOCALID = 'x'", NO_NUMBER], False),
    "srun: step": (
        {**SRUN, "SLURM_STEP_NODELIST": "a", "SLURM_STEP_ID": "batch"}, ["SLURM_STEP_ID = 'batch'", NO_NUMBER], False,
    ),
    "srun: a port": ({**SRUN, **MEET, "MASTER_PORT": "x"}, ["MASTER_PORT = 'x'", NO_NUMBER], False),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_no_launcher_says(case: str, clean: pytest.MonkeyPatch) -> None:
    environment, parts, said = REFUSED[case]
    os.environ.update(environment)
    with pytest.raises(ConfigError) as refused:
        started_by_launcher()
    assert "\n" not in str(refused.value)
    for part in parts:
        assert part in str(refused.value)
    assert speaks() == said


@pytest.mark.parametrize(
    "environment",
    [
        {"RANK": "0", "WORLD_SIZE": "1"},  # by hand: it meets nobody
        {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "", "MASTER_PORT": "http"},
        {**PAIR, **MEET},  # LOCAL_RANK is left to the launcher
        {**SRUN, **MEET, "SLURM_JOB_ID": "", "SLURM_STEP_ID": "x"},  # not needed beside MASTER_PORT
        {**SRUN, "MASTER_ADDR": "there"},
    ],
)
def test_what_is_enough(environment: dict[str, str], clean: pytest.MonkeyPatch) -> None:
    os.environ.update(environment)
    assert started_by_launcher() and started_by_launcher()
    assert speaks() == (os.environ["RANK"] == "0")


def test_torchrun(clean: pytest.MonkeyPatch) -> None:
    """Its word goes before srun's: torchrun may run as one task a node."""
    os.environ.update(SRUN, RANK="1", WORLD_SIZE="2", MASTER_ADDR="there", MASTER_PORT="1")
    assert started_by_launcher()
    assert (os.environ["RANK"], os.environ["MASTER_ADDR"]) == ("1", "there")
