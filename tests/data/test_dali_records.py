"""The copy of a store that DALI reads: a tar file like any other, written once and whole."""

import os
import subprocess
import sys
import tarfile

import numpy as np
import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.data import dali_records
from flowrl_mega.data.dali_records import NO_IMAGE, records_of
from flowrl_mega.data.store import MappedStore, new_store
from flowrl_mega.data.tokenizer import char_tokenizer

IMAGES = [b"first", b"", b"x" * 512, b"last"]


@pytest.fixture
def store(tmp_path):
    with new_store(tmp_path / "store", char_tokenizer("ab")) as writer:
        for i, image in enumerate(IMAGES):
            writer.add([2, 3] * (100 * i + 1), {"prompt": "ab", "answer": i}, image)
    return MappedStore(tmp_path / "store")


def test_the_tar_file_holds_the_store(store):
    """Read by Python's own tarfile; the spans are where it finds the contents."""
    made = records_of(store)
    with tarfile.open(made.tar) as tar:
        names = tar.getnames()
        contents = [tar.extractfile(member).read() for member in tar.getmembers()]
        offsets = [(member.offset_data, member.size) for member in tar.getmembers()]
    assert names == [f"{i:09d}.{part}" for i in range(4) for part in ("ids", "image")]
    assert made.spans.reshape(-1, 2).tolist() == [list(span) for span in offsets]
    for i, image in enumerate(IMAGES):
        ids = np.frombuffer(contents[2 * i], "<i4").tolist()
        assert ids == [i, int(bool(image)), *store.tokens(i).tolist()]
        assert contents[2 * i + 1] == (image or NO_IMAGE)


RANK = """
import sys, time
from flowrl_mega.data import dali_records
from flowrl_mega.data.store import MappedStore
write = dali_records._write
def slowly(store, folder):
    print("wrote", flush=True)
    time.sleep(1)
    write(store, folder)
dali_records._write = slowly
print(len(dali_records.records_of(MappedStore(sys.argv[1])).spans))
"""


@pytest.mark.slow
def test_of_several_processes_one_writes(store):
    """The ranks of a host all open the loader at once: the others wait, and all then read the same whole file."""
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(store.path)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    said = sorted(rank.communicate(timeout=120)[0].split() for rank in ranks)
    assert said == [["4"], ["4"], ["wrote", "4"]]
    assert not list(store.path.glob("*.partial"))


def test_a_write_that_fails_leaves_nothing(store, monkeypatch):
    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        records_of(store)
    assert not [path for path in store.path.iterdir() if path.is_dir()]
    monkeypatch.undo()
    assert len(records_of(store).spans) == 4


def test_a_store_that_cannot_be_written_to_has_its_records_in_the_cache(store, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    real = dali_records._writable
    monkeypatch.setattr(dali_records, "_writable", lambda folder: folder != store.path and real(folder))
    made = records_of(store)
    assert made.tar.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(dali_records, "_writable", lambda folder: False)
    assert records_of(store).tar == made.tar, "found again"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    with pytest.raises(ConfigError, match="cannot be written to .*loader=mmap"):
        records_of(store)


def test_damaged_records_are_refused(store):
    made = records_of(store)
    made.tar.write_bytes(made.tar.read_bytes()[:-600])
    with pytest.raises(ConfigError, match="damaged; remove the folder"):
        records_of(store)
