"""Training from a prompt store through DALI: on two replicas or two pipeline stages, and resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jobs
import pytest

from flowrl_mega.data import sums
from flowrl_mega.data.load_prompts import load_tokenizer
from flowrl_mega.data.prompts import tokenized
from flowrl_mega.data.store import new_store

pytestmark = [pytest.mark.integration, pytest.mark.ranks]
pytest.importorskip("nvidia.dali", reason="the extra dali is not installed")


@pytest.fixture(scope="module")
def store(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer, path = load_tokenizer(str(tiny_llama)), tmp_path_factory.mktemp("store") / "prompts"
    with new_store(path, tokenizer) as writer:
        for prompt in tokenized(sums.Sums(10, 40).rows(), tokenizer):
            writer.add(prompt.token_ids, {**prompt.row, "kind": "sums", "task": "sums"})
    return path


def trained(folder: Path, model: Path, steps: list[int], layout: str = "dp", **data: Any) -> list[Any]:
    """The records of a run in as many goes as there are `steps`, 24 prompts a step of 25: epochs end within steps."""
    folder.mkdir()
    for n in steps:
        config = jobs.write_config(
            folder, model, steps=n, data={"held_out": 0.2, **data}, parallel={layout: 2, "timeout_s": 60},
            reward="flowrl_mega.rewards.by_kind:score", monitor={"progress": False, "samples_per_step": 48},
            rollout={"prompts_per_step": 24, "group_size": 2, "max_tokens": 6}, batch={"tokens_per_microbatch": 512},
        )  # fmt: skip
        jobs.Job(["train", str(config)], folder / "log").run()
    return [jobs.records(folder / "run", name) for name in ("metrics", "samples")]


@pytest.mark.parametrize("layout", ["dp", "pp"])
def test_dali_trains_on_the_very_prompts_of_mmap(layout: str, store: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Same seed, same order, same records to the bit; so either may resume the other's run. Each replica has a reader,
    and each stage of a pipeline: both read the same prompts."""
    mmap = trained(tmp_path / "mmap", tiny_llama, [4], layout, path=str(store))
    dali = trained(tmp_path / "dali", tiny_llama, [2, 4], layout, path=str(store), loader="dali")
    assert dali == mmap


def test_dalis_own_order_goes_on_after_a_stop(store: Path, tiny_llama: Path, tmp_path: Path) -> None:
    """Each replica's reader state is in the checkpoint: a run in two goes is the run in one."""
    data = {"path": str(store), "loader": "dali", "dali": {"shuffle": "reader", "buffer": 8}}
    whole = trained(tmp_path / "whole", tiny_llama, [4], **data)
    assert trained(tmp_path / "parts", tiny_llama, [2, 4], **data) == whole
    first = [sample["prompt"] for sample in whole[1] if sample["step"] == 1]
    assert len(set(first)) == 24
