"""tools/benchmarks/convert.py on a tiny model: what it converts, what it reports, and that wrong bits end it."""

from __future__ import annotations

import json
import os
import shutil
import statistics
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.tools

TOOLS = Path(__file__).parents[2] / "tools" / "benchmarks"


@pytest.fixture
def tool(monkeypatch):
    """The benchmark's modules, importable by name as they are when a script in their folder runs."""
    monkeypatch.syspath_prepend(str(TOOLS))
    monkeypatch.setenv("PYTHONPATH", str(TOOLS.parents[1]))
    import convert

    return convert


@pytest.fixture
def small(tool, monkeypatch):
    """Models of 3 MB, so that what is not about size takes no time."""
    import convert_model

    monkeypatch.setattr(convert_model, "VOCAB", 64)
    monkeypatch.setattr(convert_model, "HIDDEN", (256,))
    return convert_model


def faked(tool, monkeypatch, change=lambda folder: None):
    """Measurements of 1, 2, 3, ... seconds, of conversions that only copy, and `change` what comes back."""
    calls = []

    def measured(provider, direction, source, target):
        calls.append(f"{provider} {direction}")
        shutil.copytree(source, target)
        if target.name == "hf":
            change(target)
        memory = {} if provider == "command" else {"peak_bytes": 1000 * len(calls), "anonymous_bytes": len(calls)}
        return {"seconds": float(len(calls)), **memory}

    monkeypatch.setattr(tool, "measured", measured)
    return calls


@pytest.mark.integration
def test_a_tiny_run_reports_what_it_measured(tool, tmp_path):
    """The command itself, with real conversions in their processes. The ratios must follow from the samples that the
    file holds, or the file would prove nothing; a conversion takes memory, a copy in the kernel none."""
    file = tmp_path / "rows.json"
    size = ["--gigabytes", "0.04", "--shard-mb", "20", "--rounds", "1"]
    tool.main([*size, "--providers", "flowrl-mega", "--folder", str(tmp_path), "--json", str(file)])
    assert list(tmp_path.iterdir()) == [file], "outputs of this size must not stay"
    written = json.loads(file.read_text())
    header = written["machine"]
    assert {"cpu", "cores", "versions", "date", "command", "threads", "page_cache", "not_run"} <= header.keys()
    assert header["goals"] == {"speed_of_copy": 0.6, "peak_shards": 2.0}
    assert header["rounds"] == 1
    assert header["bytes"] == pytest.approx(0.04e9, rel=0.1)
    assert 16_777_216 <= header["shard_bytes"] <= 20e6

    rows = {(row["provider"], row["direction"]): row for row in written["rows"]}
    ours = [rows.pop(("flowrl-mega", direction)) for direction in ("hf2mcore", "mcore2hf")]
    copied = rows.pop(("copy", "copy"))
    assert not rows
    for row in ours:
        (seconds,), (peak,), (anonymous,) = row["samples"].values()
        assert row["seconds"] == seconds > 0
        assert row["gb_per_second"] == pytest.approx(header["bytes"] / 1e9 / seconds)
        assert row["speed_of_copy"] == pytest.approx(copied["samples"]["seconds"][0] / seconds)
        assert row["peak_bytes"] == peak > 1e6
        assert row["peak_shards"] == pytest.approx(peak / header["shard_bytes"])
        assert row["anonymous_shards"] == pytest.approx(anonymous / header["shard_bytes"])
        assert row["goals_met"].keys() == header["goals"].keys()
    assert copied["peak_bytes"] < 1e6


def test_medians_of_seconds_the_most_of_memory(tool):
    """One slow round must not decide, one round with much memory must."""

    def samples(*seconds):
        return [{"seconds": s, "peak_bytes": 100 * s, "anonymous_bytes": 10 * s} for s in seconds]

    given = {("copy", "copy"): samples(2, 1, 9), ("flowrl-mega", "hf2mcore"): samples(5, 1, 3)}
    given |= {("flowrl-mega", "mcore2hf"): samples(90, 4, 2), ("mbridge", "hf2mcore"): samples(12, 30, 0)}
    copied, there, back, mbridge = tool.summary(given, size=int(6e9), shard=300)
    assert (copied["seconds"], copied["gb_per_second"], copied["speed_of_copy"]) == (2, 3, 1)
    assert (there["seconds"], there["gb_per_second"], there["speed_of_copy"]) == (3, 2, 2 / 3)
    assert (there["speed_of_mbridge"], mbridge["speed_of_copy"]) == (4, 2 / 12)
    assert "speed_of_mbridge" not in back
    assert (there["peak_shards"], there["anonymous_bytes"]) == (500 / 300, 50)
    assert there["goals_met"] == {"speed_of_copy": True, "peak_shards": True}
    assert back["goals_met"] == {"speed_of_copy": False, "peak_shards": False}
    assert there["samples"]["seconds"] == [5, 1, 3]


def test_everyone_takes_turns_and_whoever_is_absent_is_named(tool, small, tmp_path, monkeypatch, capsys):
    calls = faked(tool, monkeypatch)
    monkeypatch.setattr(tool.importlib.util, "find_spec", lambda name: None)
    file = tmp_path / "rows.json"
    tool.main(["--gigabytes", "3e-3", "--rounds", "2", "--folder", str(tmp_path), "--json", str(file)])
    ours, command = ([f"{name} {direction}" for direction in tool.DIRECTIONS] for name in ("flowrl-mega", "command"))
    assert calls == ["copy copy", *ours, *command, *ours, *command, "copy copy"]
    written = json.loads(file.read_text())
    assert written["machine"]["not_run"] == {"mbridge": "not installed"}
    assert "mbridge" in capsys.readouterr().out
    assert written["rows"][0]["samples"]["seconds"] == [1, 10]
    assert written["rows"][0]["seconds"] == statistics.median([1, 10])


def rewrite(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


WRONG = {
    "one bit": (lambda t: t["model.norm.weight"].view(torch.int16)[3].bitwise_xor_(1), "model.norm.weight"),
    "sign of zero": (lambda t: t["model.norm.weight"].neg_(), "model.norm.weight"),
    "type": (lambda t: t.update({"model.norm.weight": t["model.norm.weight"].half()}), "model.norm.weight"),
    "missing": (lambda t: t.pop("model.norm.weight"), "names of its tensors"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_whoever_comes_back_with_other_bits_ends_the_benchmark(wrong, tool, small, tmp_path, monkeypatch):
    """The speed of a wrong conversion is worth nothing."""
    change, message = WRONG[wrong]
    monkeypatch.setattr(torch.Tensor, "normal_", lambda tensor, *_, **__: tensor.zero_())
    faked(tool, monkeypatch, lambda folder: rewrite(folder, change))
    with pytest.raises(SystemExit, match=message):
        tool.main(["--gigabytes", "3e-3", "--rounds", "1", "--folder", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_files_of_other_names_end_it_too(tool, small, tmp_path, monkeypatch):
    """The way back keeps the original's files; one file with everything in it would be faster to write."""
    faked(tool, monkeypatch, lambda folder: (folder / "model.safetensors").rename(folder / "other.safetensors"))
    with pytest.raises(SystemExit, match="names of the files"):
        tool.main(["--gigabytes", "3e-3", "--rounds", "1", "--folder", str(tmp_path)])


def test_the_model_is_a_whole_one_in_several_files(small, tmp_path):
    """Oracle: transformers finds every tensor. Of zeros, or in fp32, it would be another work for disk and memory."""
    small.make(tmp_path, size=4_000_000, shard=1_000_000)
    model, found = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(found[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert not model.config.tie_word_embeddings
    assert model.dtype == torch.bfloat16
    files = small.weight_files(tmp_path)
    assert len(files) > 2
    assert sum(file.stat().st_size for file in files) == pytest.approx(4_000_000, rel=0.1)
    for name, parameter in model.named_parameters():
        assert parameter.float().std().item() == pytest.approx(0.02, rel=0.3), name


def test_the_clock_runs_from_after_the_imports_until_all_is_on_the_disk(tool, tmp_path, monkeypatch):
    """Bytes that only lie in the page cache would make who does not wait for the disk look fast."""
    import convert_work

    def load(direction):
        time.sleep(0.5)
        return work

    def work(source, target):
        (target / "inner").mkdir(parents=True)
        (target / "a").write_text("a")
        (target / "inner" / "b").write_text("b")

    synced = []

    def slow_fsync(descriptor):
        time.sleep(0.1)
        synced.append(os.fstat(descriptor).st_ino)

    out, target = tmp_path / "out.json", tmp_path / "target"
    monkeypatch.setattr(os, "fsync", slow_fsync)
    monkeypatch.setitem(convert_work.LOADERS, "copy", load)
    monkeypatch.setattr(sys, "argv", ["convert_work.py", "copy", "copy", str(tmp_path), str(target), str(out)])
    convert_work.main()
    assert 0.2 <= json.loads(out.read_text())["seconds"] < 0.5
    assert sorted(synced) == sorted((target / name).stat().st_ino for name in ("a", "inner/b"))


def test_anonymous_memory_of_a_process_is_seen(tool):
    megabytes = 60
    most = tool.run([sys.executable, "-c", f"x = b'x' * {megabytes << 20}; import time; time.sleep(0.2)"])
    assert megabytes << 20 < most < (megabytes + 30) << 20


def test_a_failure_shows_what_the_process_said(tool):
    with pytest.raises(SystemExit, match="no such model"):
        tool.run([sys.executable, "-c", "raise ValueError('no such model')"])
