"""wandb: off does not even import it; the offline run is read back with wandb's own reader."""

import importlib.util
import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.monitor import Monitor, check_wandb
from flowrl_mega.monitor.run_id import run_id

pytestmark = pytest.mark.slow

needs_wandb = pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="wandb is not installed (pip install 'wandb>=0.31')"
)


RECORD = {
    "residual": {"edges": [-1.0, 0.0, 3.0], "counts": [2, 5]},
    "log_z": {"logged": [0.5, 0.6], "group": [0.4, 0.7], "exact": [None, None]},
    "prompts": [{"prompt": "47:", "answers": [{"text": "<b>", "count": 3, "reward": 1.0, "empirical": 0.75}]}],
}


def inspect(run_file):
    """The records of a .wandb file, as `wandb leet inspect --json` prints them."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(run_file)]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    return [json.loads(line) for line in output.splitlines()]


def history(records):
    own = [record["history"]["item"] for record in records if record["type"] == "history"]
    return [{name: value for name, value in item.items() if not name.startswith("_")} for item in own]


@needs_wandb
@pytest.mark.integration
def test_an_offline_run_reads_back_and_resumes_under_its_id(tmp_path, monkeypatch):
    """Values, config, project and the step axis arrive; a resumed run continues the same wandb run."""
    monkeypatch.setenv("WANDB_MODE", "disabled")  # the setting decides, not the environment
    config = {"seed": 3, "optimizer": {"lr": 0.5}}

    def run(first, last, resume_step):
        known = set(tmp_path.glob("wandb/offline-run-*/run-*.wandb"))
        monitor = Monitor(tmp_path, config, 4, resume_step, wandb="offline", project="trial", progress=False)
        for step in range(first, last + 1):
            monitor.log(step, {"reward/mean": step / 8, "loss/policy": 1 / 3})
        monitor.evaluation(last, {"pass_rate": 0.75})
        monitor.distributions(last, RECORD)
        monitor.close()
        (made,) = set(tmp_path.glob("wandb/offline-run-*/run-*.wandb")) - known
        return inspect(made)

    first = run(1, 3, resume_step=0)
    *numbers, pictures = history(first)
    assert pictures["step"] == 3
    shown = [pictures[f"loss/residual_histogram.{field}"] for field in ("_type", "values", "bins")]
    assert shown == ["histogram", [2, 5], [-1.0, 0.0, 3.0]]
    assert [name for name in pictures if name.startswith("loss/log_z_calibration")]
    assert (pictures["target/answers._type"], pictures["target/answers.nrows"]) == ("table-file", 1)
    assert numbers == [
        {"step": 1, "reward/mean": 0.125, "loss/policy": 1 / 3},
        {"step": 2, "reward/mean": 0.25, "loss/policy": 1 / 3},
        {"step": 3, "reward/mean": 0.375, "loss/policy": 1 / 3},
        {"step": 3, "evaluation/pass_rate": 0.75},
    ]
    (start,) = [record["run"] for record in first if record["type"] == "run"]
    assert start["project"] == "trial"
    assert {name: start["config"]["update"][name] for name in config} == config
    assert first[-1]["exit"]["exit_code"] == 0
    (axis,) = [record["metric"] for record in first if record["type"] == "metric" and "glob_name" in record["metric"]]
    assert (axis["glob_name"], axis["step_metric"]) == ("*", "step")

    second = run(3, 4, resume_step=2)
    assert [item["step"] for item in history(second)] == [3, 4, 4, 4]
    (again,) = [record["run"] for record in second if record["type"] == "run"]
    assert again["run_id"] == start["run_id"]


@needs_wandb
@pytest.mark.integration
def test_a_checkpoint_is_an_artifact(tmp_path):
    """With its files as they are on the disk, and only where it is asked for."""
    folder = tmp_path / "checkpoints" / "step_2"
    folder.mkdir(parents=True)
    (folder / "weights").write_bytes(b"12345")
    for asked in (True, False):
        run_dir = tmp_path / str(asked)
        monitor = Monitor(run_dir, {}, 4, wandb="offline", progress=False, wandb_checkpoints=asked)
        monitor.saved(2, folder)
        monitor.close()
        (made,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
        artifacts = [record["artifact"] for record in inspect(made) if record["type"] == "artifact"]
        assert len(artifacts) == asked
        if asked:
            assert artifacts[0]["type"] == "model" and "step_2" in artifacts[0]["aliases"]
            (file,) = artifacts[0]["manifest"]["contents"]
            assert (file["path"], int(file["size"])) == ("weights", 5)


@pytest.mark.parametrize("stored", ["1a2b3c4d\n", "", None])
def test_the_id_of_a_run(stored, tmp_path):
    """Kept for a run that goes on; a run that starts over, or whose id is lost, gets one of its own."""
    (tmp_path / "wandb").mkdir()
    if stored is not None:
        (tmp_path / "wandb" / "run_id.txt").write_text(stored)
    going_on = run_id(tmp_path / "wandb", resume=True)
    assert (going_on == "1a2b3c4d") == bool(stored) and len(going_on) == 8
    assert run_id(tmp_path / "wandb", resume=True) == going_on
    assert run_id(tmp_path / "wandb", resume=False) != going_on


def test_off_imports_nothing(tmp_path):
    """wandb costs a second and is an optional dependency."""
    code = (
        "import sys; from flowrl_mega.monitor import Monitor\n"
        "m = Monitor(sys.argv[1], {}, 1); m.log(1, {}); m.close(); sys.exit('wandb' in sys.modules)"
    )
    root = Path(__file__).parents[2]
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=root, timeout=60, check=True, capture_output=True)


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_not_installed_is_one_clear_message(monkeypatch, mode):
    """The fix is an installation or a setting."""
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ConfigError, match=rf"monitor.wandb = {mode}: .*pip install wandb, or set monitor.wandb=off"):
        check_wandb(mode)
    check_wandb("off")


@needs_wandb
def test_online_without_a_key_is_one_clear_message(tmp_path, monkeypatch):
    """On a machine that never logged in, the run must not wait for a key at a prompt nor end in a traceback."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"monitor.wandb = online: .* set monitor.wandb=offline"):
        Monitor(tmp_path / "run", {}, 1, wandb="online", progress=False)
