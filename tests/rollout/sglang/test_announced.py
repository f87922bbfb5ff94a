"""A run finds the servers of the nodes that serve it, through files in its folder."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path

import pytest

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.rollout.sglang import announced


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURMD_NODENAME", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


def settings(nodes: int, start_timeout_s: float = 5.0) -> RolloutSettings:
    return RolloutSettings(engine="sglang", nodes=nodes, start_timeout_s=start_timeout_s)


def announce(run_dir: Path, name: str, *urls: str, start: str = "") -> None:
    folder = announced.folder_of(run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps({"urls": urls, "start": start}))


def test_servers_of_all_nodes_are_found_as_they_come(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    announce(tmp_path, "b", "http://b:2")
    monkeypatch.setenv("SLURMD_NODENAME", "a")
    found: list[list[str]] = []
    finder = threading.Thread(target=lambda: found.append(announced.find(settings(2), tmp_path)))
    finder.start()
    time.sleep(0.2)
    assert not found, "one is wanting"
    with announced.announced(tmp_path, ["http://a:1", "http://a:2"]):
        finder.join(5)
    assert found == [["http://a:1", "http://a:2", "http://b:2"]]
    assert [file.name for file in announced.folder_of(tmp_path).iterdir()] == ["b.json"], "it goes with its servers"


def test_those_of_an_earlier_start_of_the_job_are_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A requeued job may be on other nodes, and the files of servers that were killed are still there."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    announce(tmp_path, "a", "http://a:1", start="7.0")
    announce(tmp_path, "b", "http://b:1", start="7.1")
    announce(tmp_path, "c", "http://c:1", start="6.1")
    assert announced.find(settings(1), tmp_path) == ["http://b:1"]


@pytest.mark.parametrize("there", [0, 1])
def test_a_node_that_does_not_come_is_told_of(there: int, tmp_path: Path):
    if there:
        announce(tmp_path, "a", "http://a:1")
    (tmp_path / "servers" / "nodes").mkdir(parents=True, exist_ok=True)
    (tmp_path / "servers" / "nodes" / "half.json").write_text('{"urls": ["ht')
    names = r" \(a\)" if there else ""
    words = rf"rollout.nodes = 2: {there} of them have announced servers in .*{names} in rollout.start_timeout_s = 0.1"
    with pytest.raises(ConfigError, match=words):
        announced.find(settings(2, 0.1), tmp_path)


def test_too_many_are_told_of(tmp_path: Path):
    """Half of the batches would go to servers that nobody meant."""
    announce(tmp_path, "a", "http://a:1")
    announce(tmp_path, "b", "http://b:1")
    with pytest.raises(ConfigError, match=r"rollout.nodes = 1: 2 have announced servers in .* \(a, b\)"):
        announced.find(settings(1), tmp_path)


def test_started_again_a_node_takes_the_ports_that_the_run_knows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert announced.ports_of(tmp_path) == []
    announce(tmp_path, announced.node_name(), "http://a:23001", "http://a:27005")
    assert announced.ports_of(tmp_path) == [23001, 27005]
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert announced.ports_of(tmp_path) == [], "another job, whose ports others may have"


def test_what_another_has_announced_since_stays(tmp_path: Path):
    file = announced.folder_of(tmp_path) / f"{announced.node_name()}.json"
    with announced.announced(tmp_path, ["http://a:1"]):
        file.write_text("another's")
    assert file.read_text() == "another's"
