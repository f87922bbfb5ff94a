"""A study through a real SLURM of two nodes: one command hands the chain in, and the last job leaves the report."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from jobs import write_config
from slurm_cluster import Cluster, missing
from slurm_jobs import ROOT
from tiny_models import make

from flowrl_mega.data.task import task_rows

pytestmark = [
    pytest.mark.integration,
    pytest.mark.servers,
    pytest.mark.timeout(500),
    pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}"),
]


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where the command is given, with a study of two methods beside an environment as `make setup` makes one."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    model = make("llama", tmp_path / "model", vocab=15)
    write_config(tmp_path, model, steps=2, parallel={"tp": 2, "timeout_s": 120}, checkpoint={"every": 0})
    rows = [{**row, "kind": "sums"} for row in task_rows("sums", {"lo": 10, "hi": 15})]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = {
        "title": "Two steps",
        "run_dir": "runs/two",
        "base": {
            "command": f"cp -r {model} {{out}}",
            "shape": {"layers": 2, "hidden": 32, "heads": 4, "kv_heads": 2, "ffn": 48, "vocab": 15, "tied": True},
        },
        "methods": {
            "GRPO": {"config": "config.yaml", "overrides": ["objective={name: grpo}", "optimizer.log_z_lr=null"]},
            "FlowRL": {"config": "config.yaml"},
        },
        "evaluate": {"benchmarks": ["sums.jsonl"], "k": 2, "rollout": {"max_tokens": 8}},
        "published": {"source": "nowhere", "rows": {"FlowRL": {"sums": 50.0}}},
        "hardware": {
            "sbatch_train": ["--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0"],
            "sbatch_other": ["--ntasks=1"],
        },
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
    return tmp_path


def reproduce(work: Path, cluster: Cluster, *words: str) -> str:
    """On one host ranks meet on the loopback device. The path is for a clone that is not installed."""
    command = [sys.executable, "-m", "flowrl_mega.cli", "reproduce", "study.yaml", *words]
    environment = {**cluster.environment, "GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=work, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_chain_of_jobs_ends_with_a_report(work: Path, cluster: Cluster) -> None:
    reproduce(work, cluster, "--stage", "fetch")
    lines = reproduce(work, cluster, "--submit").splitlines()
    jobs = [line.split()[2].rstrip(",") for line in lines]
    assert [line.partition(", ")[2] for line in lines] == [
        "train GRPO",
        "train FlowRL",
        "convert",
        "evaluate",
        "report",
    ]
    last = cluster.wait(jobs[-1], 400)
    logs = "\n".join(path.read_text() for path in sorted((work / "runs/two/slurm").iterdir()))
    assert [cluster.job(number)["JobState"] for number in jobs] == ["COMPLETED"] * 5, logs
    assert last["ExitCode"] == "0:0"
    report = (work / "runs/two/report.md").read_text()
    rows = {line.split("|")[1].strip(): line for line in report.splitlines() if line.startswith("| ")}
    assert rows.keys() >= {"base", "GRPO", "FlowRL"} and "; 50.00; " in rows["FlowRL"]
    assert "50.00" in (work / "runs/two/report.html").read_text()
    record = json.loads((work / "runs/two/report.json").read_text())
    assert [record["training"][name]["steps"] for name in ("GRPO", "FlowRL")] == [2, 2]
    assert reproduce(work, cluster, "--dry-run").count("done: ") == 8, "base, runs, models, evaluations"
