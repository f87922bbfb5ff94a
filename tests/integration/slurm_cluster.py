"""A real SLURM of two nodes on this host, for one test module: munged, slurmctld and two slurmd, without systemd.

The nodes are names only, which no resolver knows, at 127.0.0.1 and ports of their own. Key, sockets, state and logs lie
in one folder, so that neither a SLURM of this host nor a second cluster of the tests is touched.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from contextlib import suppress
from pathlib import Path

from flowrl_mega.rollout.processes import free_ports

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol")
NODES = ("node0", "node1")
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")

# cred_expire: a requeued job waits so many seconds, and two, before it may start again; 120 by default, and below 5.
# sched_interval, bf_interval: seconds until a job that may start is seen.
CONF = """
ClusterName=flowrl
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={root}/munge/socket,cred_expire=5
StateSaveLocation={root}/state
SlurmdSpoolDir={root}/spool/%n
SlurmctldPidFile={root}/slurmctld.pid
SlurmdPidFile={root}/slurmd-%n.pid
SlurmctldLogFile={root}/log/slurmctld.log
SlurmdLogFile={root}/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/{task_plugin}
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
MinJobAge=300
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmdParameters=config_overrides
{nodes}
PartitionName=main Nodes=node[0-1] Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=30
PartitionName=high Nodes=node[0-1] PriorityTier=10 PreemptMode=OFF
"""


def missing() -> str | None:
    """Why there can be no cluster here; None: there can."""
    if os.geteuid() != 0:
        return "SLURM's daemons start jobs as any user, so they need root"
    absent = [name for name in PROGRAMS if not shutil.which(name)]
    return f"no {', '.join(absent)}; as root on Debian or Ubuntu: make setup-slurm" if absent else None


class Cluster:
    """Up when made, or a RuntimeError with its logs; `close` ends it and all of its jobs.

    A job that is never ready is the test's failure, not its hang: every wait has its end. `task_plugin` affinity: each
    task on CPUs of its own, of which a node must not have more than the host.
    """

    def __init__(self, root: Path, cpus_per_node: int = 4, task_plugin: str = "none") -> None:
        self.root = root
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
        self.environment["SLURM_CONF"] = str(root / "slurm.conf")
        for name in ("munge", "state", "log", *(f"spool/{node}" for node in NODES)):
            (root / name).mkdir(parents=True)
        port, *ports = free_ports(1 + len(NODES))
        host = socket.gethostname().split(".")[0]
        nodes = "\n".join(
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={at} CPUs={cpus_per_node} RealMemory=1000"
            for node, at in zip(NODES, ports, strict=True)
        )
        (root / "slurm.conf").write_text(
            CONF.format(host=host, port=port, root=root, nodes=nodes, task_plugin=task_plugin)
        )
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        munge = self.root / "munge"
        (munge / "key").write_bytes(os.urandom(1024))
        (munge / "key").chmod(0o600)
        places = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        self.call("munged", "--force", *(f"--{option}={munge / name}" for option, name in places.items()))
        self.call("slurmctld")
        for node in NODES:
            self.call("slurmd", "-N", node)
        end = time.monotonic() + 30
        while self.call("sinfo", "--noheader", "--partition=main", "--format=%T %D") != f"idle {len(NODES)}":
            if time.monotonic() > end:
                raise RuntimeError(f"the nodes did not become idle\n{self.logs()}")
            time.sleep(0.1)

    def call(self, *words: str, cwd: Path | None = None, timeout: float = 60, **environment: str) -> str:
        """What a command of SLURM says; RuntimeError where it fails."""
        # No pipe for stderr: a daemon would keep it open, and nobody would ever see its end.
        with (self.root / "log" / "errors").open("w+") as errors:
            done = subprocess.run(
                words,
                cwd=cwd,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                timeout=timeout,
            )
            errors.seek(0)
            if done.returncode:
                raise RuntimeError(f"{' '.join(words)}: exit code {done.returncode}\n{errors.read()}\n{self.logs()}")
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What `scontrol show job` tells: JobState, Restarts, ExitCode, ..."""
        words = self.call("scontrol", "--oneliner", "show", "job", number).split()
        return dict(word.split("=", 1) for word in words if "=" in word)

    def wait(self, number: str, timeout: float) -> dict[str, str]:
        """The job when it has ended; as it is when the time is over."""
        end = time.monotonic() + timeout
        while (job := self.job(number))["JobState"] not in ENDED and time.monotonic() < end:
            time.sleep(0.1)
        return job

    def logs(self) -> str:
        """The ends of the daemons' logs, for people."""
        ends = [f"--- {path.name}\n{path.read_text()[-1500:]}" for path in sorted((self.root / "log").glob("*.log"))]
        return "\n".join(ends)

    def close(self) -> None:
        """Kill the jobs, then the daemons by their pid files; nothing is left running."""
        with suppress(RuntimeError, OSError, subprocess.TimeoutExpired):
            self.call("scancel", "--user=root", "--full", "--signal=KILL")
            self.call("scancel", "--user=root")
            end = time.monotonic() + 15
            while self.call("squeue", "--noheader") and time.monotonic() < end:
                time.sleep(0.1)
        files = [*(f"slurmd-{node}.pid" for node in NODES), "slurmctld.pid", "munge/pid"]
        pids = [int(text) for name in files if (text := _read(self.root / name).strip())]
        for number in (signal.SIGTERM, signal.SIGKILL):
            for pid in filter(_is_daemon, pids):
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
            end = time.monotonic() + 5
            while any(map(_is_daemon, pids)) and time.monotonic() < end:
                time.sleep(0.05)


def _read(path: Path) -> str:
    return path.read_text() if path.is_file() else ""


def _is_daemon(pid: int) -> bool:
    """Whether the process lives and is one of ours still, not another that got the number of a dead one."""
    return _read(Path(f"/proc/{pid}/comm")).strip() in ("munged", "slurmctld", "slurmd") and "\nState:\tZ" not in _read(
        Path(f"/proc/{pid}/status")
    )
