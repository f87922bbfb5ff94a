"""What tools/gpu_check.sh leaves to be taken home: few files, since few come back from a machine that is lent."""

from __future__ import annotations

import shutil
import tarfile
from collections.abc import Iterable
from pathlib import Path

MOST = 16 << 20  # bytes of a file
LIMITS = "8 files of 16 MiB"


def archive(out: Path, folders: Iterable[Path], since: float) -> list[str]:
    """Everything in the folders that was written since then, as one archive, but for what is compressed already, which
    lies beside it. Returns the names of what had to be left out, the largest first."""
    out.mkdir(parents=True, exist_ok=True)
    found = [file for folder in folders if folder.is_dir() for file in sorted(folder.glob("*")) if file.is_file()]
    found = [file for file in found if file.stat().st_mtime >= since]
    alone = [file for file in found if file.suffix == ".gz"]
    left_out = [file for file in alone if file.stat().st_size > MOST]
    for file in alone:
        if file not in left_out:
            shutil.copy(file, out)
    packed = sorted((file for file in found if file not in alone), key=lambda file: file.stat().st_size)
    part = out / "gpu_check.part"
    while pack(part, packed) > MOST:
        left_out.append(packed.pop())
    part.replace(out / "gpu_check.tar.gz")
    return [file.name for file in left_out]


def pack(target: Path, files: list[Path]) -> int:
    """Returns its size."""
    with tarfile.open(target, "w:gz") as made:
        for file in files:
            made.add(file, f"{file.parent.name}/{file.name}")
    return target.stat().st_size
