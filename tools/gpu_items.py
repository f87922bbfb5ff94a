"""What tools/gpu_check.sh does: by stage the commands, what each needs, its goal, and how its result is read."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class Row(NamedTuple):
    """A line of the table."""

    item: str
    result: str
    goal: str
    verdict: str  # met | missed | - (no goal) | failed: why | not run: why


class Item(NamedTuple):
    """A command, run from the repository's root. {results} and {state} in it are folders, {python} the interpreter."""

    stage: str
    name: str
    command: str
    rows: Callable[[str, str, Path], list[Row]]  # of its name, what it printed, and the folder of results
    file: str = ""  # of the repository, that must be there
    engine: bool = False  # needs Transformer Engine
    gpus: int = 1
    program: str = ""  # that must be there, and runs the command
    small: str = ""  # what --rehearse adds to the command, or
    instead: str = ""  # runs in its place


def judged(met: bool) -> str:
    return "met" if met else "missed"


def last_line(name: str, output: str, results: Path) -> list[Row]:
    """Of a command that fails where something is wrong."""
    return [Row(name, output.strip().splitlines()[-1].strip(), "it works", "met")]


def tests(name: str, output: str, results: Path) -> list[Row]:
    """pytest's own count. What was skipped was not run, and is counted."""
    counts = {word: int(n) for n, word in re.findall(r"(\d+) (passed|skipped)", output[-400:])}
    found = ", ".join(f"{n} {word}" for word, n in counts.items())
    verdict = "met" if counts.get("passed") else "not run: every test was skipped (the log says why)"
    return [Row(name, found, "all pass", verdict)]


def short_run(name: str, output: str, results: Path) -> list[Row]:
    """tools/gpu_run.py prints the metrics of all steps."""
    steps = json.loads(output.strip().splitlines()[-1])
    losses = [step["loss/policy"] for step in steps]
    skipped = sum(step["policy/skipped_updates"] for step in steps)
    said = f"loss {losses[0]:.4g} -> {losses[-1]:.4g}"
    gate = [step["fp8/residual_diff"] for step in steps if "fp8/residual_diff" in step]
    said += f", FP8 - bf16 {max(gate):.2g} nats a token" if gate else ""
    good = len(steps) == 4 and all(map(math.isfinite, losses)) and not skipped
    wrong = f"failed: {len(steps)} steps, {skipped:g} updates skipped"
    return [Row(name, said, "4 finite updates", "met" if good else wrong)]


def measured(results: Path, file: str) -> list[dict[str, Any]]:
    return json.loads((results / file).read_text())["rows"]


def logprob_logits(name: str, output: str, results: Path) -> list[Row]:
    return _logprob(name, measured(results, "logprob_cuda_logits.json"), {"forward": 1.15, "forward+backward": 1.15})


def logprob_head(name: str, output: str, results: Path) -> list[Row]:
    return _logprob(name, measured(results, "logprob_cuda_head.json"), {"forward": 1.1})


def quick(what: str, limit: float) -> Callable[[str, str, Path], list[Row]]:
    """Without memory and without others' packages; the file says which of the two tables it is."""
    file = {"logits": "logprob_cuda_quick.json", "head": "logprob_cuda_head_quick.json"}[what]
    limits = {"forward": limit, "forward+backward": limit} if what == "logits" else {"forward": limit}
    return lambda name, output, results: _logprob(name, measured(results, file), limits)


def _logprob(name: str, rows: list[dict[str, Any]], limits: dict[str, float]) -> list[Row]:
    """Our kernels (provider "native") against the machine's floor; `limits` are the most times of it, by pass."""
    found = []
    for row in rows:
        if row["provider"] != "native":
            continue
        limit, place = limits.get(row["pass"]), f"{name}, {row['dtype']} {row['pass']}"
        goal = "" if limit is None else f"<= {limit:g}x the floor"
        if row.get("void"):
            found.append(Row(place, "", goal, f"failed: wrong results: {row['void']}"))
            continue
        result = f"{row['seconds'] * 1e3:.3f} ms, {row['times_floor']:.2f}x the floor"
        found.append(Row(place, result, goal, "-" if limit is None else judged(row["times_floor"] <= limit)))
    return found or [Row(name, "", "", "not run: the kernels could not run (the log says why)")]


def noise(name: str, output: str, results: Path) -> list[Row]:
    return [Row(name, f"{len(measured(results, 'logprob_cuda_noise.json'))} rows written", "", "-")]


def update_7b(name: str, output: str, results: Path) -> list[Row]:
    return [_update(name, row, GOALS.get(row["precision"])) for row in measured(results, "update_7b-layers.json")]


def update_whole(name: str, output: str, results: Path) -> list[Row]:
    return [_update(name, row, None) for row in measured(results, "update_1.5b.json")]


FASTER = (">= 1.2x bf16", "faster_than_bf16", 1.2)
GOALS = {
    "bf16": ("MFU >= 45%", "mfu", 0.45),
    "delayed": FASTER,
    "tensorwise": FASTER,
    "blockwise": FASTER,
}


def _update(name: str, row: dict[str, Any], wanted: tuple[str, str, float] | None) -> Row:
    name, goal = f"{name}, {row['precision']}", wanted[0] if wanted else ""
    if "not_run" in row:
        return Row(name, "", goal, f"not run: {row['not_run']}")
    result = f"{row['tokens_per_second']:,.0f} tokens/s"
    result += f", MFU {row['mfu']:.1%}" if row["mfu"] is not None else ", the peak of this GPU is not known"
    result += f", {row['faster_than_bf16']:.2f}x bf16" if "faster_than_bf16" in row else ""
    if wanted is None:
        return Row(name, result, goal, "-")
    value = row.get(wanted[1])
    if value is None:
        return Row(name, result, goal, "not judged: nothing to compare it with")
    return Row(name, result, goal, judged(value >= wanted[2]))


def looked_at(name: str, output: str, results: Path) -> list[Row]:
    """tools/gpu_update.py prints what it found of each part, or what kept it from that."""
    found = json.loads(output.strip().splitlines()[-1])
    read = {"attention": _attention, "waits": _waits, "memory": _memory, "trace": _trace}
    rows = []
    for part, row in read.items():
        if error := found[part].get("error"):
            rows.append(Row(f"{name}, {part}", "", "", f"failed: {error}"))
        else:
            rows.append(Row(f"{name}, {part}", *row(found[part])))
    return rows


def _attention(found: dict[str, Any]) -> tuple[str, str, str]:
    names = found["backends"]
    fused = bool(names) and all("Unfused" not in name for name in names)
    return ", ".join(names) or "it named none", "not the unfused one", judged(fused)


def _waits(found: dict[str, Any]) -> tuple[str, str, str]:
    lines = ", ".join(f"{line} x{n}" for line, n in found["lines"])
    said = f"{found['update']} in an update of {found['micro_batches']} micro-batches" + (f": {lines}" if lines else "")
    return said, "0 a micro-batch", judged(found["each"] <= 0)


def _memory(found: dict[str, Any]) -> tuple[str, str, str]:
    peak, planned = found["peak"], found["planned"]
    said = f"{peak / 2**30:.1f} GiB at the peak, {planned / 2**30:.1f} planned"
    return said, "<= 1.2x the plan", judged(peak <= 1.2 * planned)


def _trace(found: dict[str, Any]) -> tuple[str, str, str]:
    longest = ", ".join(f"{name} {seconds * 1e3:.1f} ms" for name, seconds in found["longest"][:2])
    said = f"GPU busy {found['busy']:.0%} of {found['seconds']:.2f} s" + (f"; {longest}" if longest else "")
    return said, "a trace of < 16 MiB", judged(found["bytes"] < 16 << 20)


PYTEST = "{python} -m pytest -q -rs -p no:cacheprovider"
LOGPROB = "{python} tools/benchmarks/logprob.py --device cuda"
QUICK = f"{LOGPROB} --no-memory --rounds 8 --providers native torch.eager"
RUN = "{python} tools/gpu_run.py {state}/runs"
UPDATE = "{python} tools/benchmarks/update.py"
LOCAL, TE = "model.dtype=bf16 model.spec=local", "model.dtype=bf16 model.spec=te"
WHOLE = "--shape 1.5b --precision bf16-local bf16 tensorwise"
CUT, ALL = "--shape 7b-layers --precision", "bf16-local bf16 delayed tensorwise blockwise"
TE_TESTS, LAYOUTS = "tests/model/test_te_cuda.py", "tests/distributed/test_layouts.py"
TE_WORKS = """{python} -c "
import torch, transformer_engine, transformer_engine.pytorch as te
layer = te.Linear(64, 64, params_dtype=torch.bfloat16).cuda()
layer(torch.randn(32, 64, dtype=torch.bfloat16, device='cuda')).sum().backward()
assert layer.weight.grad.isfinite().all()
print(transformer_engine.__version__, 'FP8', te.is_fp8_available(return_reason=True))" """
CUDA_LIBRARY = """{python} -c "
import flowrl_mega.ops.build as build
print('built for', *(build.library(kind).stem.split('-')[0] for kind in ('cpu', 'cuda')))" """
COMPILED = "{python} -m flowrl_mega.ops --check-cuda {state}/cuda"
LOOK = "NVTE_DEBUG=1 NVTE_DEBUG_LEVEL=2 {python} tools/gpu_update.py {results}/update_trace.json.gz"
# Of each kernel and type a size or two. Torch's allocator would hide from the sanitizer where a tensor ends.
MEMCHECK = "compute-sanitizer --tool memcheck --error-exitcode 9 --target-processes all"
SANITIZED = (
    f"{PYTEST} tests/ops/test_cuda.py -k 'in_float64 and (fp32-33 or bf16-33 or fp16-33 or bf16-4104) or "
    "have_gradients and bf16-1024 or never_read'"
)
TINY = "--shape tiny --sequences 4 --prompt 8 --response 25 --microbatch-tokens 64"
FEW = "--device cpu --tokens 16 --rounds 2"
FEW_LOGITS, FEW_OF_HEAD = f"{FEW} --vocab 1000", f"{FEW} --vocab 1000 --hidden 64"

# In the order of what is learnt a second: the project's own kernels, then Transformer Engine, speed of whole updates,
# and last what takes minutes or more GPUs.
ITEMS = [
    Item("first", "csrc for CUDA", CUDA_LIBRARY.strip(), last_line, instead=COMPILED),
    Item("first", "csrc's kernels", f"{PYTEST} tests/ops/test_cuda.py", tests),
    Item(
        "first",
        "log-probs, quick",
        f"{QUICK} --json {{results}}/logprob_cuda_quick.json",
        quick("logits", 1.15),
        small=FEW_LOGITS,
    ),
    Item(
        "first",
        "log-probs, head, quick",
        f"{QUICK} --head --json {{results}}/logprob_cuda_head_quick.json",
        quick("head", 1.1),
        small=FEW_OF_HEAD,
    ),
    Item(
        "first",
        "CUDA IPC",
        f"{PYTEST} tests/rollout/sglang/test_transfers.py -k another_process_opens_the_memory",
        tests,
    ),
    Item("first", "FlowRL run, local", f"{RUN}/local {LOCAL}", short_run),
    Item("engine", "Transformer Engine", TE_WORKS.strip(), last_line, engine=True),
    Item("engine", "FlowRL run, te", f"{RUN}/te {TE}", short_run, engine=True),
    *(
        Item("engine", f"FlowRL run, {fp8}", f"{RUN}/{fp8} {TE} model.fp8={fp8}", short_run, engine=True)
        for fp8 in ("tensorwise", "blockwise", "delayed")
    ),
    Item(
        "engine",
        "te against local, FP8 gate",
        f"{PYTEST} {TE_TESTS}",
        tests,
        file=TE_TESTS,
        engine=True,
        small="-m 'not integration'",
    ),
    Item("bench", "update, looked at", LOOK, looked_at, engine=True, small=TINY),
    Item(
        "bench",
        "update, 7b-layers",
        f"{UPDATE} {CUT} bf16 tensorwise --json {{results}}/update_7b-layers.json",
        update_7b,
        engine=True,
        small=f"{TINY} --rounds 1",
    ),
    Item(
        "bench",
        "memcheck of csrc's kernels",
        f"PYTORCH_NO_CUDA_MEMORY_CACHING=1 {MEMCHECK} {SANITIZED}",
        tests,
        program="compute-sanitizer",
        instead=SANITIZED,
    ),
    Item(
        "more",
        "layouts, also cp",
        f"{PYTEST} {LAYOUTS}",
        tests,
        file=LAYOUTS,
        engine=True,
        gpus=4,
        small="-k recorded_steps",
    ),
    Item(
        "more",
        "log-probs, logits",
        f"{LOGPROB} --json {{results}}/logprob_cuda_logits.json",
        logprob_logits,
        small=f"{FEW_LOGITS} --no-memory --providers native torch.eager",
    ),
    Item(
        "more",
        "log-probs, head",
        f"{LOGPROB} --head --json {{results}}/logprob_cuda_head.json",
        logprob_head,
        small=f"{FEW_OF_HEAD} --no-memory --providers native torch.eager",
    ),
    Item(
        "more",
        "log-probs, noise",
        f"{LOGPROB} --noise --json {{results}}/logprob_cuda_noise.json",
        noise,
        small=FEW_OF_HEAD,
    ),
    Item(
        "more",
        "update, all precisions",
        f"{UPDATE} {CUT} {ALL} --json {{results}}/update_7b-layers.json",
        update_7b,
        small=f"{TINY} --rounds 1 --precision bf16 blockwise",
    ),
    Item(
        "more",
        "update, 1.5b",
        f"{UPDATE} {WHOLE} --json {{results}}/update_1.5b.json",
        update_whole,
        small=f"{TINY} --rounds 1 --precision bf16",
    ),
]
STAGES = ("first", "engine", "bench", "more")
