"""What tools/gpu_check.sh does: build, test and measure on an NVIDIA GPU, without network. See gpu_items.py for what.

Each stage ends within 9 minutes, or all of them within --budget. After each item the table is written anew, in RESULTS
and with --out there, too, beside an archive of results and logs: what is known is kept, whenever the machine goes away.
What was finished for the same sources, versions and GPU is not done again; what failed or had no time is. Packages go
into build/gpu/site, which comes before the interpreter's own; packages that the machine has are left alone. Logs lie in
build/gpu/logs. --rehearse does all of it on a machine without GPU, small and emulated (gpu_rehearsal.py).

Exit codes: 0 all was done, 1 something failed or missed its goal, 2 there is no GPU, 75 time ran out: run it again.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import gpu_out
from gpu_items import ITEMS, STAGES, Item, Row

REPO = Path(__file__).resolve().parent.parent
STAGE_S = 530  # of 9 minutes
LEAST_S = 20  # nothing is begun with less time than this
SHOWN_LINES = 15  # of what a failed item wrote
RESULTS = REPO / "tools" / "benchmarks" / "results"
NO_TIME = "not run: no time was left; run this again"
HEADERS = ("nvidia_cuda_crt", "nvidia_cuda_cccl")
FOR_ENGINE = ("transformer_engine", *HEADERS)  # wheels that are not installed with the others
# Of these the exact version counts; of all others whatever the machine has.
EXACT = ("megatron-core", "transformer-engine", "transformer-engine-cu13", "transformer-engine-torch")
PROBE = """
import importlib.metadata, json, torch
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
cuda = torch.cuda.is_available()
print(json.dumps({
    "torch": torch.__version__, "cuda": torch.version.cuda, "gpus": torch.cuda.device_count() if cuda else 0,
    "gpu": torch.cuda.get_device_name() if cuda else None, "cudnn": torch.backends.cudnn.version() if cuda else None,
    "capability": list(torch.cuda.get_device_capability()) if cuda else None,
    **{name: version(name) for name in ("megatron-core", "transformer-engine", "transformer-engine-torch")}}))
"""


def main() -> int:
    options = parser().parse_args()
    stages = STAGES if options.stage == "all" else (options.stage,)
    chosen = [item for item in ITEMS if item.stage in stages and item.name in (options.only or [item.name])]
    if options.list:
        for item in chosen:
            print(f"{item.stage:<6} {item.name:<28} {needs(item)}\n       {' '.join(item.command.split())}")
        return 0
    if options.rehearse:
        from gpu_rehearsal import rehearsal

        with rehearsal(options.results, options.out) as check:
            return go(check, options, stages, chosen)
    return go(Check(REPO / "build" / "gpu", options.results or RESULTS, options.out), options, stages, chosen)


def go(check: Check, options: argparse.Namespace, stages: tuple[str, ...], chosen: list[Item]) -> int:
    """The exit code."""
    found = check.probe()
    if not found.get("gpu"):
        said = f"torch {found['torch']} sees no NVIDIA GPU" if "torch" in found else found["error"]
        print(f"gpu_check: {said}; nothing was run (--list says what would be)", file=sys.stderr)
        return 2
    check.begin(options.budget or STAGE_S)
    check.show_machine()
    check.install(options.wheels)
    for stage in stages:
        if not options.budget:
            check.begin(STAGE_S)
        if stage == "engine":
            check.install_engine(options.wheels)
        check.probe()
        for item in chosen:
            if item.stage == stage:
                check.do(item)
                check.report(aloud=False)
    return check.report()


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="tools/gpu_check.sh", description="Build, test and measure on a GPU.")
    parser.add_argument("results", nargs="?", type=Path, help="a folder; tools/benchmarks/results")
    parser.add_argument("--wheels", type=Path, help="the folder that tools/gpu_wheels.sh filled")
    parser.add_argument("--stage", choices=[*STAGES, "all"], default="all")
    parser.add_argument("--budget", type=float, metavar="S", help="seconds for all of it; default: 530 for each stage")
    parser.add_argument("--out", type=Path, help="also put the table, and logs and results as an archive, in here")
    names = [item.name for item in ITEMS]
    parser.add_argument("--only", action="append", choices=names, metavar="ITEM", help="may be given several times")
    parser.add_argument("--list", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--rehearse", action="store_true", help="without a GPU: all of it, small and emulated")
    return parser


def needs(item: Item) -> str:
    wanted = ["a GPU" if item.gpus == 1 else f"{item.gpus} GPUs"]
    wanted += ["Transformer Engine"] if item.engine else []
    wanted += [item.program] if item.program else []
    return "needs " + ", ".join(wanted + ([item.file] if item.file else []))


class Check:
    """One run of the tool: what is known of the machine, what was done before, and the time that is left."""

    def __init__(self, state: Path, results: Path, out: Path | None = None) -> None:
        self.state, self.results, self.out = state.resolve(), results.resolve(), out
        self.site, self.logs = self.state / "site", self.state / "logs"
        self.library = REPO / "flowrl_mega" / "ops" / "lib"
        self.book = self.state / "state.json"
        self.done: dict[str, Any] = json.loads(self.book.read_text()) if self.book.is_file() else {}
        self.machine: dict[str, Any] = {}
        self.missing: list[Row] = []  # of the wheel folder
        self.end = self.whole = 0.0
        self.started = time.time()

    def begin(self, seconds: float) -> None:
        self.whole = seconds
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def probe(self) -> dict[str, Any]:
        """What torch says of the machine; `error` where there is no torch."""
        done = subprocess.run([sys.executable, "-c", PROBE], env=self.environment(), capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
            return {"error": f"{sys.executable} cannot import torch ({last})"}
        self.machine = json.loads(done.stdout.splitlines()[-1]) | {"python": platform.python_version()}
        return self.machine

    def environment(self) -> dict[str, str]:
        path = [str(self.site), str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
        programs = os.pathsep.join([os.environ["PATH"], "/usr/local/cuda/bin"])
        return os.environ | {"PATH": programs, "PYTHONPATH": os.pathsep.join(path), "PYTHONUNBUFFERED": "1"}

    def run(self, name: str, command: list[str] | str, extra: dict[str, str] | None = None) -> tuple[int, str]:
        """Exit code and all that was printed, which also goes to a log; 124 where the stage's time ran out.

        The command's own children end with it."""
        self.logs.mkdir(parents=True, exist_ok=True)
        log = self.logs / f"{re.sub('[^a-z0-9.]+', '-', name.lower())}.log"
        print(f"=== {name}  (log: {log})", flush=True)
        with log.open("w") as out:
            process = subprocess.Popen(
                command, shell=isinstance(command, str), stdout=out, stderr=subprocess.STDOUT, cwd=REPO,
                stdin=subprocess.DEVNULL, env=self.environment() | (extra or {}), start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(max(1.0, self.left()))
            except subprocess.TimeoutExpired:
                code = 124
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        return code, log.read_text(errors="replace")

    # --- packages

    def install(self, wheels: Path | None) -> None:
        """Into `site` what the machine lacks, but for Transformer Engine."""
        if wheels is None or not wheels.is_dir():
            why = "no --wheels FOLDER" if wheels is None else f"--wheels {wheels} is no folder"
            self.missing.append(Row("packages", "", "", f"not run: {why}; tools/gpu_wheels.sh fills one"))
            return
        for file in [*wheels.glob("*.so"), *wheels.glob("*.json")]:  # csrc, which is built if these do not fit
            self.library.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, self.library)
        packages = [wheel for wheel in sorted(wheels.glob("*.whl")) if not wheel.name.startswith(FOR_ENGINE)]
        self.put("packages", [wheel for wheel in packages if self.lacks(wheel)])

    def install_engine(self, wheels: Path | None) -> None:
        """Transformer Engine, its torch part compiled for the machine's: minutes, which come after csrc's own items."""
        if wheels is None or not wheels.is_dir():
            return  # as `install` has said
        engine = [*sorted(wheels.glob("transformer_engine*.whl")), *self.te_torch(wheels)]
        # Its wheels share a folder, which pip replaces as a whole: all at once, or none.
        if any(wheel.name.startswith("transformer_engine_torch") for wheel in engine) and any(map(self.lacks, engine)):
            self.put("Transformer Engine's wheels", engine)

    def put(self, name: str, wheels: list[Path]) -> None:
        if wheels:
            self.pip(name, ["install", "--target", str(self.site), "--upgrade", *map(str, wheels)])

    def lacks(self, file: Path) -> bool:
        """Whether what the file holds is not there, or is another version of what must be this one."""
        name, version = file.name.removesuffix(".tar.gz").split("-")[:2]
        name = name.replace("_", "-").lower()
        found = next((d.version for d in metadata.distributions(name=name, path=[str(self.site), *sys.path])), None)
        return found is None or (name in EXACT and found != version)

    def te_torch(self, wheels: Path) -> list[Path]:
        """Its torch part as a wheel, compiled here unless the folder has it compiled; put there, it need not be again.

        In a folder that stays, so that ninja goes on where a compilation was stopped.
        """
        sources = sorted(wheels.glob("transformer_engine_torch-*.tar.gz"))
        if not sources or list(wheels.glob("transformer_engine_torch-*.whl")):
            return []
        made = self.state / f"torch-{self.machine['torch']}"
        folder = made / sources[-1].name.removesuffix(".tar.gz")
        if not folder.is_dir():
            with tarfile.open(sources[-1]) as archive:
                archive.extractall(made, filter="data")
        if not list(made.glob("*.whl")):
            # The headers of CUDA, cuDNN and NCCL are where pip has put them, but for some that come with the wheels
            # and stay apart: Transformer Engine, as it runs, takes the first folder of CUDA headers for a whole one.
            # The expert-parallel part is of no use here.
            for wheel in [wheel for name in HEADERS for wheel in wheels.glob(f"{name}-*.whl")]:
                shutil.unpack_archive(wheel, made / "headers", "zip")
            roots = [made / "headers", *map(Path, sys.path)]
            headers = [str(path) for root in roots for path in root.glob("nvidia/*/include")]
            extra = {
                "NVTE_PYTORCH_FORCE_BUILD": "TRUE", "NVTE_WITH_NCCL_EP": "0", "MAX_JOBS": str(os.cpu_count() or 1),
                "CPATH": os.pathsep.join(filter(None, [os.environ.get("CPATH"), *headers])),
            }  # fmt: skip
            flags = ["wheel", "--no-build-isolation", "-w", str(made), str(folder)]
            self.pip("compiling Transformer Engine for this torch", flags, extra)
        return list(made.glob("*.whl"))

    def pip(self, name: str, arguments: list[str], extra: dict[str, str] | None = None) -> bool:
        first, *rest = arguments
        code, output = self.run(name, [sys.executable, "-m", "pip", first, "--no-index", "--no-deps", *rest], extra)
        if code:
            self.missing.append(Row(name, "", "", NO_TIME if code == 124 else f"failed: {last_line(output)}"))
        return code == 0

    # --- items

    def do(self, item: Item) -> None:
        """Run it, unless it is finished already or something that it needs is not there."""
        key, before = self.key(), self.done.get(item.name, {})
        if before.get("finished") and before["key"] == key:
            print(f"=== {item.name}: finished before, for the same sources and versions")
            return
        why, finished = self.obstacle(item), False
        rows = [Row(item.name, "", "", f"not run: {why}" if why else NO_TIME)]
        if not why and self.left() > LEAST_S:
            rows, finished = self.rows_of(item)
        self.done[item.name] = {"rows": rows, "finished": finished, "key": key, "date": date.today().isoformat()}
        self.state.mkdir(parents=True, exist_ok=True)
        part = self.book.with_suffix(".part")
        part.write_text(json.dumps(self.done, indent=1))
        part.replace(self.book)

    def obstacle(self, item: Item) -> str:
        if item.file and not (REPO / item.file).is_file():
            return f"{item.file} is not in these sources"
        if item.gpus > self.machine["gpus"]:
            return f"needs {item.gpus} GPUs, and there is {self.machine['gpus']}"
        if item.engine and not (self.machine["transformer-engine"] and self.machine["transformer-engine-torch"]):
            return "Transformer Engine is not installed, or its torch part is not built"
        if item.program and not shutil.which(item.program, path=self.environment()["PATH"]):
            return f"{item.program} is not on the PATH"
        return ""

    def command(self, item: Item) -> str:
        return item.command

    def extra(self, item: Item) -> dict[str, str]:
        """More of its environment."""
        return {}

    def judge(self, row: Row) -> Row:
        return row

    def rows_of(self, item: Item) -> tuple[list[Row], bool]:
        """What came of it, and whether that need not be done again."""
        self.results.mkdir(parents=True, exist_ok=True)
        places = {"python": sys.executable, "results": str(self.results), "state": str(self.state)}
        command = self.command(item).format(**{name: shlex.quote(path) for name, path in places.items()})
        given = self.left()
        began = time.monotonic()
        code, output = self.run(item.name, command, self.extra(item))
        took = f" ({time.monotonic() - began:.0f} s)"
        if code:
            shown = output.strip().splitlines()[-SHOWN_LINES:]
            print("\n".join(["    " + line[:300] for line in shown] + [f"    exit code {code}{took}"]), flush=True)
        if code == 124:
            whole = given > self.whole - LEAST_S
            return [Row(item.name, "", "", f"failed: not done in {given:.0f} s" if whole else NO_TIME)], False
        if code:
            return [Row(item.name, "", "", f"failed: {last_line(output)}")], False
        try:
            rows = [self.judge(row) for row in item.rows(item.name, output, self.results)]
        except Exception as error:  # a result that cannot be read must not hide those of the others
            return [Row(item.name, "", "", f"failed: its result cannot be read ({error!r})")], False
        print(f"    {'; '.join(f'{row.result}: {row.verdict}' for row in rows)}{took}"[:500], flush=True)
        return rows, not any(row.verdict.startswith(("failed", "not run")) for row in rows)

    def key(self) -> str:
        """Of the sources and of the machine."""
        digest = hashlib.sha256(json.dumps(self.machine, sort_keys=True).encode())
        for top in ("csrc", "flowrl_mega", "tests", "tools"):
            for file in sorted(REPO.joinpath(top).rglob("*.*")):
                if file.suffix in (".py", ".cu", ".cuh", ".cpp", ".h", ".sh") and file.is_file():
                    digest.update(f"{file.relative_to(REPO)}\0".encode() + file.read_bytes())
        return digest.hexdigest()

    def show_machine(self) -> None:
        """What a figure depends on, before anything can fail."""
        for name, command in {"nvidia-smi": "nvidia-smi", "pip list": f"{sys.executable} -m pip list"}.items():
            with contextlib.suppress(OSError):
                self.run(name, shlex.split(command))
        print(json.dumps(self.machine), flush=True)

    def report(self, aloud: bool = True) -> int:
        """The table, also as files; the exit code."""
        rows, key = list(self.missing), self.key()
        for item in ITEMS:
            found = self.done.get(item.name)
            if found and found["key"] == key:
                rows += [Row(*row) for row in found["rows"]]
            else:
                why = "its result is of other sources or versions" if found else "nobody asked for it"
                rows.append(Row(item.name, "", "", f"not run: {why}; it is in stage {item.stage}"))
        header = self.machine | {"date": date.today().isoformat(), "command": shlex.join(["python", *sys.argv])}
        self.results.mkdir(parents=True, exist_ok=True)
        content = {"machine": header, "rows": [row._asdict() for row in rows]}
        (self.results / "gpu_check.json").write_text(json.dumps(content, indent=1) + "\n")
        if self.out and (left_out := gpu_out.archive(self.out, (self.results, self.logs), self.started)):
            rows.append(Row("what comes back", f"all but {', '.join(left_out)}", gpu_out.LIMITS, "missed"))
        table = [f"{self.machine['gpu']}, torch {self.machine['torch']}, {header['date']}"]
        width = [max(len(row[i]) for row in [Row("item", "result", "goal", ""), *rows]) for i in range(3)]
        for row in [Row("item", "result", "goal", "goal met"), *rows]:
            table.append(" | ".join([*(cell.ljust(width[i]) for i, cell in enumerate(row[:3])), row.verdict]))
        if aloud:
            print("", *table, sep="\n")
        if self.out:
            (self.out / "gpu_check.txt").write_text("\n".join(table) + "\n")
        verdicts = [row.verdict for row in rows]
        if any(v.startswith(("failed", "missed")) for v in verdicts):
            return 1
        return 75 if NO_TIME in verdicts else 0


def last_line(output: str) -> str:
    return ([line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"])[-1][:200]


if __name__ == "__main__":
    import gpu_check  # by its name, under which gpu_rehearsal.py imports it, too

    sys.exit(gpu_check.main())
