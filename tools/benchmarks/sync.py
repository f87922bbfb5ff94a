"""Weights to a real SGLang server, each way there is, against a bare gloo broadcast of the same bytes, in turns.

    python tools/benchmarks/sync.py [--gigabytes 0.75] [--bucket-mb 256] [--rounds 5] [--server-python PATH]
        [--transfers NAME ...] [--folder DIR] [--json FILE]

A random bf16 Qwen2, a policy of one rank and a server on this machine. A round: `broadcast` is what two processes that
do nothing else take to broadcast buffers of the buckets' sizes, `with copies` the same where the sender first copies a
bucket together and the receiver takes it into new memory and copies it out, as SGLang does. The others are a whole
`WeightSync.push`, from the pause to the version that the server then says, without checksums. Each round begins with
the next. The figures are medians over the rounds; lowest and highest stand beside them. One push of each before the
first round is not counted: it makes the group, and what the server then holds is compared with what was sent.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from workload import machine, write

TRANSFERS = ("distributed", "tensor", "disk")
GOAL = 1.3  # seconds of distributed, at most, as a multiple of the broadcast's
SERVER = {"max_total_tokens": 1024, "mem_fraction_static": 0.3, "skip_server_warmup": True, "skip_tokenizer_init": True}


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    import torch  # seconds, so only after the arguments have been looked at
    from convert_model import make
    from sync_work import measure

    from flowrl_mega.config import RolloutSettings
    from flowrl_mega.rollout.sglang.fleet import Fleet

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="sync-") as name:
        folder = Path(name)
        make(folder / "model", int(options.gigabytes * 1e9), 1 << 40)
        settings = RolloutSettings(
            engine="sglang", python=options.server_python, server_args=SERVER, start_timeout_s=options.start_timeout
        )
        fleet = Fleet(settings, folder / "model", folder / "servers", "bf16", trainer_gpus=0)
        fleet.start()
        try:
            seconds, sizes = measure(options, folder, fleet.urls[0])
        finally:
            fleet.close()
    rows = summary(seconds, sum(sizes))
    show(rows)
    header = machine("torch", "megatron-core", "safetensors", "aiohttp") | {
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "bytes": sum(sizes),
        "buckets": len(sizes),
        "goal": {"distributed_of_broadcast": GOAL},
    }
    write(options.json, header, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Weights to a server against a bare broadcast of the same bytes.")
    parser.add_argument("--gigabytes", type=float, default=0.75, help="size of the model")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transfers", nargs="+", choices=TRANSFERS, default=TRANSFERS)
    parser.add_argument("--server-python", default=".venv-sglang/bin/python", help="interpreter that has sglang")
    parser.add_argument("--start-timeout", type=float, default=600, help="seconds for the server to be ready")
    parser.add_argument("--folder", help="a temporary folder is made here; needs three times the model's size")
    parser.add_argument("--json")
    return parser


def summary(seconds: dict[str, list[float]], size: int) -> list[dict[str, Any]]:
    rows = []
    bare = statistics.median(seconds["broadcast"])
    for name, of in seconds.items():
        median = statistics.median(of)
        row = {"transfer": name, "seconds": median, "lowest": min(of), "highest": max(of)}
        row |= {"gb_per_second": size / 1e9 / median, "of_broadcast": median / bare}
        if name == "distributed":
            row["goal_met"] = median / bare <= GOAL
        rows.append(row | {"samples": of})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<14}{'s':>8}{'lowest':>8}{'highest':>9}{'GB/s':>8}{'x broadcast':>13}")
    for row in rows:
        missed = f"  at most {GOAL:g} missed" if row.get("goal_met") is False else ""
        print(
            f"{row['transfer']:<14}{row['seconds']:>8.2f}{row['lowest']:>8.2f}{row['highest']:>9.2f}"
            f"{row['gb_per_second']:>8.2f}{row['of_broadcast']:>13.2f}{missed}"
        )


if __name__ == "__main__":
    main()
