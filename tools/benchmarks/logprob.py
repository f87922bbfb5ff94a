"""Log-probs and entropy of drawn tokens: the ops of csrc against everyone else's, as one table.

    python tools/benchmarks/logprob.py [--device cpu|cuda] [--tokens 2048] [--vocab 32000] [--dtype fp32 bf16]
        [--rounds 20] [--threads N] [--providers NAME ...] [--json FILE]
    python tools/benchmarks/logprob.py --head ...     the whole lm-head, from hidden states
    python tools/benchmarks/logprob.py --noise ...    how far bf16 logits throw off a sum of log-probs

Every provider returns log-probs and entropy of the same rows, and after "forward+backward" the gradient of the logits.
They take turns in one process, after warm-up, on copies made off the clock; figures are medians. The floor is what this
machine needs to read the logits once, or to read them twice and write them once (--head: for its GEMMs alone). Memory
is the most that one call, in a fresh process, holds above its inputs. The error is the largest against float64, in
units of what csrc is allowed. A provider that is wrong is void: it is shown with what is wrong and gets no ratio.
"""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workload import machine, write

if TYPE_CHECKING:  # torch is imported once the number of threads is set
    from logprob_oracle import Error
    from measure import Case, Setting

PACKAGES = (
    "torch", "megatron-core", "triton", "transformer-engine", "liger-kernel", "cut-cross-entropy", "quack-kernels",
    "verl", "flash-attn",
)  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    options = parser().parse_args(argv)
    options.threads = options.threads or os.cpu_count() or 1
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    import torch

    torch.set_num_threads(options.threads)
    extra: dict[str, Any] = {}
    if options.noise:
        import logprob_noise

        rows = logprob_noise.measure(options)
    elif options.memory_of:
        measure_memory(options)
        return
    else:
        rows, extra = compare(options, argv)
    header = machine(*installed()) | {"threads": options.threads, "device": options.device} | extra
    write(options.json, header, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Log-probs and entropy of drawn tokens, provider by provider.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--tokens", type=int, help="2048; --head on cuda 8192; --noise 8192")
    parser.add_argument("--vocab", type=int, help="32000; --head 49152, on cuda 131072; --noise 8192")
    parser.add_argument("--hidden", type=int, help="--head and --noise: 576; --head on cuda 4096")
    parser.add_argument(
        "--dtype", nargs="+", choices=["fp32", "bf16"], help="fp32 and bf16; --head: fp32, on cuda bf16"
    )
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--threads", type=int, help="all cores")
    parser.add_argument("--providers", nargs="+", help="only these (the name before a / is enough)")
    parser.add_argument("--head", action="store_true", help="the whole lm-head, from hidden states")
    parser.add_argument("--budget-mb", type=int, default=256, help="--head: memory for logits kept for the backward")
    parser.add_argument("--noise", action="store_true", help="the error of a sum of log-probs, bf16 and fp32 logits")
    parser.add_argument("--no-memory", action="store_true", help="leave out what takes a process a figure")
    parser.add_argument("--json")
    for internal in ("--memory-of", "--pass", "--out"):
        parser.add_argument(internal, help=argparse.SUPPRESS)
    return parser


def setting(options: argparse.Namespace, dtype: str) -> Setting:
    if options.head:
        import logprob_head

        return logprob_head.setting(options, dtype)
    import logprob_logits

    return logprob_logits.setting(options, dtype)


def measure_memory(options: argparse.Namespace) -> None:
    """In the process that `memory_of` started."""
    from measure import peak_extra_bytes, step

    chosen = setting(options, options.dtype[0])
    provider = chosen.providers[options.memory_of](options.device)
    bytes_ = peak_extra_bytes(lambda case: step(provider, case, getattr(options, "pass")), chosen.case)
    Path(options.out).write_text(json.dumps(bytes_))


def compare(options: argparse.Namespace, argv: list[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    from measure import PASSES

    rows: list[dict[str, Any]] = []
    not_run: dict[str, str] = {}
    for dtype in options.dtype or default_dtypes(options):
        chosen = setting(options, dtype)
        loaded = load(chosen, options, not_run)
        for pass_ in PASSES:
            table = measure(chosen, loaded, pass_, options.rounds, not_run)
            for row in table:
                if row["provider"] != "floor" and not options.no_memory:
                    row["peak_extra_bytes"] = memory(row, argv, dtype)
            show(chosen, pass_, table, not_run)
            rows += table
    return rows, {"not_run": not_run}


def default_dtypes(options: argparse.Namespace) -> list[str]:
    if not options.head:
        return ["fp32", "bf16"]
    return ["bf16" if options.device == "cuda" else "fp32"]


def load(chosen: Setting, options: argparse.Namespace, not_run: dict[str, str]) -> dict[str, Any]:
    """The providers that can run here; why the others cannot goes to `not_run`."""
    from measure import NotRun

    known = groups(list(chosen.providers))
    wanted = options.providers or list(known)
    if strange := set(wanted) - known.keys() - chosen.providers.keys():
        sys.exit(f"no such provider: {', '.join(sorted(strange))}; there are {', '.join(known)}")
    loaded = {}
    for name, loader in chosen.providers.items():
        if name not in wanted and name.split("/")[0] not in wanted:
            continue
        try:
            loaded[name] = loader(options.device)
        except NotRun as reason:
            not_run[name] = str(reason)
        except Exception as error:  # someone else's package: whatever it is, the others go on
            not_run[name] = one_line(error)
    return loaded


def measure(
    chosen: Setting, loaded: dict[str, Any], pass_: str, rounds: int, not_run: dict[str, str]
) -> list[dict[str, Any]]:
    """One table, without memory: the floor's row, then each provider's."""
    from logprob_oracle import wrong
    from measure import interleaved

    works, errors = warm_up(chosen, loaded, pass_, not_run)
    floor_works = chosen.floor(pass_)
    for work in floor_works.values():
        work(chosen.case.fresh())
    seconds = interleaved(works | floor_works, chosen.case, rounds)
    common = chosen.shape | {"pass": pass_, "rounds": rounds}
    table = [common | floor_row(chosen, pass_, {name: seconds[name] for name in floor_works})]
    voids = {name: wrong(name, errors[name]) for name in works}
    for provider, names in groups(list(works)).items():
        best = min(names, key=lambda name: (voids[name] is not None, seconds[name]))
        row = common | {"provider": provider, "seconds": seconds[best], "peak_extra_bytes": None, "runs_as": best}
        row |= {"void": voids[best], "errors": {output: error._asdict() for output, error in errors[best].items()}}
        if len(names) > 1:
            row["formulations"] = {name: {"seconds": seconds[name], "void": voids[name]} for name in names}
        table.append(row)
    add_ratios(table)
    return table


def warm_up(
    chosen: Setting, loaded: dict[str, Any], pass_: str, not_run: dict[str, str]
) -> tuple[dict[str, Callable[[Case], Any]], dict[str, dict[str, Error]]]:
    """Two calls of each provider, the first one compared with the oracle. Who fails goes to `not_run`."""
    from measure import step

    works: dict[str, Callable[[Case], Any]] = {}
    errors: dict[str, dict[str, Error]] = {}
    for name, provider in loaded.items():
        work = functools.partial(step, provider, pass_=pass_)
        try:
            errors[name] = chosen.errors(chosen.case, work(chosen.case.fresh()))
            work(chosen.case.fresh())
            works[name] = work
        except Exception as error:
            not_run[name] = f"{chosen.shape['dtype']} {pass_}: {one_line(error)}"
    return works, errors


def floor_row(chosen: Setting, pass_: str, parts: dict[str, float]) -> dict[str, Any]:
    seconds = chosen.floor_seconds(pass_, parts)
    amount, unit = chosen.floor_work
    rate = amount * (1 if pass_ == "forward" else 3) / seconds
    row = {"provider": "floor", "seconds": seconds, "peak_extra_bytes": 0, "floor_parts": parts}
    return row | {"floor_rate": rate, "floor_unit": f"{unit}/s"}


def groups(names: list[str]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name in names:
        grouped.setdefault(name.split("/")[0], []).append(name)
    return grouped


def add_ratios(table: list[dict[str, Any]]) -> None:
    """To the rows that are not void: times the floor, and how many times faster than torch's two."""
    seconds = {row["provider"]: row["seconds"] for row in table if not row.get("void")}
    for row in table:
        if row["provider"] in seconds:
            row["times_floor"] = row["seconds"] / seconds["floor"]
            for other in ("torch.eager", "torch.compile"):
                if other in seconds:
                    row[f"faster_than_{other}"] = seconds[other] / row["seconds"]


def memory(row: dict[str, Any], argv: list[str], dtype: str) -> int | None:
    from measure import memory_of

    what = ["--memory-of", row["runs_as"], "--pass", row["pass"], "--dtype", dtype]
    return memory_of(__file__, [*argv, *what])


def show(chosen: Setting, pass_: str, table: list[dict[str, Any]], not_run: dict[str, str]) -> None:
    print(f"\n{chosen.title}, {pass_}")
    print(
        f"{'provider':<24}{'ms':>10}{'x floor':>9}{'vs eager':>10}{'vs compile':>12}{'memory / logits':>17}{'error':>8}"
    )
    for row in table:
        ratios = [row.get(key) for key in ("times_floor", "faster_than_torch.eager", "faster_than_torch.compile")]
        share = None if row["peak_extra_bytes"] is None else row["peak_extra_bytes"] / row["logits_bytes"]
        error = max((e["allowance"] for e in row.get("errors", {}).values()), default=None)
        cells = (number(ratios[0], 9, "x"), number(ratios[1], 10, "x"), number(ratios[2], 12, "x"), number(share, 17))
        notes = [f"void: {row['void']}"] if row.get("void") else []
        notes += [row["runs_as"].partition("/")[2]] if "formulations" in row else []
        notes += [f"{row['floor_rate']:.2f} {row['floor_unit']}"] if "floor_rate" in row else []
        notes += ["no entropy"] if "errors" in row and "entropy" not in row["errors"] else []
        end = number(error, 9) + "  " + "; ".join(notes)
        print(f"{row['provider']:<24}{row['seconds'] * 1e3:>10.2f}{''.join(cells)}{end}".rstrip())
    for name, reason in not_run.items():
        print(f"{name:<24}  not run: {reason}")


def number(value: float | None, width: int, unit: str = "") -> str:
    return f"{'' if value is None else f'{value:.2f}{unit}':>{width}}"


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


def installed() -> list[str]:
    names = {distribution.metadata["Name"] for distribution in importlib.metadata.distributions()}
    return [name for name in PACKAGES if name in names]


if __name__ == "__main__":
    main()
