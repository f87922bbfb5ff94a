"""How many ranks `train` starts by itself, what it sets for them, and how long their collectives may take."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
import yaml
from on_job_size import timeouts

from flowrl_mega.config import Config, ConfigError, ParallelSettings
from flowrl_mega.parallel.layout import world_size
from flowrl_mega.preflight import ranks_to_start

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("parallel", "gpus", "ranks"),
    [
        ({}, None, 1), ({"tp": 2}, None, 2), ({"tp": 2, "dp": 3}, None, 6),  # on CPUs
        ({}, 8, 8), ({"tp": 4}, 8, 8), ({"tp": 2, "pp": 2, "cp": 2}, 8, 8), ({"tp": 3}, 8, 6), ({"dp": 2}, 8, 2),
        ({}, 1, 1), ({}, 64, 16), ({"pp": 2, "vpp": 2}, 64, 16),  # 16 sequences keep no more busy, or 8 x 2
    ],
)  # fmt: skip
def test_all_gpus_train(parallel: dict[str, int], gpus: int | None, ranks: int):
    assert world_size(ParallelSettings(**parallel), gpus, 16) == ranks


@pytest.mark.parametrize(
    ("parallel", "gpus", "said"),
    [
        ({"tp": 2}, 1, "parallel.tp = 2: 2 ranks, but this host has 1 GPUs"),
        ({"tp": 4, "dp": 3}, 8, "parallel.tp = 4 x parallel.dp = 3: 12 ranks, but this host has 8 GPUs"),
    ],
)
def test_two_ranks_on_one_gpu_are_refused(parallel: dict[str, int], gpus: int, said: str):
    """NCCL would, after the models are loaded."""
    with pytest.raises(ConfigError, match=said):
        world_size(ParallelSettings(**parallel), gpus, 1000)


def config(parallel: dict[str, Any], **rollout: Any) -> Config:
    return on_ranks.config_for("nowhere", parallel=parallel, rollout={"prompts_per_step": 16, **rollout})


@pytest.mark.parametrize(
    ("parallel", "rollout", "ranks"),
    [
        ({}, {}, 8),
        ({}, {"engine": "sglang", "servers": 2}, 6),
        ({"tp": 2}, {"engine": "sglang", "servers": 1, "server_args": {"tp_size": 4}}, 4),
        ({}, {"engine": "sglang", "servers": 8, "colocated": True}, 8),
        ({}, {"engine": "sglang", "servers": ["http://elsewhere:1"]}, 8),
        ({}, {"engine": "sglang", "servers": 3, "server_args": {"device": "cpu"}}, 8),
        ({"tp": 4}, {"engine": "sglang", "servers": 8}, 4),  # which check_servers refuses, and names the servers
    ],
)
def test_servers_beside_the_trainer_have_theirs(parallel: Any, rollout: Any, ranks: int, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert ranks_to_start(config(parallel, **rollout)) == ranks


@pytest.mark.parametrize("name", ["qwen2.5_1.5b", "qwen2.5_7b"])
def test_the_published_runs_train_on_the_whole_node(name: str, monkeypatch):
    tree = yaml.safe_load((EXAMPLES / f"{name}.yaml").read_text())
    settings = ParallelSettings(**tree["parallel"])
    assert world_size(settings, 8, tree["batch"]["mini_batch"]) == 8


@pytest.mark.ranks
def test_every_group_has_the_time_out(ranks2):
    """Megatron's groups had half an hour whatever the setting, and a hang in one held all GPUs so long."""
    for found in ranks2.run(timeouts, {"tp": 2, "timeout_s": 77}):
        assert len(found) >= 4 and set(found.values()) == {timedelta(seconds=77)}, found
