"""A long run: a small page, made soon, and without the libraries that take seconds to load."""

from __future__ import annotations

import resource
import subprocess
import sys

import pytest
from report_runs import Page, distribution, metrics_of, write_lines, write_run

STEPS, METRICS = 10_000, 60
MOST_BYTES, MOST_CPU_S = 5_000_000, 12  # it takes about 4 s; other work may share the caches


@pytest.mark.slow
def test_ten_thousand_steps(tmp_path):
    """60 metrics a step, four samples a step, 100 MB of distributions."""
    more = {
        f"group_{at % 5}__metric_{at}": (lambda step, at=at: (step * (at + 7) % 101) / 101) for at in range(METRICS - 8)
    }
    run = write_run(tmp_path / "run", metrics_of(STEPS, **more))
    sample = {"prompt": "find a sum", "response": "an answer " * 40, "reward": 0.5}
    write_lines(run / "samples.jsonl", ({"step": 1 + at // 4, **sample} for at in range(4 * STEPS)))
    answers = distribution(1)["prompts"] * 80
    write_lines(
        run / "distributions.jsonl", ({**distribution(step), "prompts": answers} for step in range(1, STEPS + 1))
    )
    assert (run / "distributions.jsonl").stat().st_size > 100_000_000
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "flowrl_mega.cli", "report", str(run)], capture_output=True, text=True, timeout=240
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    html = (run / "report.html").read_text()
    print(f"{len(html.encode()) / 1e6:.2f} MB, {seconds:.2f} s of CPU time")
    assert len(html.encode()) < MOST_BYTES and seconds < MOST_CPU_S
    page = Page(html)
    assert page.rows("Cost")[1][1] == str(STEPS) and len(page.titles()) >= METRICS - 2


def test_no_heavy_library_is_loaded(tmp_path):
    run = write_run(tmp_path / "run")
    code = (
        "import sys; from flowrl_mega import cli; status = cli.main(['report', sys.argv[1]]);"
        "print(status, sorted({'torch', 'megatron', 'transformers', 'wandb', 'aiohttp'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["0 []"], done.stdout + done.stderr
    assert done.stderr == ""
