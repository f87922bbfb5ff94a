"""The console, and the Monitor that ties the parts together."""

import io
import re

import pytest
import yaml

from flowrl_mega.monitor import Monitor
from flowrl_mega.monitor import console as console_module
from flowrl_mega.monitor.console import Console
from flowrl_mega.monitor.run_folder import EVALUATION, METRICS, SAMPLES

STEP = {
    "reward/mean": 0.51234,
    "perf/tokens_per_second": 12345.6,
    "perf/memory_gb": 1.5,
    "loss/policy": 7.125,
}


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    """Time that passes only when told to."""

    def __init__(self, monkeypatch):
        self.now = 100.0
        monkeypatch.setattr(console_module.time, "monotonic", lambda: self.now)


def test_plain_lines_come_now_and_then(monkeypatch):
    """A log file of a long run must not hold a line a step, yet always the first and the last."""
    clock, stream = Clock(monkeypatch), io.StringIO()
    console = Console(100, stream=stream, every=10.0)
    for step in range(1, 101):
        clock.now += 1.0
        console.log(step, STEP)
    lines = stream.getvalue().splitlines()
    assert [int(re.match(r"step (\d+)/100", line)[1]) for line in lines] == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert lines[0] == "step 1/100, 01:39 left, reward 0.512, 12,346 tok/s, 1.50 GB"


def test_time_left_of_a_resumed_run_counts_its_own_steps_only(monkeypatch):
    """At 2 s a step, 10 steps before the end: 20 s, wherever the run was resumed."""
    clock, stream = Clock(monkeypatch), io.StringIO()
    console = Console(100, resume_step=80, stream=stream, every=0.0)
    for step in range(81, 91):
        clock.now += 2.0
        console.log(step, {})
    assert stream.getvalue().splitlines()[-1] == "step 90/100, 00:20 left"


def test_a_bar_on_a_terminal():
    """Step, total and the shown metrics, one bar line that is redrawn; evaluations get lines of their own."""
    stream = Terminal()
    console = Console(20, resume_step=10, stream=stream)
    for step in range(11, 21):
        console.log(step, STEP)
    console.evaluation(20, {"pass_rate": 0.75, "note": "x"})
    console.close()
    text = stream.getvalue()
    assert "10/20" in text
    assert "20/20" in text
    assert "reward 0.512, 12,346 tok/s, 1.50 GB" in text
    assert "evaluation after step 20: pass_rate 0.75\n" in text
    assert "7.125" not in text


def test_a_run_and_its_resume(tmp_path, capsys):
    """The files after a resume are those of an uninterrupted run; a fresh start in the folder keeps nothing."""

    def run(first, last, resume_step):
        monitor = Monitor(tmp_path, {"steps": 6}, total_steps=6, resume_step=resume_step, progress=True)
        if resume_step == 0:
            monitor.evaluation(0, {"pass_rate": 0.1})
        for step in range(first, last + 1):
            monitor.log(step, {**STEP, "loss/policy": 1 / step})
            monitor.samples(step, [{"prompt": "p", "response": "r", "reward": 1.0}])
            if step % 2 == 0:
                monitor.evaluation(step, {"pass_rate": step / 10})
        monitor.close()
        return {name: (tmp_path / name).read_bytes() for name in (METRICS, EVALUATION, SAMPLES)}

    whole = run(1, 6, 0)
    assert run(5, 6, 4) == whole
    assert run(1, 5, 0) != whole
    assert run(3, 6, 2) == whole
    assert run(1, 6, 0) == whole
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == {"steps": 6}
    printed = capsys.readouterr()
    assert "step 6/6" in printed.err
    assert "evaluation after step 4: pass_rate 0.4" in printed.err
    assert printed.out == ""


def test_no_progress_no_output(tmp_path, capsys):
    """progress=False is for scripts that print their own lines."""
    monitor = Monitor(tmp_path, {}, total_steps=1, progress=False)
    monitor.log(1, STEP)
    monitor.close()
    assert capsys.readouterr() == ("", "")


def test_an_unknown_wandb_mode_leaves_no_folder(tmp_path):
    """Settings are checked before anything is written."""
    with pytest.raises(ValueError, match=r"monitor.wandb = 'on': must be one of off, offline, online"):
        Monitor(tmp_path / "run", {}, total_steps=1, wandb="on")
    assert not (tmp_path / "run").exists()
