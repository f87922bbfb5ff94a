"""tools/gpu_check.sh without a GPU: what it says, what it does not do twice, and that nothing is hidden."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

REPO = Path(__file__).resolve().parents[1]
TOOL = REPO / "tools" / "gpu_check.sh"
MACHINE = {"gpu": "a GPU", "gpus": 1, "torch": "2.11", "transformer-engine": None, "transformer-engine-torch": None}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import gpu_check

    return gpu_check


@pytest.fixture
def check(tool, tmp_path, monkeypatch):
    """Makes a run of the tool on a machine with one GPU and no Transformer Engine."""
    monkeypatch.setattr(tool, "REPO", tmp_path)
    (tmp_path / "flowrl_mega").mkdir()

    def make():
        made = tool.Check(tmp_path / "state", tmp_path / "results")
        made.machine = dict(MACHINE)
        made.begin(530)
        return made

    return make


@pytest.fixture
def item(tool):
    """An item that runs a shell command and shows what it printed."""

    def make(name: str, command: str, **more):
        return tool.Item("engine", name, command, lambda n, out, _: [tool.Row(n, out.strip(), "", "met")], **more)

    return make


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *arguments], capture_output=True, text=True, env=os.environ | environment, timeout=60)


def without_gpu(folder: Path) -> dict[str, str]:
    """A torch that sees no GPU, imported in no time, and the interpreter of these tests."""
    (folder / "torch").mkdir()
    (folder / "torch" / "__init__.py").write_text(
        "__version__ = '2.11'\nclass version: cuda = None\nclass cuda: is_available = staticmethod(lambda: False)\n"
    )
    (folder / "python3").symlink_to(sys.executable)
    return {"PYTHONPATH": str(folder), "PATH": f"{folder}:{os.environ['PATH']}"}


def test_without_a_gpu_one_line_and_exit_code_2(tmp_path):
    results = tmp_path / "results"
    done = run(str(results), **without_gpu(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"gpu_check: torch 2.11 sees no NVIDIA GPU; nothing was run \(.*\)\n", done.stderr)
    assert not results.exists()


def test_the_list_names_all_and_only_scripts_that_are_there(tool, tmp_path):
    """Without torch."""
    listed = run("--list").stdout
    assert all(item.name in listed for item in tool.ITEMS)
    tests = {item.file for item in tool.ITEMS}
    for script in set(re.findall(r"(?:tools|tests)/\S+\.py", listed)) - tests:
        assert (REPO / script).is_file()
    assert "update.py" not in run("--list", "--stage", "first").stdout
    assert len(run("--list", "--only", "CUDA IPC").stdout.splitlines()) == 2


def test_what_is_finished_is_not_done_again(check, item, tmp_path):
    """For the same sources and machine; a failure is tried again."""
    good, bad = item("good", "echo x >> good; cat good"), item("bad", "echo x >> bad; echo no luck; exit 3")
    for _ in range(2):
        again = check()
        again.do(good)
        again.do(bad)
    assert (tmp_path / "good").read_text() == "x\n" and (tmp_path / "bad").read_text() == "x\nx\n"
    (rows,) = again.done["bad"]["rows"]
    assert rows.verdict == "failed: no luck"
    (tmp_path / "flowrl_mega" / "new.py").write_text("")
    again.do(good)
    assert (tmp_path / "good").read_text() == "x\nx\n"


def test_the_table_hides_nothing(tool, check, item, monkeypatch, capsys, tmp_path):
    """What lacks a part, GPUs, or a file, what nobody asked for, and what fails: a row each, with the reason."""
    items = [
        item("engine", "echo", engine=True),
        item("several", "echo", gpus=4),
        item("file", "echo", file="tests/none.py"),
        item("strange", "echo }}"),
        tool.Item("engine", "unread", "echo", lambda *_: 1 / 0),
        item("later", "echo"),
    ]
    monkeypatch.setattr(tool, "ITEMS", items)
    made = check()
    made.install(None)
    for one in items[:-1]:
        made.do(one)
    assert made.report() == 1
    rows = {
        row["item"]: row["verdict"] for row in json.loads((tmp_path / "results/gpu_check.json").read_text())["rows"]
    }
    assert rows == {
        "packages": "not run: no --wheels FOLDER; tools/gpu_wheels.sh fills one",
        "engine": "not run: Transformer Engine is not installed, or its torch part is not built",
        "several": "not run: needs 4 GPUs, and there is 1",
        "file": "not run: tests/none.py is not in these sources",
        "strange": "met",
        "unread": "failed: its result cannot be read (ZeroDivisionError('division by zero'))",
        "later": "not run: nobody asked for it; it is in stage engine",
    }
    table = capsys.readouterr().out
    assert all(verdict in table for verdict in rows.values())


def test_a_result_of_other_sources_is_not_shown(tool, check, item, monkeypatch, tmp_path):
    one = item("one", "echo fine")
    monkeypatch.setattr(tool, "ITEMS", [one])
    made = check()
    made.do(one)
    (tmp_path / "flowrl_mega" / "new.py").write_text("")
    made.report()
    assert "other sources" in (tmp_path / "results/gpu_check.json").read_text()


def test_time_out_ends_the_command_and_its_children(tool, check, item, tmp_path, monkeypatch):
    """The stage's time is over: what runs is killed with all that it started, the rest is not begun, and both are
    called unfinished."""
    monkeypatch.setattr(tool, "LEAST_S", 0.1)
    made, began = check(), time.monotonic()
    made.end = began + 0.5
    made.do(item("slow", "sleep 60 & echo $! > child; wait"))
    made.do(item("next", "touch next"))
    assert time.monotonic() - began < 5 and not (tmp_path / "next").exists()
    assert [made.done[name]["rows"][0].verdict for name in ("slow", "next")] == [tool.NO_TIME] * 2
    child = Path(f"/proc/{(tmp_path / 'child').read_text().strip()}/cmdline")
    while child.exists() and b"sleep" in child.read_bytes():
        assert time.monotonic() - began < 10
        time.sleep(0.01)


def test_what_failed_is_shown_at_once(check, item, capsys):
    """Its last lines and seconds: of a machine that is lent for minutes little more than the output comes back."""
    check().do(item("bad", "seq 100; exit 3"))
    said = capsys.readouterr().out.splitlines()
    assert [line.strip() for line in said[1:-1]] == [str(n) for n in range(86, 101)]
    assert re.fullmatch(r" +exit code 3 \(\d+ s\)", said[-1])


def test_what_is_known_is_kept_after_each_item(tool, item, monkeypatch, tmp_path):
    """In the folder that comes back: the table so far, and an archive of this call's logs and results."""
    monkeypatch.setattr(tool, "REPO", tmp_path)
    one = item("one", "echo fine > {results}/one.json; echo fine")
    two = item("two", f"cp {tmp_path}/out/gpu_check.txt {tmp_path}/seen; exit 1")
    monkeypatch.setattr(tool, "ITEMS", [one, two])
    monkeypatch.setattr(tool.Check, "probe", lambda self: self.machine.update(MACHINE) or self.machine)
    old = tmp_path / "build" / "gpu" / "logs" / "old.log"
    old.parent.mkdir(parents=True)
    old.touch()
    os.utime(old, (1, 1))
    slow = tmp_path / "nvidia-smi"
    slow.write_text("#!/bin/sh\nsleep 1.5\necho a GPU, at length\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    arguments = ["--budget", "60", "--out", str(tmp_path / "out"), str(tmp_path / "results")]
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", *arguments])
    assert tool.main() == 1
    seen = (tmp_path / "seen").read_text()
    assert re.search(r"^one +\| fine +\| +\| met$", seen, re.M)
    assert re.search(r"^two .*not run: nobody asked for it", seen, re.M)
    assert re.search(r"^two .*failed", (tmp_path / "out" / "gpu_check.txt").read_text(), re.M)
    with tarfile.open(tmp_path / "out" / "gpu_check.tar.gz") as archive:
        names = archive.getnames()
        assert b"a GPU, at length" in archive.extractfile("logs/nvidia-smi.log").read()
    assert {"results/one.json", "results/gpu_check.json", "logs/one.log", "logs/two.log"} <= set(names)
    assert "logs/old.log" not in names and sorted(p.name for p in (tmp_path / "out").iterdir())[0] == "gpu_check.tar.gz"


def test_a_budget_is_for_all_stages(tool, item, monkeypatch, tmp_path):
    """A machine is lent for minutes in all, whatever has been done with them."""
    monkeypatch.setattr(tool, "REPO", tmp_path)
    monkeypatch.setattr(tool, "LEAST_S", 0.1)
    first = tool.Item("first", "first", "sleep 0.7", lambda n, out, _: [tool.Row(n, "", "", "met")])
    monkeypatch.setattr(tool, "ITEMS", [first, item("later", "touch later")])
    monkeypatch.setattr(tool.Check, "show_machine", lambda self: None)
    monkeypatch.setattr(tool.Check, "probe", lambda self: self.machine.update(MACHINE) or self.machine)
    monkeypatch.setattr(sys, "argv", ["gpu_check.py", "--budget", "0.75", str(tmp_path / "results")])
    assert tool.main() == 75
    assert not (tmp_path / "later").exists()


def wheel(folder: Path, name: str, version: str, content: str, module: str = "") -> None:
    """A wheel as tools/te_slim.py writes it, compressed with LZMA."""
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w", zipfile.ZIP_LZMA) as made:
        made.writestr(module or f"{name}.py", content)
        made.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        made.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        made.writestr(f"{info}/RECORD", "")


def test_packages_that_the_machine_has_are_left_alone(check, tmp_path):
    """A newer pytest in the folder does not replace the machine's; Megatron's version must be the one of the folder."""
    for name, version in (("pytest", "99.0"), ("megatron_core", "99.0"), ("new_package", "1.0")):
        wheel(tmp_path, name, version, f"VERSION = {version!r}")
    made = check()
    made.install(tmp_path)
    assert made.missing == []
    assert sorted(file.name for file in made.site.glob("*.py")) == ["megatron_core.py", "new_package.py"]
    assert not made.lacks(tmp_path / "new_package-1.0-py3-none-any.whl")
    assert not made.lacks(tmp_path / "megatron_core-99.0-py3-none-any.whl")


def test_a_library_that_was_built_elsewhere_is_taken_along(check, tmp_path):
    """To where the package looks for it first; whether it fits is for the package to say."""
    (tmp_path / "flowrl_mega" / "ops").mkdir()
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    for name in ("cuda.so", "cuda.json"):
        (wheels / name).write_text("built")
    check().install(wheels)
    library = tmp_path / "flowrl_mega" / "ops" / "lib"
    assert {file.name for file in library.iterdir()} == {"cuda.so", "cuda.json"}
    assert all(file.read_text() == "built" for file in library.iterdir())


def test_libraries_that_can_be_built_here_are_taken_along(monkeypatch, tmp_path):
    """And it is said why one cannot."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import gpu_wheels

    from flowrl_mega.ops import build

    def cached(kind, csrc, cache):
        if kind not in can:
            raise build.ToolMissing(f"no compiler for {kind}")
        for suffix in (".so", ".json"):
            (tmp_path / f"{kind}-0123{suffix}").write_text(kind)
        return tmp_path / f"{kind}-0123.so"

    monkeypatch.setattr(build, "cached", cached)
    folder = tmp_path / "wheels"
    folder.mkdir()
    can = {"cpu"}
    assert gpu_wheels.libraries(folder).endswith("(make setup TORCH=cuda lets it be built here): no compiler for cuda")
    can.add("cuda")
    assert gpu_wheels.libraries(folder) == "csrc is built"
    names = {f"{kind}{suffix}": kind for kind in can for suffix in (".so", ".json")}
    assert {file.name: file.read_text() for file in folder.iterdir()} == names


def test_a_torch_part_that_was_compiled_here_is_taken_along(monkeypatch, tmp_path):
    """Where it fits the GPU machine's Python and PyTorch."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    import gpu_wheels

    folder = tmp_path / "wheels"
    folder.mkdir()

    def compiled(torch, python):
        (made := tmp_path / "flowrl-mega" / f"te-{torch}-0123").mkdir(parents=True)
        (made / f"transformer_engine_torch-{gpu_wheels.TE_VERSION}-{python}-linux_x86_64.whl").touch()
        return gpu_wheels.compiled_te_torch(folder)

    assert not compiled("2.13.0+cu130", "cp312-cp312") and not compiled("2.11.1+cu130", "cp311-cp311")
    assert compiled("2.11.0+cu130", "cp312-cp312") and gpu_wheels.present(folder, gpu_wheels.TE_TORCH)


def test_the_engine_is_put_there_whole_or_not_at_all(check, tmp_path):
    """Its wheels have one folder in common, and pip replaces a folder that is there: the torch part, which is compiled
    here, must not take the place of the rest."""
    for name in ("transformer_engine", "transformer_engine_cu13"):
        wheel(tmp_path, name, "2.0", "", f"transformer_engine/of_{name}.py")
    wheel(tmp_path, "nvidia_cuda_crt", "13.0", "", "nvidia/cu13/include/crt.h")
    check().install(tmp_path)
    check().install_engine(tmp_path)
    assert not (check().site / "transformer_engine").exists()
    source = tmp_path / "transformer_engine_torch-2.0"
    source.mkdir()
    (source / "setup.py").write_text(
        "import os\nfrom setuptools import setup\nassert os.environ['NVTE_PYTORCH_FORCE_BUILD'] == 'TRUE'\n"
        "assert any(os.path.isfile(os.path.join(path, 'crt.h')) for path in os.environ['CPATH'].split(':'))\n"
        "setup(name='transformer_engine_torch', version='2.0', packages=['transformer_engine'])\n"
    )
    (source / "transformer_engine").mkdir()
    (source / "transformer_engine" / "of_torch.py").write_text("")
    with tarfile.open(f"{source}.tar.gz", "w:gz") as archive:
        archive.add(source, source.name)
    for _ in range(2):
        made = check()
        made.install_engine(tmp_path)
        assert made.missing == []
        found = sorted(file.name for file in (made.site / "transformer_engine").glob("*.py"))
        assert found == ["of_torch.py", "of_transformer_engine.py", "of_transformer_engine_cu13.py"]
        assert not (made.site / "nvidia").exists()


def test_results_are_held_against_the_goals(tool, tmp_path):
    """Of the benchmarks' own files; one figure on either side of each goal."""
    import gpu_items

    rows = [
        {"precision": "bf16-local", "tokens_per_second": 90, "mfu": 0.40},
        {"precision": "bf16", "tokens_per_second": 100, "mfu": 0.4499, "faster_than_bf16": 1.0},
        {"precision": "tensorwise", "tokens_per_second": 120, "mfu": 0.3, "faster_than_bf16": 1.2},
        {"precision": "delayed", "tokens_per_second": 119, "mfu": 0.3, "faster_than_bf16": 1.19},
        {"precision": "blockwise", "not_run": "out of memory"},
    ]
    (tmp_path / "update_7b-layers.json").write_text(json.dumps({"rows": rows}))
    verdicts = [row.verdict for row in gpu_items.update_7b("update", "", tmp_path)]
    assert verdicts == ["-", "missed", "met", "missed", "not run: out of memory"]
    cpu = REPO / "tools/benchmarks/results/logprob.json"  # what the tool really writes
    (tmp_path / "logprob_cuda_logits.json").write_text(cpu.read_text())
    found = gpu_items.logprob_logits("log-probs", "", tmp_path)
    assert len(found) == 4 and {row.verdict for row in found} == {"missed"}
    said = gpu_items.tests("t", "....s\n4 passed, 1 skipped in 3.2s", tmp_path)[0]
    assert (said.result, said.verdict) == ("4 passed, 1 skipped", "met")
    assert gpu_items.tests("t", "7 skipped in 3.2s", tmp_path)[0].verdict.startswith("not run")


def test_what_an_update_was_seen_to_do_is_judged_part_by_part(tool, tmp_path):
    """A part that could not be had hides no other."""
    import gpu_items

    def verdicts(**changes):
        found = {
            "attention": {"backends": ["FusedAttention (sub-backend 1)"]},
            "waits": {"update": 3, "micro_batches": 4, "each": 0.0, "lines": [["optimizer.py:1", 3]]},
            "memory": {"peak": 12 << 30, "planned": 10 << 30},
            "trace": {"seconds": 1.0, "busy": 0.9, "longest": [["gemm", 0.2]], "bytes": (16 << 20) - 1},
        }
        return [row.verdict for row in gpu_items.looked_at("u", f"more\n{json.dumps(found | changes)}", tmp_path)]

    assert verdicts() == ["met"] * 4
    bad = {
        "attention": {"backends": ["FusedAttention (sub-backend 1)", "UnfusedDotProductAttention"]},
        "waits": {"update": 7, "micro_batches": 4, "each": 1.0, "lines": []},
        "memory": {"peak": (12 << 30) + 1, "planned": 10 << 30},
        "trace": {"seconds": 1.0, "busy": 0.9, "longest": [], "bytes": 16 << 20},
    }
    assert verdicts(**bad) == ["missed"] * 4
    assert verdicts(attention={"backends": []})[0] == "missed"
    assert verdicts(memory={"error": "no luck"}) == ["met", "met", "failed: no luck", "met"]


def test_a_run_that_skips_updates_has_failed(tool, tmp_path):
    import gpu_items

    def verdict(*steps):
        given = [{"loss/policy": loss, "policy/skipped_updates": skipped} for loss, skipped in steps]
        return gpu_items.short_run("run", json.dumps(given), tmp_path)[0].verdict.split(":")[0]

    assert verdict(*[(1.0, 0)] * 4) == "met"
    assert verdict(*[(1.0, 0)] * 3) == verdict(*[(1.0, 0)] * 3, (float("nan"), 0)) == "failed"
    assert verdict((1.0, 1), *[(1.0, 0)] * 3) == "failed"


def test_a_program_that_is_not_there_is_named(check, item):
    made = check()
    made.do(item("memcheck", "echo", program="no-such-sanitizer"))
    assert made.done["memcheck"]["rows"][0].verdict == "not run: no-such-sanitizer is not on the PATH"
