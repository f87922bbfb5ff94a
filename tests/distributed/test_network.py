"""The job's network is tried before anything large is loaded: groups, interfaces, InfiniBand, locked memory."""

from __future__ import annotations

import re
import socket
import time
from pathlib import Path
from typing import Any

import pytest
from on_network import corrupt, lines, silent

from flowrl_mega import network
from flowrl_mega.config import ConfigError

HOST = socket.gethostname()
LAYOUTS = {"tp": {"tp": 2}, "pp": {"pp": 2}, "cp": {"cp": 2}, "dp": {"dp": 2}}


@pytest.mark.ranks
@pytest.mark.parametrize("kind", LAYOUTS)
def test_every_group_is_tried(kind: str, ranks2) -> None:
    """On one host without GPUs without a word and in no time; where there is a network, with its rates."""
    groups = {"tp": ["tp", "world"], "pp": ["pp", "world"], "cp": ["dp x cp", "world"], "dp": ["dp", "world"]}[kind]
    groups = ["cp", *groups] if kind == "cp" else groups
    for said, tried, size in ranks2.run(lines, LAYOUTS[kind]):
        assert (said, tried) == ([], groups) and size <= 8 * len(groups)
    for (said,), _, _ in ranks2.run(lines, LAYOUTS[kind], hosts=2):
        rates = re.findall(r"([a-z x]+) 2 ranks ([\d.e+-]+) GB/s", said.removeprefix("network: "))
        assert [name.strip() for name, _ in rates] == groups and all(0.001 < float(rate) < 100 for _, rate in rates)


@pytest.mark.ranks
@pytest.mark.parametrize("group", ["tp", "world"])
def test_a_group_that_does_not_answer_is_named(group: str, ranks2) -> None:
    began = time.monotonic()
    said, _ = ranks2.run(silent, {"tp": 2}, group, 0.7, timeout=20)
    assert time.monotonic() - began < 10
    assert said.startswith(f"the ranks of group {group} do not all answer (0.7 s): 0 on {HOST}, 1 on {HOST}; ")


@pytest.mark.ranks
def test_a_wrong_sum_is_told(ranks2) -> None:
    for rank, said in enumerate(ranks2.run(corrupt, {"tp": 2}, timeout=20)):
        assert f"ranks [0, 1] summed a number each to {rank + 1}..{rank + 1} instead of 3" in said


@pytest.fixture
def net(tmp_path: Path) -> Path:
    for name in ("lo", "eth0", "ib0"):
        (tmp_path / name).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("variable", "value", "is_there"),
    [
        ("NCCL_SOCKET_IFNAME", "eth", True), ("NCCL_SOCKET_IFNAME", "=eth0", True),
        ("NCCL_SOCKET_IFNAME", "=eth", False), ("NCCL_SOCKET_IFNAME", "eno1,ib", True),
        ("NCCL_SOCKET_IFNAME", "eno1", False),
        ("NCCL_SOCKET_IFNAME", "ib0:1", True), ("NCCL_SOCKET_IFNAME", "^eno1", True), ("NCCL_SOCKET_IFNAME", "", True),
        ("GLOO_SOCKET_IFNAME", "eth0", True), ("GLOO_SOCKET_IFNAME", "eth", False),
        ("GLOO_SOCKET_IFNAME", "eth0,eno1", False), ("GLOO_SOCKET_IFNAME", "eth0,lo", True),
    ],
)  # fmt: skip
def test_an_interface_that_is_not_there(variable: str, value: str, is_there: bool, net: Path, monkeypatch) -> None:
    """NCCL documents its words so; gloo looks each name up."""
    monkeypatch.setenv(variable, value)
    if is_there:
        network.check_interfaces(net)
    else:
        said = re.escape(f"{variable} = '{value}': {HOST} has no such network interface, but eth0, ib0, lo; name one")
        with pytest.raises(ConfigError, match=said):
            network.check_interfaces(net)
        network.check_interfaces(net / "nowhere")


# (on GPUs, on several hosts, environment, devices, locked memory) -> what is said, if anything
CASES: dict[str, tuple[bool, bool, dict[str, str], bool, int, str]] = {
    "all is well": (True, True, {}, True, -1, ""),
    "switched off": (True, True, {"NCCL_IB_DISABLE": "1"}, True, -1, "NCCL_IB_DISABLE = 1: GPUs of different hosts"),
    "not switched off": (True, True, {"NCCL_IB_DISABLE": "0"}, True, -1, ""),
    "none": (True, True, {}, False, -1, "no InfiniBand or RoCE device"),
    "one host": (True, False, {}, False, 1000, ""),
    "CPUs": (False, True, {}, False, 1000, ""),
    "little locked memory": (True, True, {}, True, 8 << 20, "ulimit -l = 8192 kB: what mlx5_0 read"),
    "enough locked memory": (True, True, {}, True, 64 << 20, ""),
    "no devices, little locked memory": (True, True, {}, False, 1000, "no InfiniBand or RoCE device"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_makes_it_slow(case: str, tmp_path: Path, monkeypatch) -> None:
    on_gpu, several, environment, devices, locked, said = CASES[case]
    monkeypatch.delenv("NCCL_IB_DISABLE", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(network, "_may_lock_any", lambda: False)
    if devices:
        (tmp_path / "mlx5_0").mkdir()
    found = network.warnings(on_gpu, several, tmp_path, locked)
    assert (len(found), found[0].startswith(said)) == (1, True) if said else not found
    monkeypatch.setattr(network, "_may_lock_any", lambda: True)
    if case == "little locked memory":
        assert network.warnings(on_gpu, several, tmp_path, locked) == []


def test_root_may_lock_what_it_likes() -> None:
    """As the kernel says it in words a user reads: capsh's cap_ipc_lock is bit 14."""
    effective = re.search(r"CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
    assert effective and network._may_lock_any() == (int(effective[1], 16) & 0x4000 > 0)


def test_a_warning_is_said_once_with_its_hosts() -> None:
    found: list[tuple[str, list[str]]] = [("a", ["slow"]), ("a", ["slow"]), ("b", ["slow", "full"]), ("b", [])]
    assert network._by_line(found) == ["all hosts: slow", "b: full"]


def test_the_slowest_group_counts_as_nccl_tests_do() -> None:
    """busbw = bytes / seconds * 2 (n - 1) / n."""
    rates: list[dict[str, Any]] = [{"tp": (4, 4e9)}, {"tp": (4, 2e9), "world": (8, 8e9)}]
    assert network._rates(rates) == "network: tp 4 ranks 3 GB/s, world 8 ranks 14 GB/s"
