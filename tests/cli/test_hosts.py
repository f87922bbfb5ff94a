"""A job's hosts are looked at together before anything is loaded: one message names the host and the fix."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from jobs import Job, write_config

pytestmark = pytest.mark.ranks

# what two ranks on two hosts are made to be -> exit code, what is said
CASES = {
    "disk_of_the_second_is_full": (2, r"flowrl-mega: second host: run_dir = .*: a checkpoint of this model takes"),
    "interface_of_the_second_is_missing": (2, r"flowrl-mega: NCCL_SOCKET_IFNAME = 'ib9': second host has no such"),
    "second_does_not_answer": (70, r"group tp do not all answer \(1 s\): 0 on first host, 1 on second host; "),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_with_one_host(case: str, model: Path, tmp_path: Path) -> None:
    code, said = CASES[case]
    job = Job(["train", str(write_config(tmp_path, model))], tmp_path / "log", before=f"two_hosts:{case}")
    assert job.wait(60) == [code, code], job.log.read_text()
    lines = [line for line in job.log.read_text().splitlines() if line.startswith("flowrl-mega: ")]
    assert len(lines) == 1 and re.search(said, lines[0]), job.log.read_text()
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_rates_are_told_once(model: Path, tmp_path: Path) -> None:
    arguments = ["train", str(write_config(tmp_path, model, steps=1))]
    said = Job(arguments, tmp_path / "log", before="two_hosts:both_well").run(60)
    assert len(re.findall(r"^flowrl-mega: network: tp 2 ranks .* GB/s, world 2 ranks .* GB/s$", said, re.M)) == 1
