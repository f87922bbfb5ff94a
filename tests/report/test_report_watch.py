"""--watch renews the page while a run goes on, and leaves one that no longer reloads itself."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from typing import Any

import pytest
from report_runs import Page, metrics_of, report, write_run

from flowrl_mega.report.command import report as command

END = 120  # seconds to wait for what takes a few


def steps_of(file):
    """The steps that the page tells of, and its <meta http-equiv=refresh>, if any."""
    page = Page(file.read_text())
    return page.rows("Cost")[1][1], [
        each.attributes["content"] for each in page.all("meta", **{"http-equiv": "refresh"})
    ]


def wait_for(found):
    end = time.monotonic() + END
    while not found():
        assert time.monotonic() < end
        time.sleep(0.05)


def add_step(run, step):
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics_of(step)[-1]) + "\n")


def test_a_page_made_once_does_not_reload(tmp_path):
    assert not report(write_run(tmp_path / "run")).all("meta", **{"http-equiv": "refresh"})


def test_it_is_renewed_when_the_run_has_gone_on(tmp_path):
    run, stop = write_run(tmp_path / "run"), threading.Event()
    watching = threading.Thread(target=command, args=([str(run)], str(tmp_path / "page.html"), 0.1, stop.is_set))
    watching.start()
    try:
        page = tmp_path / "page.html"
        wait_for(page.exists)
        assert steps_of(page) == ("60", ["0.1"])
        made = page.stat().st_mtime_ns
        time.sleep(0.5)
        assert page.stat().st_mtime_ns == made, "nothing has changed"
        add_step(run, 61)
        wait_for(lambda: steps_of(page)[0] == "61")
    finally:
        stop.set()
        watching.join(END)
    assert steps_of(page) == ("61", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "run"], "nothing half written is left"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_the_normal_end(tmp_path, number):
    run = write_run(tmp_path / "run")
    arguments = [sys.executable, "-m", "flowrl_mega.cli", "report", str(run), "--watch", "1"]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A shell starts what is in its background with Ctrl-C ignored, this test too, perhaps.
    with subprocess.Popen(
        arguments, **pipes, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)
    ) as watching:
        try:
            assert "Ctrl-C ends" in watching.stdout.readline()
            assert steps_of(run / "report.html") == ("60", ["1"])
            watching.send_signal(number)
            assert watching.wait(END) == 0
        finally:
            watching.kill()
        assert watching.stderr.read().strip() == ""
    assert steps_of(run / "report.html") == ("60", [])
