"""The quick start is there to show real tensor parallelism: two ranks wherever there is not just one GPU."""

from __future__ import annotations

import json

import pytest
import torch

from examples.quickstart import run


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_two_ranks_but_on_a_single_gpu(gpus, ranks, tmp_path, monkeypatch):
    """On a machine without a GPU, device_count() says 1 to please Megatron; a quick start with tp = 1 came of that."""
    started = []
    monkeypatch.setattr(run, "launch", lambda command, world, timeout_s: started.append(world) or 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: max(1, gpus))
    assert run.run_trials(tmp_path, seed=0, trials={}) == 0
    assert started == [ranks]
    assert json.loads((tmp_path / "trials.json").read_text())["overrides"] == [f"parallel.tp={ranks}"]
