"""A run: builds the parts, resumes, trains to the last step, evaluates when due, saves, and stops on request."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from flowrl_mega.benchmark.in_training import TrainingBenchmarks
from flowrl_mega.checkpoint import load_checkpoint, read_side_files, save_checkpoint
from flowrl_mega.checkpoint.folder import remove_unfinished
from flowrl_mega.config import Diverged, RunError
from flowrl_mega.data.loaders import open_loader
from flowrl_mega.data.stream import Stream
from flowrl_mega.evaluate import Evaluator
from flowrl_mega.grading import Grader
from flowrl_mega.learner import build_models
from flowrl_mega.model.generation import Sampling
from flowrl_mega.monitor import Monitor, distributions, machine
from flowrl_mega.parallel.layout import Layout, raise_on_all_ranks
from flowrl_mega.preflight import Inputs
from flowrl_mega.reference_answers import ReferenceAnswers
from flowrl_mega.resume import REFERENCE, RUN, record, resumption
from flowrl_mega.rollout import build_engine
from flowrl_mega.rollout.group_queue import GroupQueue
from flowrl_mega.rollout.mismatch import beyond_budget
from flowrl_mega.so_far import so_far
from flowrl_mega.train import Trainer


class Run:
    """Everything that one rank needs for a run. All methods are collective.

    `checkpoint`: the folder of the checkpoint to go on from; None starts from model.path.
    """

    def __init__(self, inputs: Inputs, layout: Layout, checkpoint: Path | None = None) -> None:
        config, rollout = inputs.config, inputs.config.rollout
        self.inputs, self.config, self.layout = inputs, config, layout
        data = inputs.data
        self.grader = Grader(config, layout, inputs.reward, data.prompts, data.tokenizer)
        self.models = build_models(inputs.arch, inputs.objective, config, layout)
        self.side_files = read_side_files(config.model.path)
        self.engine = build_engine(config, layout, inputs.arch, self.side_files)
        stop_ids = () if rollout.ignore_eos else data.stop_ids
        self.sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, stop_ids)
        self.stream = Stream(open_loader(config.data, data.prompts, config.seed, layout.dp_rank, layout.dp), layout)
        on_answer = self.grader.begin if self.grader.is_early else None
        at_once = rollout.engine == "embedded"
        self.queue = GroupQueue(self.engine, self.stream, rollout, self.sampling, config.seed, on_answer, at_once)
        self.evaluator = Evaluator(self.engine, self.grader, self.sampling, config.evaluation, config.seed)
        own = (inputs.benchmarks, data.tokenizer, stop_ids)
        self.benchmarks = TrainingBenchmarks(config, layout, self.engine, *own)
        self.trainer = Trainer(config, layout, inputs.objective, self.models, self.engine, self.queue, self.grader)
        self.reference_answers: ReferenceAnswers | None = None
        if checkpoint:
            self._resume(checkpoint)
        self.engine.sync(self.models.policy, version=self.trainer.step_done)
        self.saved_at = time.monotonic()

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step; False when it stopped before that, on request and with a checkpoint saved."""
        config, trainer = self.config, self.trainer
        monitor = self._monitor()
        if trainer.step_done == 0:
            self._ask_reference()
            self._evaluate_when_due(monitor)
        for step in range(trainer.step_done + 1, config.steps + 1):
            metrics, samples = trainer.step()
            if monitor:
                self._log(monitor, step, metrics)
                monitor.samples(step, samples)
            self._evaluate_when_due(monitor)
            last = step == config.steps
            stop = self._on_any_rank(stop_requested())
            due = self._on_any_rank(config.checkpoint.is_due(step, time.monotonic() - self.saved_at))
            stuck = self.models.stuck(config.on_nonfinite.most, last)
            fault = self._mismatch(metrics) or self.models.gate.fault or stuck
            if stop or fault or due or (last and config.checkpoint.at_end):
                saved = self.save()
                if monitor:
                    monitor.saved(step, saved)
            if fault:
                raise Diverged(fault) if fault is stuck else RunError(fault)
            if stop:
                break
        if monitor:
            monitor.close()
        return trainer.step_done == config.steps

    def save(self) -> Path:
        """Write checkpoints/step_N of the last step done; its place."""
        config, objective = self.config.checkpoint, self.trainer.objective
        state = {
            "step": self.trainer.step_done,
            RUN: record(self.config, self.inputs.data_digest),
            "rollout": self.queue.state_dict(),
            "objective": {name: getattr(objective, name) for name in objective.adapts},
        }
        if self.reference_answers:
            state[REFERENCE] = self.reference_answers.state_dict()
        folder, trained = Path(self.config.run_dir), self.models.trained()
        with so_far(f"saving step_{state['step']}", show=self.layout.rank == 0):
            saved = save_checkpoint(folder, trained, state, config.keep_last, self.side_files, config.export_hf)
        self.saved_at = time.monotonic()
        return saved

    def close(self) -> None:
        """End what was started: servers, reward workers, readers."""
        for part in (self.engine, self.grader, self.stream):
            part.close()

    def _resume(self, checkpoint: Path) -> None:
        """Fill all from the checkpoint, and say what differs from the run that saved it."""
        trainer = self.trainer
        with so_far(f"loading {checkpoint}", show=self.layout.rank == 0):
            state = load_checkpoint(checkpoint, self.models.trained())
        adapts = trainer.objective.adapts
        adapted = {name: value for name, value in state.get("objective", {}).items() if name in adapts}
        trainer.objective = trainer.objective.model_copy(update=adapted)
        resumed = resumption(state, self.config, self.inputs.data.prompts, self.inputs.data_digest)
        self.queue.load_state_dict(resumed.rollout)
        if self.queue.kept:
            self.grader.grade_groups(list(self.queue.kept))
        if self.layout.rank == 0:
            for line in resumed.lines:
                print(f"flowrl-mega: resuming {checkpoint}: {line}", file=sys.stderr)
        trainer.step_done = state["step"]
        if REFERENCE in state:
            self.reference_answers = ReferenceAnswers(**state[REFERENCE])
            trainer.log_z = self.reference_answers.log_z(trainer.objective)

    def _ask_reference(self) -> None:
        """Estimate what log Z is frozen at, where it is, while the policy is the reference."""
        objective, prompts, config = self.trainer.objective, self.inputs.data.prompts, self.config
        if not objective.reference_answers:
            return
        if self.layout.rank == 0:
            what = f"{objective.reference_answers} answers to each of {len(prompts)} prompts"
            print(f"flowrl-mega: asking the reference for {what}, to estimate log Z", file=sys.stderr)
        self.reference_answers = found = ReferenceAnswers.ask(
            self.engine,
            self.grader,
            prompts,
            objective.reference_answers,
            self.sampling,
            config.seed,
            at_once=config.sequences_per_step,
        )
        self.trainer.log_z = log_z = found.log_z(objective)
        if self.layout.rank == 0:
            print(f"flowrl-mega: {found.describe(log_z)}", file=sys.stderr)

    def _monitor(self) -> Monitor | None:
        """Rank 0's; the others log nothing."""
        config, m, monitor = self.config, self.config.monitor, None
        with raise_on_all_ranks():
            if self.layout.rank == 0:
                run_dir = Path(config.run_dir)
                remove_unfinished(run_dir)
                values = (config.dump(), config.steps, self.trainer.step_done, m.wandb, m.wandb_project, m.progress)
                monitor = Monitor(run_dir, *values, m.tensorboard, m.wandb_checkpoints, m.trackio)
                monitor.folder.started(machine.start(self.trainer.step_done, self.layout.world))
        return monitor

    def _log(self, monitor: Monitor, step: int, metrics: dict[str, float]) -> None:
        """On rank 0, which alone says what the step's answers look like."""
        every = self.config.monitor.distributions_every
        if self.trainer.seen:
            groups, columns = self.trainer.seen
            watched, residuals = self.grader.watched(groups), distributions.Residuals.of_columns(columns)
            metrics |= distributions.metrics(watched, residuals, columns.get("entropy"))
            if step % every == 0 or step in (1, self.config.steps):
                record = distributions.record(watched, residuals)
                monitor.distributions(step, record | {"memory_gb": self.trainer.memory_gb})
        monitor.log(step, metrics)

    def _evaluate_when_due(self, monitor: Monitor | None) -> None:
        every, step, held_out = self.config.evaluation.every, self.trainer.step_done, self.inputs.data.held_out
        if every and (step % every == 0 or step == self.config.steps):
            metrics = self.evaluator.evaluate(held_out, self.models.policy) if held_out is not None else {}
            metrics |= self.benchmarks.evaluate()
            if monitor:
                monitor.evaluation(step, metrics)

    def _mismatch(self, metrics: dict[str, float]) -> str | None:
        """The message that ends the run where the engine's log-probs are too far from the trainer's; or warns."""
        settings = self.config.rollout.mismatch
        message = beyond_budget(metrics.get("mismatch/abs_logp_diff"), settings, self.trainer.step_done)
        if message and settings.action == "stop":
            return (
                f"{message}; the run ends with a checkpoint of this step. Look for a server of another precision or "
                "of stale weights, correct with objective.tis, or raise the budget"
            )
        if message and self.layout.rank == 0:
            print(f"flowrl-mega: {message}", file=sys.stderr)
        return None

    def _on_any_rank(self, flag: bool) -> bool:
        """True on all ranks where it is true on one: ranks that stop at different steps would wait for ever."""
        shared = torch.tensor(float(flag), device=self.layout.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)
