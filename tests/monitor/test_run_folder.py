"""The run folder survives kills and reads back exactly; a bit-exact resume is tested on it."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from flowrl_mega.config import ConfigError
from flowrl_mega.monitor.run_folder import EVALUATION, METRICS, SAMPLES, RunFolder

ROOT = Path(__file__).parents[2]


def steps(folder, name=METRICS):
    return [record["step"] for record in folder.read(name)]


def test_numbers_read_back_bit_for_bit(tmp_path):
    """A rounded metric would hide, or invent, a difference between an interrupted run and an uninterrupted one."""
    folder = RunFolder(tmp_path)
    values = [0.1 + 0.2, 1 / 3, math.pi * 1e-300, 5e-324, -0.0, 1.7976931348623157e308, 2**53 + 1, 1e16]
    folder.log(1, {f"v{i}": value for i, value in enumerate(values)})
    (record,) = folder.read(METRICS)
    assert [repr(record[f"v{i}"]) for i in range(len(values))] == [repr(value) for value in values]


def test_numpy_and_torch_values_become_plain_numbers(tmp_path):
    """The trainer logs whatever it has; a float32 keeps its exact value."""
    RunFolder(tmp_path).log(3, {"a": torch.tensor(0.1), "b": np.float32(0.1), "c": np.int64(4), "d": torch.arange(2)})
    record = json.loads((tmp_path / METRICS).read_text())
    assert record == {"step": 3, "a": float(np.float32(0.1)), "b": float(np.float32(0.1)), "c": 4, "d": [0, 1]}


def test_non_finite_numbers_are_null(tmp_path):
    """NaN is not JSON, and as NaN != NaN two equal runs would differ."""
    RunFolder(tmp_path).log(1, {"loss": float("nan"), "norm": torch.tensor(float("inf"))})
    text = (tmp_path / METRICS).read_text()
    assert text == '{"step": 1, "loss": null, "norm": null}\n'


def test_samples_and_config(tmp_path):
    """Text with line ends and other alphabets stays one record a line; config.yaml is the checked settings."""
    folder = RunFolder(tmp_path / "deep" / "er")
    folder.samples(2, [{"response": "a\nb\u2028c ü"}, {"response": "d"}])
    folder.write_config({"optimizer": {"lr": 1e-06}, "betas": [0.9, 0.999], "dp": None})
    assert folder.read(SAMPLES) == [{"step": 2, "response": "a\nb\u2028c ü"}, {"step": 2, "response": "d"}]
    assert yaml.safe_load((folder.path / "config.yaml").read_text()) == {
        "optimizer": {"lr": 1e-06},
        "betas": [0.9, 0.999],
        "dp": None,
    }


def test_truncate_drops_later_steps_from_every_file(tmp_path):
    """Steps after the checkpoint are run again; kept, they would be there twice."""
    folder = RunFolder(tmp_path)
    for step in range(1, 6):
        folder.log(step, {"x": step})
        folder.samples(step, [{"r": 0}, {"r": 1}])
        folder.evaluation(step, {"pass_rate": 0.5})
    before = (tmp_path / METRICS).read_bytes()
    folder.truncate(3)
    assert steps(folder) == steps(folder, EVALUATION) == [1, 2, 3]
    assert steps(folder, SAMPLES) == [1, 1, 2, 2, 3, 3]
    assert before.startswith((tmp_path / METRICS).read_bytes())
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize("cut", range(23))
def test_a_half_written_last_line_is_dropped_and_not_appended_to(tmp_path, cut):
    """kill -9 can cut the last line anywhere, just before its line end included; the next record needs its own line."""
    folder = RunFolder(tmp_path)
    folder.log(1, {"x": 0.25})
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 2, "x": 0.5}\n'[:cut])
    complete = cut >= 21
    assert steps(folder) == ([1, 2] if complete else [1])
    folder.truncate(2)
    folder.log(3, {"x": 1.0})
    assert steps(folder) == ([1, 2, 3] if complete else [1, 3])


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    """That is no half-written record but a damaged file: dropping it silently would leave a hole in the run."""
    (tmp_path / METRICS).write_text('{"step": 1}\nrubbish\n{"step": 3}\n')
    with pytest.raises(ConfigError, match=r"metrics.jsonl, line 2: not valid JSON"):
        RunFolder(tmp_path).truncate(3)


def test_each_step_is_on_disk_when_the_process_is_killed(tmp_path):
    """kill -9 right after `log`: nothing may wait in a buffer."""
    code = (
        "import sys, time; from flowrl_mega.monitor.run_folder import RunFolder; f = RunFolder(sys.argv[1])\n"
        "for s in (1, 2, 3): f.log(s, {'x': s})\n"
        "print('logged', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "logged\n"
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
    assert steps(RunFolder(tmp_path)) == [1, 2, 3]


@pytest.mark.slow
def test_a_kill_while_truncating_leaves_the_old_or_the_new_file(tmp_path):
    """The rewrite is atomic: killed at any moment, every kept step is still there, and no line is damaged."""
    folder = RunFolder(tmp_path)
    for step in range(1, 2001):
        folder.log(step, {"x": 1 / step})
    code = (
        "import sys; from flowrl_mega.monitor.run_folder import RunFolder; f = RunFolder(sys.argv[1])\n"
        "print('ready', flush=True)\n"
        "while True: f.truncate(1000)"
    )
    for delay in (0.0, 0.003, 0.011):
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate(timeout=10)
        assert steps(folder) in (list(range(1, 1001)), list(range(1, 2001)))


def test_a_folder_that_cannot_be_made(tmp_path):
    """A file in the way is a wrong setting."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"run_dir = .*: cannot be made"):
        RunFolder(tmp_path / "file" / "run")
