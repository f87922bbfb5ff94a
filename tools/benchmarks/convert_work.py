"""One conversion in a process of its own, for convert.py: `convert_work.py PROVIDER DIRECTION SOURCE TARGET OUT`.

It imports what its work needs and nothing else: what the benchmark had imported would be missing in the memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from resident_memory import resident_growth, status_bytes

Work = Callable[[Path, Path], None]


def main() -> None:
    options = parser().parse_args()
    source, target = options.source, options.target
    work = LOADERS[options.provider](options.direction)
    seconds = 0.0

    def timed() -> None:
        nonlocal seconds
        start = time.perf_counter()
        work(source, target)
        flush(target)
        seconds = time.perf_counter() - start

    before = status_bytes("RssAnon")
    peak = resident_growth(timed)
    options.out.write_text(json.dumps({"seconds": seconds, "peak_bytes": peak, "anonymous_before": before}))


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One conversion in a process of its own, for convert.py.")
    parser.add_argument("provider", choices=LOADERS)
    parser.add_argument("direction", choices=("copy", "hf2mcore", "mcore2hf"))
    parser.add_argument("source", type=Path, help="folder to be converted")
    parser.add_argument("target", type=Path, help="folder to be made")
    parser.add_argument("out", type=Path, help="JSON file for seconds and memory")
    return parser


def flush(folder: Path) -> None:
    """Return when every file in this folder is on the disk."""
    for file in folder.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.close(descriptor)


def copy(source: Path, target: Path) -> None:
    target.mkdir()
    for file in source.iterdir():
        shutil.copyfile(file, target / file.name)


def ours(direction: str) -> Work:
    from flowrl_mega.checkpoint import convert

    return {"hf2mcore": convert.hf_to_megatron, "mcore2hf": convert.megatron_to_hf}[direction]


def mbridge(direction: str) -> Work:
    import convert_mbridge

    convert_mbridge.start()
    return {"hf2mcore": convert_mbridge.hf_to_megatron, "mcore2hf": convert_mbridge.megatron_to_hf}[direction]


LOADERS: dict[str, Callable[[str], Work]] = {"copy": lambda direction: copy, "flowrl-mega": ours, "mbridge": mbridge}

if __name__ == "__main__":
    main()
