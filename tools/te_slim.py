"""A wheel with CUDA libraries, made small enough to be carried: device code for one GPU architecture, and LZMA.

    python tools/te_slim.py WHEEL FOLDER [--arch 90]

Transformer Engine's core wheel holds machine code for half a dozen architectures. What the chosen one cannot run is
taken out of each fat binary of its libraries, and zeros fill the room, so that nothing else of the file moves: it is as
if it had been compiled for the one. The wheel is written with the zip format's LZMA, which pip unpacks like any other.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import mmap
import struct
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

FATBIN_MAGIC = struct.pack("<I", 0xBA55ED50)
FATBIN_SECTIONS = (".nv_fatbin", "__nv_relfatbin")
PTX = 1  # kind of an entry; 2 is machine code


class Entry(NamedTuple):
    """One piece of device code in a fat binary, its header included; offsets count from the file's start."""

    kind: int
    arch: int
    start: int
    end: int


class FatBinary(NamedTuple):
    start: int  # of its header, which holds at 8 the size of all entries together
    entries: list[Entry]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Write a CUDA wheel again with the device code of one architecture.")
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path, help="where the small wheel is written")
    parser.add_argument("--arch", type=int, default=90, help="compute capability without its point")
    return parser


def main() -> None:
    options = parser().parse_args()
    slim = slim_wheel(options.wheel, options.folder, options.arch)
    print(f"{slim}: {slim.stat().st_size / 2**20:.1f} MiB of {options.wheel.stat().st_size / 2**20:.1f} MiB")


def slim_name(wheel: str, arch: int) -> str:
    """The wheel's file name with a build tag that says what was done to it."""
    name, version, *tags = wheel.split("-")
    return "-".join([name, version, f"0sm{arch}", *tags])


def slim_wheel(wheel: Path, folder: Path, arch: int) -> Path:
    """Write the slimmed copy of `wheel` into the folder; its path. A copy that is not finished has another name."""
    target = folder / slim_name(wheel.name, arch)
    part = target.with_suffix(".part")
    with zipfile.ZipFile(wheel) as source, zipfile.ZipFile(part, "w", zipfile.ZIP_LZMA) as made:
        changed: dict[str, bytes] = {}
        for item in source.infolist():
            content = source.read(item)
            if item.filename.endswith(".so"):
                content = changed[item.filename] = slim_library(content, arch)
            elif item.filename.endswith(".dist-info/RECORD"):  # the last file of a wheel
                content = _record(content, changed)
            item.compress_type = zipfile.ZIP_LZMA
            made.writestr(item, content)
    return part.rename(target)


def _record(text: bytes, changed: dict[str, bytes]) -> bytes:
    """The wheel's list of files with the hashes and sizes of those that changed."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for name, *rest in csv.reader(io.StringIO(text.decode())):
        if name in changed:
            digest = base64.urlsafe_b64encode(hashlib.sha256(changed[name]).digest()).rstrip(b"=").decode()
            rest = [f"sha256={digest}", str(len(changed[name]))]
        writer.writerow([name, *rest])
    return out.getvalue().encode()


def slim_library(library: bytes, arch: int) -> bytes:
    """The ELF library with only the device code that a GPU of this architecture would run.

    A fat binary with none at all stays as it is.
    """
    with tempfile.TemporaryFile() as file:  # hundreds of megabytes: one copy in memory is enough
        file.write(library)
        file.flush()
        with mmap.mmap(file.fileno(), 0) as data:
            for found in list(fat_binaries(data)):
                if kept := runs_on(found.entries, arch):
                    _rewrite(data, found, kept)
            return data[:]


def _rewrite(data: mmap.mmap, found: FatBinary, kept: list[Entry]) -> None:
    """Move the kept entries together behind the header, and leave zeros in the place of the others."""
    first, end = found.entries[0].start, found.entries[-1].end
    code = b"".join(data[entry.start : entry.end] for entry in kept)
    data[first:end] = code.ljust(end - first, b"\0")
    struct.pack_into("<Q", data, found.start + 8, len(code))


def runs_on(entries: list[Entry], arch: int) -> list[Entry]:
    """What the driver chooses from on this architecture: its machine code, else the newest PTX that is not newer."""
    own = [entry for entry in entries if entry.arch == arch]
    if any(entry.kind != PTX for entry in own):
        return own
    older = [entry for entry in entries if entry.kind == PTX and entry.arch <= arch]
    newest = max((entry.arch for entry in older), default=None)
    return [entry for entry in older if entry.arch == newest]


def fat_binaries(data: mmap.mmap | bytes) -> Iterator[FatBinary]:
    """Those of an ELF64 file.

    A header is magic, version, header size, size of all entries (u32 u16 u16 u64); an entry begins with kind, version,
    header size, size (u16 u16 u32 u64), and has its architecture as a u32 at 28.
    """
    for start, end in _sections(data):
        place = data.find(FATBIN_MAGIC, start, end)
        while place >= 0:
            header, size = struct.unpack_from("<HQ", data, place + 6)
            at, last, entries = place + header, place + header + size, []
            while at < last:
                kind, _, own, size = struct.unpack_from("<HHIQ", data, at)
                (arch,) = struct.unpack_from("<I", data, at + 28)
                entries.append(Entry(kind, arch, at, at + own + size))
                at = entries[-1].end
            yield FatBinary(place, entries)
            place = data.find(FATBIN_MAGIC, last, end)


def _sections(data: mmap.mmap | bytes) -> Iterator[tuple[int, int]]:
    """Start and end of the sections that hold device code."""
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count, names = struct.unpack_from("<HHH", data, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", data, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in headers:
        at = headers[names][4] + name
        if data[at : data.find(b"\0", at)].decode() in FATBIN_SECTIONS:
            yield offset, offset + length


if __name__ == "__main__":
    main()
