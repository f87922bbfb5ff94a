"""One step of FlowRL: prompts -> rollouts -> rewards -> old, ref -> update -> engine -> monitor, checkpoint."""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flowrl_mega import objectives
from flowrl_mega.checkpoint import load_checkpoint, load_model, read_side_files, save_checkpoint
from flowrl_mega.checkpoint.folder import remove_unfinished
from flowrl_mega.config import Config, ConfigError, CriticSettings, OptimizerSettings, RunError
from flowrl_mega.data.inputs import load_prompts
from flowrl_mega.data.loaders import open_loader
from flowrl_mega.data.prompts import Prompts
from flowrl_mega.data.stream import Stream
from flowrl_mega.evaluation.exact import exact_metrics, right_answer_probabilities
from flowrl_mega.evaluation.held_out import held_out_metrics
from flowrl_mega.grading import Grader
from flowrl_mega.learner import Learner, counts_of, keep, to_sequences
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.critic import Critic
from flowrl_mega.model.fp8_gate import Fp8Gate
from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy, PolicyOutput, build_reference
from flowrl_mega.model.stage import Model
from flowrl_mega.monitor import Monitor
from flowrl_mega.monitor.step_metrics import cost_metrics, merge_updates
from flowrl_mega.parallel.layout import Layout, raise_on_all_ranks
from flowrl_mega.parallel.packing import PackedBatch, Sequence, efficiency, plan
from flowrl_mega.rewards.registry import Score
from flowrl_mega.rewards.scorer import verdicts
from flowrl_mega.rollout import Engine, Rollout, build_engine, generate
from flowrl_mega.rollout.batches import Batches, Group, derive_seed


class Trainer:
    """Everything that one rank needs to train; all methods are collective. Steps count from 1."""

    def __init__(self, config: Config, layout: Layout, resume: Path | None = None) -> None:
        self.config, self.layout = config, layout
        self.objective = objectives.build(config.objective)
        self.prompts, self.held_out, self.tokenizer, stop_ids = load_prompts(config)
        self.grader = Grader(config, layout, self.prompts, self.tokenizer)
        arch = read_architecture(config.model.path)
        self.shares_trunk = config.critic is not None and config.critic.trunk == "shared"
        self.policy = Policy(arch, config, layout, self.objective.log_z, with_value=self.shares_trunk)
        load_model(self.policy, config.model.path)
        self.learner = self._learner(self.policy, config.optimizer, config.critic)
        self.critic: Critic | None = None
        self.critic_learner: Learner | None = None
        if config.critic and not self.shares_trunk:
            path = config.critic.path or config.model.path
            self.critic = Critic(read_architecture(path), config, layout)
            load_model(self.critic, path)
            self.critic_learner = self._learner(self.critic, config.critic.optimizer)
        self.reference: Policy | None = None
        if self.objective.needs_reference:
            self.reference = build_reference(arch, config, layout)
            load_model(self.reference, config.model.path)
        self.reference_offload = self.reference.offload() if self.reference and config.model.reference_offload else None
        self.gate = Fp8Gate(self.policy, config.model, getattr(self.objective, "length_norm", True))
        self.side_files = read_side_files(config.model.path)
        self.engine: Engine = build_engine(config, layout, arch, self.side_files)
        rollout = config.rollout
        stop_ids = () if rollout.ignore_eos else stop_ids
        self.sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, stop_ids)
        self.stream = Stream(open_loader(config.data, self.prompts, config.seed, layout.dp_rank, layout.dp), layout)
        told = self.grader.begin if self.grader.is_early else None
        self.batches = Batches(self.engine, self.stream, rollout, self.sampling, config.seed, told)
        self.step_done = self._resume(resume) if resume else 0
        self.engine.sync(self.policy, version=self.step_done)
        self.seconds: dict[str, float] = defaultdict(float)

    def _learner(self, model: Model, settings: OptimizerSettings, critic: CriticSettings | None = None) -> Learner:
        """The model with its optimizer; the head of a critic that shares the trunk has the critic's rate."""
        config = self.config
        rates = {"*value_head.*": critic.optimizer.lr} if critic else None
        updates = config.steps * config.updates_per_step
        return Learner(model.stages, settings, self.layout, config.model.dtype == "bf16", updates, rates)

    def _resume(self, checkpoint: Path) -> int:
        """Fill all from the checkpoint; returns its step. Checkpoints without a rollout state took prompts in order."""
        trainer = load_checkpoint(checkpoint, self.learned())
        adapted = {name: value for name, value in trainer.get("objective", {}).items() if name in self.objective.adapts}
        self.objective = self.objective.model_copy(update=adapted)
        cursor = trainer["step"] * self.config.rollout.prompts_per_step
        self.batches.load(trainer.get("rollout", {"cursor": cursor, "groups": []}))
        return trainer["step"]

    def learned(self) -> dict[str, tuple[Any, Any]]:
        """What a checkpoint holds: models and their optimizers, the policy first."""
        found: dict[str, tuple[Any, Any]] = {"policy": (self.policy, self.learner.optimizer)}
        if self.critic and self.critic_learner:
            found["critic"] = (self.critic, self.critic_learner.optimizer)
        return found

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Train on one batch of prompts; returns the step's metrics and some readable samples."""
        self.seconds.clear()
        groups, counts = self.rollouts(step)
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [score for group in groups for score in group.scores]
        with self.timed("score"):
            sequences = as_sequences([group.prompt for group in groups], rollouts)
            mini_batches = self.batch(sequences, rollouts, scores)
        with self.timed("update"):
            updates = [self.update(mini_batch) for mini_batch in mini_batches]
            if "loss" in updates[0]:  # the policy has learnt, not the critic alone
                self.objective = self.objective.adapted(merge_updates(updates), len(sequences))
            counts |= self.gate.after_step(step, mini_batches[0][0], self.config.rollout.temperature)
        with self.timed("sync"):
            counts |= self.engine.sync(self.policy, version=step)
        self.step_done = step
        counts |= staleness(rollouts, step - 1) | self.engine.metrics()
        return counts | self.metrics(sequences, rollouts, scores, updates), self.grader.samples(groups)

    def rollouts(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """The step's groups, answered and scored; with `rollout.ahead` the next step's first round is begun."""
        while not self.batches.has_enough:
            with self.timed("generate"):
                groups = self.batches.answer(step)
            with self.timed("reward"):
                self.grader.grade_groups(groups)
            self.batches.keep(groups)
        taken = self.batches.take()
        if self.config.rollout.ahead and step < self.config.steps:
            self.batches.start(step + 1)
        self.engine.release()
        return taken

    def generate(self, prompts: Prompts, answers: int) -> list[Rollout]:
        """`answers` answers to each prompt, prompt by prompt, always from the same seed."""
        ids, seed = [prompt.token_ids for prompt in prompts], derive_seed(self.config.seed, 0)
        return [rollout for group in generate(self.engine, ids, answers, self.sampling, seed) for rollout in group]

    def batch(self, sequences: list[Sequence], rollouts: list[Rollout], scores: list[Score]) -> list[list[PackedBatch]]:
        """This rank's micro-batches of every update, with credit and the log-probs of engine, old policy and reference.

        The old policy is scored here, before the first update, with the update's own micro-batches: then w = 1 exactly
        on the first. A step of one update has pi_old = pi_theta, and the update's own forward will do, but where the
        objective's `prepare` reads it.
        """
        rollout, objective = self.config.rollout, self.objective
        temperature = rollout.temperature
        mini_batches = plan(sequences, *self.packing(sequences))
        self.gate.before_training(self.step_done + 1, mini_batches[0][0], temperature)
        batches = [batch for mini_batch in mini_batches for batch in mini_batch]
        self.note(batches, rollouts, scores)
        if len(mini_batches) > 1 or objective.needs_old_logp or self.shares_trunk:
            old = self.policy.score(batches, temperature)
            keep("old_logp", batches, [output.logp for output in old])
            if self.shares_trunk:
                keep("value", batches, [output.value for output in old])
        if self.critic is not None:
            keep("value", batches, self.critic.score(batches))
        if self.reference is not None:
            with self.reference_offload or nullcontext():
                scored = self.reference.score(batches, temperature)
            keep("ref_logp", batches, [output.logp for output in scored])
        if self.layout.is_last_stage:
            scored_batches, groups = [to_sequences(batch) for batch in batches], len(rollouts) // rollout.group_size
            prepared = objective.prepare(scored_batches, self.layout.dp_sum, groups)
            for batch, values in zip(batches, prepared, strict=True):
                batch.prepared = values
        return mini_batches

    def note(self, batches: list[PackedBatch], rollouts: list[Rollout], scores: list[Score]) -> None:
        """Beside each micro-batch what came with its answers: credit, group and the engine's log-probs."""
        rewards = torch.tensor([score.reward for score in scores], dtype=torch.float64)
        group = torch.arange(len(rewards)) // self.config.rollout.group_size
        credit, device = self.objective.credit(rewards, group), self.layout.device
        reported = all(len(rollout.logp) == len(rollout.response) for rollout in rollouts)
        if self.objective.tis != "none" and not reported:
            raise ConfigError(
                f"objective.tis = {self.objective.tis}: weighs by the engine's log-probs, and rollout.engine = "
                f"{self.config.rollout.engine} has reported none; set objective.tis=none, or have it report them"
            )
        for batch in batches:
            batch.draw = self.step_done + 1
            batch.scores["credit"] = credit.to(device)[batch.index]
            batch.scores["group"] = group.to(device)[batch.index]
            if reported:
                engine_logp = [logp for i in batch.index.tolist() for logp in rollouts[i].logp]
                batch.scores["rollout_logp"] = torch.tensor(engine_logp, device=device)

    def packing(self, sequences: list[Sequence]) -> tuple[int, Layout, int]:
        """How a step's sequences become micro-batches: what `plan` and `efficiency` ask for."""
        batch = self.config.batch
        return batch.mini_batch or len(sequences), self.layout, batch.tokens_per_microbatch

    def update(self, mini_batch: list[PackedBatch]) -> dict[str, float]:
        """One optimizer step on the mean loss over the mini-batch, and one of a critic with a trunk of its own."""
        metrics: dict[str, float] = {}
        if self.critic_learner:
            found = self.critic_learner.update(mini_batch, lambda stage, batch: stage(batch), self.value_loss)
            metrics |= {f"critic/{name}": value for name, value in found.items()}
        if self.config.critic is None or self.step_done >= self.config.critic.warmup_steps:
            metrics |= self.learner.update(mini_batch, self.forward, self.loss)
        return metrics

    def forward(self, stage: Any, batch: PackedBatch) -> PolicyOutput | torch.Tensor:
        """A pipeline stage's work on one micro-batch."""
        return stage(batch, self.config.rollout.temperature)

    def loss(self, output: PolicyOutput, batch: PackedBatch) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """The objective on one micro-batch: the sum that it gives, the count to divide it by, and what to report."""
        sequences = to_sequences(batch, output)
        result = self.objective.loss(sequences)
        loss_sum, report = result.loss_sum, {**result.metrics, "entropy": sequences.mean(output.entropy)}
        if output.value is not None:
            assert self.config.critic is not None
            values = self.objective.value_loss(output.value, sequences)
            loss_sum = loss_sum + self.config.critic.value_coef * values.loss_sum
            report |= values.metrics
        return loss_sum, result.count, report | counts_of(loss_sum, result.count, batch)

    def value_loss(self, value: torch.Tensor, batch: PackedBatch) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """As `loss`, of the critic."""
        result = self.objective.value_loss(value, to_sequences(batch))
        return result.loss_sum, result.count, result.metrics | counts_of(result.loss_sum, result.count, batch)

    def metrics(
        self, sequences: list[Sequence], rollouts: list[Rollout], scores: list[Score], updates: list[dict[str, float]]
    ) -> dict[str, float]:
        """The step's line of metrics.jsonl."""
        lengths = [len(r.response) for r in rollouts]
        return {
            "reward": sum(score.reward for score in scores) / len(scores),
            "reward_failed": sum(score.failed for score in scores),
            **verdicts(scores),
            "response_length": sum(lengths) / len(lengths),
            "stopped": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
            **merge_updates(updates),
            "packing_efficiency": efficiency(sequences, *self.packing(sequences)),
            **cost_metrics(self.seconds, sum(s.rows + 1 for s in sequences), sum(lengths)),
        }

    def evaluate(self) -> dict[str, float]:
        """Answers to the held-out prompts, always from the same seed, so that evaluations compare; and exact figures
        where every prompt lists its right answers."""
        assert self.held_out is not None
        k, prompts = self.config.evaluation.samples, self.held_out
        texts, scores = self.grader.grade([p.row for p in prompts for _ in range(k)], self.generate(prompts, k))
        metrics = held_out_metrics(texts, [score.reward for score in scores], k)
        if all("right_answers" in prompt.row for prompt in prompts):
            metrics |= exact_metrics(self.right_answers(prompts), self.config.evaluation.distinct_at)
        return metrics

    def right_answers(self, prompts: Prompts) -> list[torch.Tensor]:
        """pi(y|x) of every right answer that the prompts' rows list, [number of answers] a prompt."""
        end = self.sampling.stop_ids[:1]
        answers = [
            [
                [*self.tokenizer(text, add_special_tokens=False)["input_ids"], *end]
                for text in prompt.row["right_answers"]
            ]
            for prompt in prompts
        ]
        ids = [prompt.token_ids for prompt in prompts]
        return right_answer_probabilities(self.policy, ids, answers, self.config.rollout.temperature)

    def run(self, stop_requested: Callable[[], bool] = lambda: False) -> bool:
        """Train to the last step; False when it stopped before that, on request and with a checkpoint saved."""
        config = self.config
        monitor = self._monitor()
        if self.step_done == 0:
            self._evaluate_when_due(monitor)
        for step in range(self.step_done + 1, config.steps + 1):
            metrics, samples = self.step(step)
            if monitor:
                monitor.log(step, metrics)
                monitor.samples(step, samples)
            self._evaluate_when_due(monitor)
            last, every = step == config.steps, config.checkpoint.every
            stop = self._any_rank(stop_requested())
            drifted = self._drifted(metrics) or self.gate.fault
            if stop or drifted or (every and step % every == 0) or (last and config.checkpoint.at_end):
                self.save(step)
            if drifted:
                raise RunError(drifted)
            if stop:
                break
        if monitor:
            monitor.close()
        return self.step_done == config.steps

    def close(self) -> None:
        """End what was started: servers, reward workers, readers."""
        for part in (self.engine, self.grader, self.stream):
            part.close()

    def save(self, step: int) -> None:
        """Write checkpoints/step_N."""
        config = self.config.checkpoint
        with_model = (self.side_files, config.export_hf)
        adapted = {name: getattr(self.objective, name) for name in self.objective.adapts}
        save_checkpoint(
            Path(self.config.run_dir),
            self.learned(),
            {"step": step, "rollout": self.batches.state(), "objective": adapted},
            config.keep_last,
            *with_model,
        )

    def _drifted(self, metrics: dict[str, float]) -> str | None:
        """Says so when the engine's log-probs are too far from the trainer's; the message that ends the run, if any."""
        settings, found = self.config.rollout.mismatch, metrics.get("mismatch_abs_logp")
        if settings.budget is None or found is None or found <= settings.budget:
            return None
        message = (
            f"step {self.step_done}: mean |engine - trainer| log-prob {found:.3g} nats a token is beyond "
            f"rollout.mismatch.budget = {settings.budget:g}"
        )
        if settings.action == "stop":
            return (
                f"{message}; the run ends with a checkpoint of this step. Look for a server of another precision or "
                "of stale weights, correct with objective.tis, or raise the budget"
            )
        if self.layout.rank == 0:
            print(f"flowrl-mega: {message}", file=sys.stderr)
        return None

    def _monitor(self) -> Monitor | None:
        """Rank 0's; the others log nothing."""
        config, m, monitor = self.config, self.config.monitor, None
        with raise_on_all_ranks():
            if self.layout.rank == 0:
                run_dir = Path(config.run_dir)
                remove_unfinished(run_dir)
                values = (config.dump(), config.steps, self.step_done, m.wandb, m.wandb_project, m.progress)
                monitor = Monitor(run_dir, *values)
        return monitor

    def _evaluate_when_due(self, monitor: Monitor | None) -> None:
        every = self.config.evaluation.every
        if every and (self.step_done % every == 0 or self.step_done == self.config.steps):
            metrics = self.evaluate()
            if monitor:
                monitor.evaluation(self.step_done, metrics)

    def _any_rank(self, flag: bool) -> bool:
        """True on all ranks where it is true on one: ranks that stop at different steps would wait for ever."""
        shared = torch.tensor(float(flag), device=self.layout.device)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to the phase; on a GPU all of its work, not only its launch."""
        start = time.perf_counter()
        yield
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


def as_sequences(prompts: list[list[int]], rollouts: list[Rollout]) -> list[Sequence]:
    """Prompts and their answers (prompt by prompt, equally many each) as sequences to pack."""
    answers = len(rollouts) // len(prompts)
    return [Sequence(i, prompts[i // answers], r.response) for i, r in enumerate(rollouts)]


def staleness(rollouts: list[Rollout], version: int) -> dict[str, float]:
    """How many updates the weights that made the tokens are behind `version`: mean over tokens, and the largest."""
    spans = [(version - made_by, n) for rollout in rollouts for made_by, n in rollout.versions]
    tokens = sum(n for _, n in spans)
    mean = sum(behind * n for behind, n in spans) / tokens
    return {"staleness": mean, "max_staleness": float(max(behind for behind, _ in spans))}
