"""Answers of the model in the job's own processes."""

from __future__ import annotations

from typing import Any

from flowrl_mega.benchmark.answers import Place
from flowrl_mega.benchmark.writer import Done, Stop, Work, answer_of, dtype_of, sampling_of, seed_of
from flowrl_mega.checkpoint import load_model
from flowrl_mega.config import Config, DataSettings, ModelSettings
from flowrl_mega.config_eval import EvalConfig
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rollout.embedded import EmbeddedEngine
from flowrl_mega.rollout.engine import Request, Rollout

AT_ONCE = 32  # problems whose answers are written together; their seeds depend on it


class EmbeddedWriter:
    """The model in the job's own ranks.

    Problems are taken AT_ONCE at a time, and where any attempt of those is missing all are written again: what is drawn
    does not depend on what was there, so that an evaluation which was killed ends like one that was not.
    """

    def __init__(self, config: EvalConfig, layout: Layout, arch: Architecture, tokenizer: Any, ends: tuple[int, ...]):
        self.k, self.seed, self.tokenizer = config.k, config.seed, tokenizer
        self.sampling = sampling_of(config, ends)
        run = policy_config(config)
        policy = Policy(arch, run, layout, log_z=None)
        load_model(policy, run.model.path)
        policy.train(False)
        self.engine = EmbeddedEngine(layout)
        self.engine.sync(policy, 0)

    def write(self, work: Work, done: Done, stop: Stop) -> bool:
        for start in range(0, len(work.prompts), AT_ONCE):
            prompts, missing = work.prompts[start : start + AT_ONCE], work.missing[start : start + AT_ONCE]
            if not any(missing):
                continue
            if any(self.engine.layout.gather_objects(stop())):
                return False

            def on_answer(i: int, attempt: int, rollout: Rollout, start: int = start, missing: Any = missing) -> None:
                if attempt in missing[i]:
                    done(Place(work.benchmark, start + i, attempt), answer_of(rollout, self.tokenizer, self.sampling))

            requests = [Request(prompt, self.k, self.sampling.max_tokens) for prompt in prompts]
            seed = seed_of(self.seed, work.benchmark, start)
            self.engine.finish(self.engine.start(requests, self.sampling, seed, on_answer))
        return True

    def close(self) -> None:
        self.engine.close()


def policy_config(config: EvalConfig) -> Config:
    """The settings of a run that never trains, for whoever builds its policy."""
    assert config.model.path is not None, "the settings' check has seen to it"
    return Config(
        run_dir=config.run_dir,
        steps=1,
        seed=config.seed,
        model=ModelSettings(path=config.model.path, dtype=dtype_of(config)),
        parallel=config.parallel,
        data=DataSettings(),
        reward=config.reward,
    )
