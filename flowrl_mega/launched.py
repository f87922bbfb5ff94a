"""What torchrun or srun has said to this process: its place in a job of several ranks. Its imports take no time."""

from __future__ import annotations

import os
import re
import sys

from flowrl_mega.config import ConfigError

PLACE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
UNSET = "start the ranks with torchrun or srun, or unset RANK and WORLD_SIZE for a process of its own"
UNSET_SLURM = "start the ranks with srun, or unset SLURM_PROCID for a process of its own"


def started_by_launcher() -> bool:
    """True where torchrun or srun (or we) already started this process as one rank of a job.

    srun names things differently; it is translated to torchrun's names here, so that nobody else has to know. Raises
    ConfigError for words that no launcher says. One of RANK and WORLD_SIZE without the other is nobody's word: it goes,
    with a line, and so does what else would be a rank's.
    """
    env = os.environ
    if env.get("RANK") and env.get("WORLD_SIZE"):
        _check()
        return True
    # A shell inside an allocation is a "step" of one task, too; only srun with several tasks means a job of ranks.
    if env.get("SLURM_PROCID") and env.get("SLURM_STEP_NUM_TASKS") and _number("SLURM_STEP_NUM_TASKS", UNSET_SLURM) > 1:
        _translate()
        _check()
        return True
    if alone := [f"{name} = {env[name]!r}" for name in PLACE[:2] if env.get(name)]:
        other = "WORLD_SIZE" if "RANK" in alone[0] else "RANK"
        print(f"flowrl-mega: {alone[0]} without {other}: left over, and not looked at", file=sys.stderr, flush=True)
    for name in PLACE:
        env.pop(name, None)
    return False


def speaks() -> bool:
    """Whether this process says what all ranks of its job find: the first one, and any that has no place in a job."""
    env, names = os.environ, ("RANK", "WORLD_SIZE")
    if not all(env.get(name) for name in names):
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    rank, world = (env.get(name, "") for name in names)
    return not (rank.isdecimal() and world.isdecimal() and 0 < int(rank) < int(world))


def _check() -> None:
    """Refuse a place that torchrun would not give."""
    env = os.environ
    rank, world = _place("RANK", "WORLD_SIZE", UNSET)
    for name in PLACE[2:]:
        if name in env:
            _number(name, UNSET)
    if world == 1:
        return  # meets nobody
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not env.get(name)]
    if missing:
        raise ConfigError(
            f"RANK = {rank}, WORLD_SIZE = {world}: {' and '.join(missing)}, where ranks meet, not set; {UNSET}"
        )
    if not 0 < _number("MASTER_PORT", UNSET) < 2**16:
        raise ConfigError(f"MASTER_PORT = {env['MASTER_PORT']!r}: is no port; {UNSET}")


def _translate() -> None:
    """srun's words as torchrun's."""
    env = os.environ
    rank, world = _place("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", UNSET_SLURM)
    needed = ["SLURM_LOCALID"]
    needed += [] if env.get("MASTER_ADDR") else ["SLURM_STEP_NODELIST"]
    needed += [] if env.get("MASTER_PORT") else ["SLURM_JOB_ID", "SLURM_STEP_ID"]
    if missing := [name for name in needed if not env.get(name)]:
        raise ConfigError(
            f"SLURM_PROCID = {rank}, SLURM_STEP_NUM_TASKS = {world}: {', '.join(missing)} not set; {UNSET_SLURM}"
        )
    values = (rank, world, _number("SLURM_LOCALID", UNSET_SLURM), _tasks_on_node())
    address = env.get("MASTER_ADDR") or _first_host(env["SLURM_STEP_NODELIST"])
    port = env.get("MASTER_PORT")
    if not port:  # jobs that share a node need ports of their own
        job, step = (_number(name, UNSET_SLURM) for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"))
        port = str(15000 + (64 * job + step) % 15000)
    env.update(zip(PLACE, map(str, values), strict=True), MASTER_ADDR=address, MASTER_PORT=port)


def _tasks_on_node() -> int:
    """This node's of the tasks by node, as in "4(x2),3"."""
    runs = re.findall(r"(\d+)(?:\(x(\d+)\))?", os.environ.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    tasks = [int(count) for count, nodes in runs for _ in range(int(nodes or 1))]
    node = os.environ.get("SLURM_NODEID", "")
    return tasks[min(int(node) if node.isdecimal() else 0, len(tasks) - 1)]


def _first_host(nodes: str) -> str:
    """Task 0's host: the first of a SLURM node list ("gpu[003-010,020],login1" -> "gpu003")."""
    names = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    if not names:
        raise ConfigError(f"SLURM_STEP_NODELIST = {nodes!r}: names no host; {UNSET_SLURM}")
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", names[0])


def _place(rank_name: str, world_name: str, cure: str) -> tuple[int, int]:
    rank, world = _number(rank_name, cure), _number(world_name, cure)
    if rank >= world:
        raise ConfigError(f"{rank_name} = {rank}, {world_name} = {world}: ranks count from 0 to {world - 1}; {cure}")
    return rank, world


def _number(name: str, cure: str) -> int:
    text = os.environ[name]
    if not text.isdecimal():
        raise ConfigError(f"{name} = {text!r}: is no whole number; {cure}")
    return int(text)
