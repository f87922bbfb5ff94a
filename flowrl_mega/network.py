"""Before anything large is loaded: whether the ranks of a job reach each other in every group, and how fast.

A wrong interface or a closed port shows otherwise at the first collective, minutes later, as a time-out without a name.
"""

from __future__ import annotations

import os
import resource
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

from flowrl_mega.config import ConfigError, RunError
from flowrl_mega.parallel.layout import Layout, ranks_on_host

LIMIT_S = 120.0  # for all groups together
REPEATS = 3
# Bytes of a sum that is timed: enough for the rate of long messages, little beside a model.
GPU_BYTES, CPU_BYTES = 64 << 20, 1 << 20
NET, INFINIBAND = Path("/sys/class/net"), Path("/sys/class/infiniband")
LOCKED = 64 << 20  # bytes of locked memory below which NCCL's registrations over InfiniBand are known to fail


def check_interfaces(net: Path = NET) -> None:
    """Refuse an interface that this host has not got. NCCL takes beginnings of names ("=eth0": all of one), gloo
    names."""
    there = sorted(path.name for path in net.iterdir()) if net.is_dir() else []
    for variable, is_meant in (
        ("NCCL_SOCKET_IFNAME", lambda name, word: name == word[1:] if word[0] == "=" else name.startswith(word)),
        ("GLOO_SOCKET_IFNAME", lambda name, word: name == word),
    ):
        value = os.environ.get(variable, "")
        if not there or not value or value.startswith("^"):  # all but these
            continue
        words = [word.split(":")[0] for word in value.split(",")]
        found = [any(is_meant(name, word) for name in there) for word in words if word]
        if not (any(found) if variable.startswith("NCCL") else all(found)):
            raise ConfigError(
                f"{variable} = {value!r}: {socket.gethostname()} has no such network interface, but "
                f"{', '.join(there)}; name one of these that reaches the other hosts, or unset it"
            )


def warnings(on_gpu: bool, several_hosts: bool, infiniband: Path = INFINIBAND, locked: int | None = None) -> list[str]:
    """What of this host makes the ranks' network slow, or NCCL fail; `locked`: bytes of memory it may lock, -1: any."""
    if not (on_gpu and several_hosts):
        return []
    devices = sorted(path.name for path in infiniband.iterdir()) if infiniband.is_dir() else []
    if os.environ.get("NCCL_IB_DISABLE", "0") not in ("", "0"):
        return [
            f"NCCL_IB_DISABLE = {os.environ['NCCL_IB_DISABLE']}: GPUs of different hosts talk over TCP, many times "
            "slower than over InfiniBand or RoCE; unset it where there is either"
        ]
    if not devices:
        return [
            f"no InfiniBand or RoCE device ({infiniband} is empty or missing): GPUs of different hosts talk over TCP; "
            "in a container the devices must be passed in (docker run --device=/dev/infiniband)"
        ]
    limit = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if locked is None else locked
    if 0 <= limit < LOCKED and not _may_lock_any():
        return [
            f"ulimit -l = {limit >> 10} kB: what {', '.join(devices)} read and write is locked memory, and NCCL may "
            "end with 'Cannot allocate memory'; raise it to unlimited (/etc/security/limits.conf; slurm.conf: "
            "PropagateResourceLimitsExcept=MEMLOCK; docker run --ulimit memlock=-1)"
        ]
    return []


def _may_lock_any() -> bool:
    """Whether this process has CAP_IPC_LOCK, for which there is no limit."""
    lines = Path("/proc/self/status").read_text().splitlines()
    effective = next(line.split()[1] for line in lines if line.startswith("CapEff:"))
    return bool(int(effective, 16) >> 14 & 1)


def check_network(layout: Layout, limit_s: float = LIMIT_S) -> list[str]:
    """Sum over every group of several ranks; returns what there is to say, on every rank: nothing on one CPU host.

    Raises RunError for a group that does not answer, naming its ranks and their hosts, or whose sum is wrong.
    Collective.
    """
    on_gpu, several_hosts = layout.device.type == "cuda", layout.world > ranks_on_host()
    timed = on_gpu or several_hosts
    end, hosts = time.monotonic() + limit_s, _hosts(layout)
    seconds: dict[str, tuple[int, float]] = {}
    for name, group in _groups(layout).items():
        size = ((GPU_BYTES if on_gpu else CPU_BYTES) if timed else 4) // 4
        ranks = dist.get_process_group_ranks(group)
        try:
            taken = _within(end, partial(_sum, layout, group, size, REPEATS if timed else 1))
        except TimeoutError:
            places = ", ".join(f"{rank} on {hosts[rank]}" for rank in ranks)
            raise RunError(
                f"the ranks of group {name} do not all answer ({limit_s:g} s): {places}; one has ended or cannot be "
                "reached: see its log, a firewall between the hosts, and the interfaces (NCCL_SOCKET_IFNAME, "
                "GLOO_SOCKET_IFNAME; NCCL_DEBUG=INFO tells what NCCL takes)"
            ) from None
        seconds[name] = (group.size(), 4 * size / taken)
    if not timed:
        return []
    found = layout.gather_objects((hosts[layout.rank], warnings(on_gpu, several_hosts), seconds))
    return [_rates([rates for _, _, rates in found]), *_by_line([(host, lines) for host, lines, _ in found])]


def _groups(layout: Layout) -> dict[str, dist.ProcessGroup]:
    """Those that training uses, of more than one rank."""
    data = {"dp x cp" if layout.cp > 1 else "dp": layout.groups.dp_cp}
    groups = {"tp": layout.tp_group, "cp": layout.cp_group, "pp": layout.pp_group, **data}
    return {name: group for name, group in {**groups, "world": dist.group.WORLD}.items() if group.size() > 1}


def _sum(layout: Layout, group: dist.ProcessGroup, size: int, repeats: int) -> float:
    """Seconds of one sum over the group; the first, in which NCCL connects the ranks, is not counted."""
    if layout.device.type == "cuda":
        torch.cuda.set_device(layout.device)  # a thread's own
    ranks = dist.get_process_group_ranks(group)
    numbers, right = torch.full((size,), layout.rank + 1.0, device=layout.device), sum(ranks) + len(ranks)
    dist.all_reduce(numbers, group=group)
    if not bool((numbers == right).all()):
        raise RunError(
            f"ranks {ranks} summed a number each to {numbers.min().item():g}..{numbers.max().item():g} instead of "
            f"{right}: their network or NCCL corrupts data; look at NCCL_DEBUG=INFO, and leave a host out"
        )
    numbers.zero_()
    began = time.perf_counter()
    for _ in range(repeats):
        dist.all_reduce(numbers, group=group)
    if layout.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / repeats


def _within(end: float, act: Callable[[], float]) -> float:
    """What `act` gives, or TimeoutError at `end`: it may wait in C++ for ever, and stays behind then."""
    found: list[float | BaseException] = []

    def run() -> None:
        try:
            found.append(act())
        except BaseException as error:
            found.append(error)

    thread = threading.Thread(target=run, name="network", daemon=True)
    thread.start()
    thread.join(max(0.0, end - time.monotonic()))
    if not found:
        raise TimeoutError
    if isinstance(found[0], BaseException):
        raise found[0]
    return found[0]


def _hosts(layout: Layout) -> list[str]:
    """By rank. From the job's store: the first collective may be the one that hangs."""
    store = dist.PrefixStore("network", dist.distributed_c10d._get_default_store())
    store.set(str(layout.rank), socket.gethostname())
    store.wait([str(rank) for rank in range(layout.world)], timedelta(seconds=LIMIT_S))
    return [store.get(str(rank)).decode() for rank in range(layout.world)]


def _rates(by_rank: list[dict[str, tuple[int, float]]]) -> str:
    """The slowest group of each kind; as nccl-tests' bus bandwidth, which does not fall with the number of ranks."""
    names = dict.fromkeys(name for rates in by_rank for name in rates)
    parts = []
    for name in names:
        size, rate = min((rates[name] for rates in by_rank if name in rates), key=lambda pair: pair[1])
        parts.append(f"{name} {size} ranks {rate * 2 * (size - 1) / size / 1e9:.3g} GB/s")
    return f"network: {', '.join(parts)}"


def _by_line(found: list[tuple[str, list[str]]]) -> list[str]:
    """Each warning once, with the hosts that have it."""
    hosts: dict[str, dict[str, None]] = {}
    for host, lines in found:
        for line in lines:
            hosts.setdefault(line, {})[host] = None
    count = len({host for host, _ in found})
    return [f"{'all hosts' if len(there) == count else ', '.join(there)}: {line}" for line, there in hosts.items()]
