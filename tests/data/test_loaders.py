"""Loaders: what is true of each of them, mmap and DALI in both its orders. DALI's part runs where it is installed."""

import importlib.metadata
import io
import json
import random
import signal
import subprocess
import sys
from functools import cache

import numpy as np
import pytest
from PIL import Image

from flowrl_mega.config import ConfigError, DataSettings
from flowrl_mega.data import dali
from flowrl_mega.data.loader import Subset
from flowrl_mega.data.loaders import open_loader
from flowrl_mega.data.prompts import tokenized
from flowrl_mega.data.store import MappedStore, new_store
from flowrl_mega.data.tokenizer import char_tokenizer

TOKENIZER = char_tokenizer("0123456789")
SETTINGS = {
    "mmap": DataSettings(),
    "index": DataSettings(loader="dali"),
    "reader": DataSettings(loader="dali", dali={"shuffle": "reader", "buffer": 16}),
}


def why_no_dali():
    try:
        dali.import_dali()
    except ConfigError as error:
        return str(error)


NEEDS_DALI = [pytest.mark.integration, pytest.mark.skipif(why_no_dali() is not None, reason=str(why_no_dali()))]


def needs_dali(test):
    for mark in NEEDS_DALI:
        test = mark(test)
    return test


KINDS = ["mmap", pytest.param("index", marks=NEEDS_DALI), pytest.param("reader", marks=NEEDS_DALI)]
DALI_KINDS = KINDS[1:]


def ids_of(i):
    return [2 + (i + j) % 10 for j in range(1 + i * 7 % 23)]


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Gives the store of so many ragged prompts."""

    @cache
    def make(size):
        path = tmp_path_factory.mktemp("stores") / "store"
        with new_store(path, TOKENIZER) as writer:
            for i in range(size):
                writer.add(ids_of(i), {"prompt": str(i), "answer": i})
        return MappedStore(path)

    return make


def opened(kind, prompts, seed=3, shard=0, shards=1):
    return open_loader(SETTINGS[kind], prompts, seed, shard, shards)


def share(kind, size, epoch, shard, shards):
    """How many prompts of an epoch a shard has: every shards-th of the stream; DALI cuts the store into parts."""
    if kind == "reader":
        part = (shard + epoch) % shards
        return size * (part + 1) // shards - size * part // shards
    return sum(position % shards == shard for position in range(epoch * size, (epoch + 1) * size))


def in_pieces(loader, count, rng, most=40):
    """The indices of the next `count`, asked for in calls of any size."""
    got = []
    while len(got) < count:
        got += [prompt.index for prompt in loader.next(min(rng.randint(0, most), count - len(got)))]
    return got


@pytest.mark.parametrize("shards", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 3, 23, 200])
@pytest.mark.parametrize("kind", KINDS)
def test_the_union_over_shards_is_each_epoch_once(kind, size, shards, store):
    """Uneven shards, stores smaller than one batch of DALI's, calls that do not end where epochs or batches do."""
    if kind == "reader" and size < shards:
        with pytest.raises(ConfigError, match=f"{size} prompts are too few for {shards}.*shuffle=index"):
            opened(kind, store(size), shards=shards)
        return
    rng, epochs = random.Random(size * shards), [[] for _ in range(4)]
    for shard in range(shards):
        loader = opened(kind, store(size), shard=shard, shards=shards)
        for number, epoch in enumerate(epochs):
            epoch += in_pieces(loader, share(kind, size, number, shard, shards), rng)
        loader.close()
    assert all(sorted(epoch) == list(range(size)) for epoch in epochs)
    if size > 3:
        assert len({tuple(epoch) for epoch in [range(size), *epochs]}) == 5, "shuffled, and not twice alike"


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_those_of_the_store(kind, store):
    for prompt in opened(kind, store(200)).next(300):
        assert prompt.token_ids == ids_of(prompt.index) and all(type(token) is int for token in prompt.token_ids)
        assert prompt.row == {"prompt": str(prompt.index), "answer": prompt.index} and prompt.image is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_subset_leaves_the_others_out(kind, store):
    """Held-out prompts are never read; `index` stays the store's."""
    kept = [i for i in range(200) if i % 5]
    shards = [opened(kind, Subset(store(200), kept), shard=shard, shards=2) for shard in range(2)]
    for _ in range(3):
        prompts = [prompt for loader in shards for prompt in loader.next(80)]
        assert sorted(prompt.index for prompt in prompts) == kept
        assert all(prompt.token_ids == ids_of(prompt.index) for prompt in prompts)


@pytest.mark.parametrize("trial", range(3))
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_stream_equals_an_uninterrupted_one(kind, trial, store):
    """Cut at random samples, mostly in the middle of a batch and more than once; the state goes through JSON."""
    rng = random.Random(trial)
    size, shards = rng.choice([23, 200]), rng.randint(1, 3)
    shard_args = {"shard": rng.randrange(shards), "shards": shards}
    whole = in_pieces(opened(kind, store(size), **shard_args), 1000, rng)
    got, loader = [], opened(kind, store(size), **shard_args)
    while len(got) < 1000:
        got += in_pieces(loader, min(rng.randint(0, 150), 1000 - len(got)), rng)
        state = json.loads(json.dumps(loader.state_dict()))
        in_pieces(loader, rng.randint(0, 100), rng)  # lost with the process
        loader.close()
        loader = opened(kind, store(size), **shard_args)
        loader.load_state_dict(state)
        assert loader.state_dict() == state
    assert got == whole


CHILD = """
import json, random, sys
from flowrl_mega.config import DataSettings
from flowrl_mega.data.loaders import open_loader
from flowrl_mega.data.store import MappedStore
loader = open_loader(DataSettings(**json.loads(sys.argv[1])), MappedStore(sys.argv[2]), 3, 1, 2)
while True:
    indices = [prompt.index for prompt in loader.next(random.randint(1, 30))]
    print(json.dumps([indices, loader.state_dict()]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_killed_process_is_continued(kind, store):
    """SIGKILL at a moment of its choosing: what the last state says comes next, in a process that knows no more."""
    settings = SETTINGS[kind].model_dump_json()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, settings, str(store(200).path)], stdout=subprocess.PIPE, text=True
    )
    said = [child.stdout.readline() for _ in range(random.randint(3, 30))]
    child.send_signal(signal.SIGKILL)
    said += [line for line in child.stdout.read().splitlines(keepends=True) if line.endswith("\n")]
    assert child.wait(60) == -signal.SIGKILL
    before = [index for line in said for index in json.loads(line)[0]]
    loader = opened(kind, store(200), shard=1, shards=2)
    loader.load_state_dict(json.loads(said[-1])[1])
    after = [prompt.index for prompt in loader.next(400)]
    whole = opened(kind, store(200), shard=1, shards=2).next(len(before) + 400)
    assert before + after == [prompt.index for prompt in whole]


@needs_dali
@pytest.mark.parametrize("stretch", [1, 50, 1 << 15])
def test_index_gives_the_order_of_mmap(stretch, store, monkeypatch):
    """Whatever the index file's length, also where no batch ends with it; each goes on from the other's state."""
    monkeypatch.setattr(dali, "STRETCH", stretch)
    prompts = Subset(store(200), range(0, 200, 3))
    for shard in range(2):
        shard_args = {"seed": 11, "shard": shard, "shards": 2}
        mmap, index = opened("mmap", prompts, **shard_args), opened("index", prompts, **shard_args)
        assert mmap.next(333) == index.next(333)
        state = mmap.state_dict()
        mmap, index = opened("mmap", prompts, **shard_args), opened("index", prompts, **shard_args)
        index.load_state_dict(state)
        mmap.load_state_dict(index.state_dict())
        assert mmap.next(99) == index.next(99)


@needs_dali
def test_reader_reads_in_turn_through_its_buffer(store):
    """What is said of its order: no prompt comes more than the buffer's length before its turn in the shard's part."""
    got = [prompt.index for prompt in opened("reader", store(200), shard=1, shards=2).next(100)]
    assert sorted(got) == list(range(100, 200))
    assert max(position - turn for turn, position in enumerate(got, start=100)) < 16


@needs_dali
@pytest.mark.parametrize(
    "change, told",
    [
        ({"shards": 4}, "is of shards 2, and this run's is 4"),
        ({"shard": 0}, "is of shard 1, and this run's is 0"),
        ({"seed": 4}, "is of seed 3, and this run's is 4"),
        ({"prompts": 23}, "is of store .*, and this run's is"),
        ({"kind": "index"}, "DALI's own shuffle buffer.*set data.loader=dali and data.dali.shuffle=reader"),
        ({"kind": "mmap"}, "DALI's own shuffle buffer"),
    ],
)
def test_a_state_of_another_run_is_refused(change, told, store):
    """DALI would go on with a checkpoint of anything, and give prompts twice or never."""
    loader = opened("reader", store(200), shard=1, shards=2)
    loader.next(70)
    run = {"kind": "reader", "prompts": 200, "shard": 1, "shards": 2, "seed": 3, **change}
    other = opened(run.pop("kind"), store(run.pop("prompts")), **run)
    with pytest.raises(ConfigError, match=told):
        other.load_state_dict(loader.state_dict())


@needs_dali
def test_a_state_without_a_checkpoint_is_no_readers(store):
    with pytest.raises(ConfigError, match="is of store unknown"):
        opened("reader", store(200)).load_state_dict(opened("mmap", store(200)).state_dict())


# Images


def picture(height, width, seed):
    """[height, width, 3] uint8: waves and noise, so that a wrong channel, corner or size shows."""
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 13), np.sin(y / 5)], axis=-1)
    noise = np.random.default_rng(seed).normal(0, 8, waves.shape)
    return (127 + 110 * waves + noise).clip(0, 255).astype(np.uint8)


def encoded(image, **how):
    file = io.BytesIO()
    image.save(file, **how)
    return file.getvalue()


def images():
    """(encoded bytes, what Pillow makes of them, the largest difference that is no error)."""
    rgb = [Image.fromarray(picture(20 + 7 * i, 61 - 5 * i, i)) for i in range(6)]
    pngs = [*rgb, rgb[0].convert("L"), rgb[1].quantize(50), rgb[2].convert("RGBA"), rgb[3].convert("1")]
    made = [(encoded(image, format="PNG"), np.asarray(image.convert("RGB")), 0) for image in pngs]
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: the top is on the right
    for how in ({"subsampling": 0}, {"subsampling": 2}, {"progressive": True}, {"quality": 30}, {"exif": turned}):
        jpeg = encoded(rgb[4], format="JPEG", **how)
        pixels = np.asarray(Image.open(io.BytesIO(jpeg)).convert("RGB"))
        # Decoders may round Y, Cb and Cr to either side (1 each); blue is Y + 1.772 Cb, red Y + 1.402 Cr.
        made.append((jpeg, np.rot90(pixels, -1) if "exif" in how else pixels, 3))
    return made


@pytest.fixture(scope="module")
def picture_store(tmp_path_factory):
    """Every third prompt has no image."""
    path = tmp_path_factory.mktemp("pictures") / "store"
    with new_store(path, TOKENIZER) as writer:
        for i, (image, _, _) in enumerate(images()):
            writer.add(ids_of(2 * i), {"prompt": str(i)}, image)
            if i % 2:
                writer.add(ids_of(i), {"prompt": f"no image {i}"})
    return MappedStore(path)


@pytest.mark.parametrize("kind", KINDS)
def test_images_are_decoded(kind, picture_store):
    """PNG to the bit, JPEG within rounding, upright; ready to use after the loader has gone on."""
    prompts = opened(kind, picture_store).next(3 * len(picture_store))
    known = images()
    for prompt in prompts:
        if "no image" in prompt.row["prompt"]:
            assert prompt.image is None
            continue
        _, pixels, bound = known[int(prompt.row["prompt"])]
        assert prompt.image.dtype == np.uint8 and prompt.image.shape == pixels.shape
        assert np.abs(prompt.image.astype(int) - pixels).max() <= bound
    assert {prompt.index for prompt in prompts} == set(range(len(picture_store)))


@pytest.mark.parametrize("kind", DALI_KINDS)
def test_a_resumed_stream_of_images_equals_an_uninterrupted_one(kind, picture_store):
    whole = [prompt.index for prompt in opened(kind, picture_store).next(60)]
    for cut in (1, 8, 13):
        loader = opened(kind, picture_store)
        loader.next(cut)
        other = opened(kind, picture_store)
        other.load_state_dict(loader.state_dict())
        assert [prompt.index for prompt in other.next(60 - cut)] == whole[cut:]


@pytest.mark.parametrize("kind", DALI_KINDS)
def test_a_broken_image_stops_with_the_store_named(kind, tmp_path):
    with new_store(tmp_path / "store", TOKENIZER) as writer:
        writer.add([2], {"prompt": "0"}, b"no image at all")
    with pytest.raises(ConfigError, match="store cannot be read or one of its images not decoded; loader mmap"):
        opened(kind, MappedStore(tmp_path / "store")).next(1)


# What is refused


@pytest.fixture
def no_dali(monkeypatch):
    for name in [name for name in sys.modules if name == "nvidia.dali" or name.startswith("nvidia.dali.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)  # an import of it fails
    return monkeypatch


def test_without_dali_the_extra_is_named(no_dali, store):
    with pytest.raises(ConfigError, match=r"cannot be imported .*pip install flowrl-mega\[dali\]"):
        opened("index", store(23))


def test_the_placeholder_is_named(no_dali, store):
    """PyPI's nvidia-dali is not NVIDIA DALI: installing it once more would not help."""
    real = importlib.metadata.version
    no_dali.setattr(importlib.metadata, "version", lambda name: "0.1" if name == "nvidia-dali" else real(name))
    with pytest.raises(ConfigError, match=r"placeholder.*pip uninstall nvidia-dali, then .*flowrl-mega\[dali\]"):
        opened("index", store(23))


@needs_dali
def test_dali_wants_a_store():
    prompts = tokenized([{"prompt": "12"}], TOKENIZER)
    with pytest.raises(ConfigError, match="reads prompt stores only; .*data.loader=mmap"):
        opened("index", prompts)


@needs_dali
def test_a_gpu_that_is_not_there_is_refused(store, monkeypatch):
    monkeypatch.setattr(dali.torch.cuda, "is_available", lambda: False)
    settings = DataSettings(loader="dali", dali={"device": "gpu"})
    with pytest.raises(ConfigError, match="data.dali.device = gpu: this machine has no GPU"):
        open_loader(settings, store(23), 0)
