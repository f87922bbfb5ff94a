"""tools/gpu_check.sh --rehearse: items really run without a GPU, nothing is taken for measured, and what is made fits
through the door of a machine that is lent. All items: make rehearse-gpu."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import transformer_engine_emulation
from tools.scripts import parser_of

pytestmark = pytest.mark.tools

REPO = Path(__file__).resolve().parents[1]
NEWER = f"Requires-Python: >={sys.version_info[0]}.{sys.version_info[1] + 1}\n"  # than this Python
RESULTS = REPO / "tools" / "benchmarks" / "results"


@pytest.fixture
def items(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import gpu_items

    return gpu_items.ITEMS


@pytest.fixture
def rehearsal(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import gpu_rehearsal

    made = gpu_rehearsal.Rehearsal(tmp_path / "state", tmp_path / "results")
    made.begin(100)
    return made


@pytest.fixture
def gpu_out(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import gpu_out

    return gpu_out


@pytest.mark.timeout(400)
@pytest.mark.skipif(bool(transformer_engine_emulation.lacks()), reason=transformer_engine_emulation.lacks())
def test_items_run_emulated(tmp_path: Path) -> None:
    """One that trains, and one that looks at an update; the others of the table nobody asked for."""
    before = {file: file.stat().st_mtime_ns for file in RESULTS.iterdir()}
    asked = ["FlowRL run, delayed", "update, looked at"]
    command = [
        sys.executable,
        REPO / "tools" / "gpu_check.py",
        "--rehearse",
        "--out",
        tmp_path / "out",
        tmp_path / "results",
    ]
    command += [word for name in asked for word in ("--only", name)]
    done = subprocess.run([*command, "--budget", "350"], capture_output=True, text=True, timeout=380)
    assert done.returncode == 0, done.stdout + done.stderr
    written = json.loads((tmp_path / "results" / "gpu_check.json").read_text())
    assert written["machine"]["gpu"].startswith("no GPU: rehearsed")
    rows = {row["item"]: row for row in written["rows"]}
    begun = {name: row for name, row in rows.items() if name.startswith(tuple(asked))}
    assert {row["verdict"] for row in begun.values()} == {"rehearsed"} and len(begun) == 5
    assert re.match(r"loss .* -> .*, FP8 - bf16 .* nats a token", rows["FlowRL run, delayed"]["result"])
    assert rows["update, looked at, attention"]["result"].startswith("FusedAttention")
    assert all(
        "nobody asked for it" in row["verdict"] for name, row in rows.items() if name not in (*begun, "packages")
    )
    names = sorted(file.name for file in (tmp_path / "out").iterdir())
    assert names == ["gpu_check.tar.gz", "gpu_check.txt", "update_trace.json.gz"]
    with tarfile.open(tmp_path / "out" / "gpu_check.tar.gz") as archive:
        assert {"logs/flowrl-run-delayed.log", "results/gpu_check.json"} <= set(archive.getnames())
    assert before == {file: file.stat().st_mtime_ns for file in RESULTS.iterdir()}


def test_every_script_takes_what_its_item_gives_it(items) -> None:
    """On a GPU and in a rehearsal."""
    checked = set()
    for item in items:
        for command in (item.command, f"{item.command} {item.small}"):
            words = shlex.split(command)
            scripts = [n for n, word in enumerate(words) if re.fullmatch(r"tools/\S+\.py", word)]
            for at in scripts:
                parser_of(Path(words[at])).parse_args(words[at + 1 :])
                checked.add(words[at])
    assert checked == {
        f"tools/{name}.py" for name in ("gpu_run", "gpu_update", "benchmarks/logprob", "benchmarks/update")
    }


def test_a_rehearsal_is_small(items) -> None:
    """Nothing of a GPU's size is begun on a CPU."""
    sized = {"tools/benchmarks/logprob.py": "--device cpu", "tools/benchmarks/update.py": "--shape tiny"}
    for item in items:
        for script, wanted in sized.items():
            assert script not in item.command or wanted in item.small


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("met", "rehearsed"),
        ("missed", "rehearsed"),
        ("-", "rehearsed"),
        ("failed: no luck", "failed: no luck"),
        ("not run: every test was skipped", "failed: not run: every test was skipped"),
    ],
)
def test_only_what_came_to_nothing_is_a_failure(said, shown, items, rehearsal) -> None:
    row = items[0].rows("name", "it works", Path())[0]
    assert rehearsal.judge(row._replace(verdict=said)).verdict == shown


def test_wheels_are_those_of_the_gpu_machine(rehearsal, tmp_path: Path) -> None:
    """Its Python is 3.12, whichever this is; what pip would refuse there shows here."""
    for tag in ("cp312-cp312-manylinux_2_28_x86_64", "cp39-cp39-win32"):
        (folder := tmp_path / tag).mkdir()
        with zipfile.ZipFile(folder / f"new-1.0-{tag}.whl", "w") as made:
            made.writestr("new.py", "")
            made.writestr("new-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: new\nVersion: 1.0\n" + NEWER)
            made.writestr("new-1.0.dist-info/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: false\nTag: {tag}\n")
            made.writestr("new-1.0.dist-info/RECORD", "")
        rehearsal.install(folder)
    assert (tmp_path / "state" / "unused" / "new.py").is_file()
    assert "unused" not in rehearsal.environment()["PYTHONPATH"]
    assert [row.verdict.split(":")[0] for row in rehearsal.missing] == ["failed"]
    engine = tmp_path / "transformer_engine-1.0-py3-none-any.whl"
    engine.write_bytes(b"no wheel")
    rehearsal.install_engine(tmp_path)
    assert rehearsal.missing[1].item == "Transformer Engine's wheels"


def test_what_comes_back_is_small_enough(gpu_out, tmp_path, monkeypatch) -> None:
    """The largest files stay behind, and are named; what is compressed lies beside the archive; old ones stay, too."""
    monkeypatch.setattr(gpu_out, "MOST", 4000)
    folder, out = tmp_path / "logs", tmp_path / "out"
    folder.mkdir()
    for name, size in {"a.log": 9000, "b.log": 3000, "c.log": 300, "d.gz": 3000, "e.gz": 5000}.items():
        (folder / name).write_bytes(os.urandom(size))
    assert sorted(gpu_out.archive(out, [folder, tmp_path / "none"], since=0.0)) == ["a.log", "e.gz"]
    assert sorted(file.name for file in out.iterdir()) == ["d.gz", "gpu_check.tar.gz"]
    assert all(file.stat().st_size <= 4000 for file in out.iterdir())
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        assert archive.getnames() == ["logs/c.log", "logs/b.log"]
    assert gpu_out.archive(out, [folder], since=(folder / "a.log").stat().st_mtime + 1) == []
    with tarfile.open(out / "gpu_check.tar.gz") as archive:
        assert archive.getnames() == []
