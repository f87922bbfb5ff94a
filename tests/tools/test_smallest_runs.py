"""Every benchmark as its command runs it, in the smallest form that goes through all of its parts.

The figures of such runs mean nothing; that they are there, and follow from each other, is what is asked. Those of
log-probs, conversion and the update have tests of their own (ops/, checkpoint/, distributed/).
"""

from __future__ import annotations

import importlib
import json
import math
import string
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.tools

BENCHMARKS = Path(__file__).resolve().parents[2] / "tools" / "benchmarks"
Rows = list[dict[str, Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama that reads English by the letter, and a chat template."""
    from tiny_models import make

    from flowrl_mega.data.tokenizer import char_tokenizer

    folder = make("llama", tmp_path_factory.mktemp("model"), vocab=128, num_hidden_layers=3)
    tokenizer = char_tokenizer(string.printable)
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Rows]:
    """Runs a benchmark's `main` in this process, which has imported already what takes seconds; gives its rows."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)

    def main(name: str, *arguments: object) -> Rows:
        file = tmp_path / "rows.json"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *map(str, arguments), "--json", str(file)])
        importlib.import_module(name).main()
        written = json.loads(file.read_text())
        assert {"cpu", "versions", "command"} <= written["machine"].keys()
        return written["rows"]

    return main


@pytest.mark.integration
def test_against_trl(run, model):
    work = ["--prompts", 2, "--answers", 2, "--tokens", 4, "--steps", 1]
    trl, ours, ratio = run("against_trl", "--model", model, *work, "--layout", "tp1", "--rounds", 1)
    assert (trl["provider"], ours["provider"]) == ("trl", "flowrl-mega")
    assert trl["versions"]["trl"] == "1.16.0"
    for row in (trl, ours):
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 4 / row["seconds_per_step"])
        assert len(row["seconds_per_step_by_round"]) == 1
    for name in ("tokens_per_second", "peak_rss_bytes"):
        assert ratio[name] == pytest.approx(ours[name] / trl[name])


def test_trl_says_what_it_needs(monkeypatch, capsys):
    """Instead of a traceback, and before torch is imported."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    trl_grpo = importlib.import_module("trl_grpo")
    monkeypatch.setattr(trl_grpo.importlib.util, "find_spec", lambda name: None if name == "trl" else name)
    monkeypatch.setattr(sys, "argv", ["trl_grpo.py", "--model", "none"])
    assert trl_grpo.main() == 2
    said = capsys.readouterr().err
    assert f"{sys.executable} -m pip install --no-deps -r requirements/trl.txt\n" in said
    assert "has no trl. " in said


@pytest.mark.integration
def test_a_step_by_layout(run, model, capsys):
    """Of one layer, which pp2 does not divide."""
    work = ["--prompts", 2, "--answers", 2, "--tokens", 4, "--steps", 1, "--layers", 1]
    (row,) = run("step", "--model", model, *work, "--layouts", "tp1", "pp2")
    assert (row["layout"], row["layers"], row["threads_per_rank"] > 0) == ("tp1", 1, True)
    assert {"generate", "update"} <= row["phases"].keys()
    assert "pp2: not run" in capsys.readouterr().out


@pytest.mark.integration
def test_generation(run, model, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one rank
    (row,) = run("generation", "--model", model, "--batch", 2, "--tokens", 4, "--rounds", 1)
    assert row["transformers"] > 0 and row["engine"] > 0


def test_fp8_emulated(run, model):
    rows = {row["way"]: row for row in run("fp8_emulated", "--model", model, "--tokens", 4)}
    assert [row["against"] for row in rows.values()] == ["fp32", *["bf16"] * 4]
    assert all(0 < row["fp8_delta_diff"] <= row["abs_logp"] < math.inf for row in rows.values())
    assert rows["tensorwise"]["abs_logp"] < rows["tensorwise in e5m2"]["abs_logp"], "three bits against two"


def test_loaders(run, tmp_path):
    (row,) = run("loaders", "--prompts", 300, "--take", 7, "--rounds", 1, "--providers", "mmap", "--folder", tmp_path)
    assert row["mtok_per_s"] > 0 and len(row["samples"]) == 1
    assert not list(tmp_path.glob("loaders-*")), "outputs of this size must not stay"


@pytest.mark.integration
@pytest.mark.parametrize("provider", ["dali.index", "dali.reader", "torch", "torch.lists"])
def test_every_loader_gives_one_epoch(provider, tmp_path, monkeypatch):
    """`measured` asserts it."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    loaders, work = importlib.import_module("loaders"), importlib.import_module("loaders_work")
    assert (*work.OURS, "torch", "torch.lists") == loaders.PROVIDERS
    store = work.make(tmp_path / "store", 300)
    assert loaders.prepared([provider], store)[0] == [provider]
    assert work.measured(provider, str(store.path), 7)["cpu_s"] > 0


def test_rewards(run):
    """Without math-verify, whose workers take seconds to start."""
    chosen = ["math:dapo", "code:score"]
    rows = run("rewards", "--answers", 4, "--programs", 1, "--rounds", 1, "--rewards", *chosen)
    assert [row["reward"].rpartition(".")[2] for row in rows[::3]] == chosen
    assert [row["provider"] for row in rows[:3]] == ["direct", "1 worker", "2 workers"]
    assert all(row["per_second"] > 0 for row in rows)


def test_rewards_against_an_earlier_checkout(run, tmp_path):
    """Here against itself: the rewards are the same."""
    (tmp_path / "math500.jsonl").write_text('{"answer": "\\\\frac{1}{2}"}\n{"answer": "5"}\n{"answer": ""}\n')
    chosen = ["--rewards", "math:dapo", "code:score", "--against", BENCHMARKS.parents[1], "--data", tmp_path]
    rows = run("rewards", "--answers", 4, "--programs", 1, "--rounds", 1, *chosen)
    assert [row["set"] for row in rows] == ["table of pairs", "math500", "sums"]
    assert [row["calls"] for row in rows] == [4, 2, 1]
    assert all(row["other_rewards"] == 0 and row["of_before"] > 0 for row in rows)


def test_sandbox(run, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(importlib.import_module("sandbox"), "TURNS", 2)
    rows = {row["what"]: row for row in run("sandbox", "--rounds", 2, "--seconds", 0.2)}
    assert rows["interpreter"]["overhead_ms"] == 0
    assert rows["process"]["ms"] > 0 and rows["2 workers"]["programs_per_s"] > 0
    assert rows["trainer beside programs that never end"]["of_alone"] > 0


@pytest.mark.ranks
@pytest.mark.parametrize("kind", ["Ours", "OursOfEval"])
def test_our_client_on_a_server(model, tmp_path, ranks1, kind):
    """The half of client.py that is ours, with a stand-in for the server. SGLang's own client takes half a minute of
    CPU to import, so the whole command is no part of CI."""
    from client_ranks import ours
    from stand_in import StandIn

    server = StandIn(vocab=128, layers=3)
    try:
        assert ranks1.run(ours, str(model), server.url, tmp_path, kind)[0] > 0
        assert sum(len(body["input_ids"]) for body in server.asked("/generate")) == 4
    finally:
        server.close()


@pytest.mark.integration
@pytest.mark.servers
@pytest.mark.timeout(900)
def test_sync_with_a_real_server(tmp_path):
    """In a process of its own, which becomes a job of one rank."""
    from sglang_server import server_python

    file = tmp_path / "rows.json"
    size = ["--gigabytes", "0.036", "--bucket-mb", "16", "--rounds", "1", "--server-python", server_python()]
    subprocess.run([sys.executable, str(BENCHMARKS / "sync.py"), *size, "--json", str(file)], check=True, timeout=900)
    rows = json.loads(file.read_text())["rows"]
    assert [row["transfer"] for row in rows] == ["broadcast", "with copies", "distributed", "tensor", "disk"]
    assert all(row["of_broadcast"] == pytest.approx(row["seconds"] / rows[0]["seconds"]) for row in rows)
