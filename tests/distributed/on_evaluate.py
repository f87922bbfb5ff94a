"""What ranks run to evaluate a policy."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from on_ranks import config_for, start

from flowrl_mega.checkpoint import load_model
from flowrl_mega.evaluate import Evaluator
from flowrl_mega.grading import Grader
from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.preflight import Inputs
from flowrl_mega.rollout import EmbeddedEngine


def by_a_run(path: Path, **sections: Any) -> dict[str, float]:
    """The held-out figures of a run before its first step."""
    job = start(path, **sections)
    assert job.inputs.data.held_out is not None
    return job.evaluator.evaluate(job.inputs.data.held_out, job.models.policy)


def without_a_trainer(path: Path, with_policy: bool, **sections: Any) -> dict[str, float]:
    """The figures of a policy without partition function, optimizer, reference or run folder."""
    config = config_for(path, **sections)
    inputs, layout = Inputs(config), layouts.init(config.parallel, config.seed)
    policy = Policy(inputs.arch, config, layout, log_z=None)
    load_model(policy, path)
    engine = EmbeddedEngine(layout)
    engine.sync(policy, version=0)
    data = inputs.data
    grader = Grader(config, layout, inputs.reward, data.prompts, data.tokenizer)
    sampling = Sampling(config.rollout.max_tokens, config.rollout.temperature, stop_ids=data.stop_ids)
    evaluator = Evaluator(engine, grader, sampling, config.evaluation, config.seed)
    assert data.held_out is not None
    return evaluator.evaluate(data.held_out, policy if with_policy else None)
