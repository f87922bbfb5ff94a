"""One step of FlowRL: prompts -> rollouts -> rewards -> batch -> old, ref -> update -> engine -> monitor, checkpoint."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.distributed as dist

from flowrl_mega import objectives
from flowrl_mega.checkpoint import load_checkpoint, save_checkpoint
from flowrl_mega.checkpoint.folder import remove_unfinished
from flowrl_mega.config import Config
from flowrl_mega.data.inputs import load_prompts
from flowrl_mega.evaluation.held_out import held_out_metrics
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy, build_reference
from flowrl_mega.model.weights import load_hf
from flowrl_mega.monitor import Monitor
from flowrl_mega.objectives.common import Sequences
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.optimizer import Optimizer, wrap
from flowrl_mega.parallel.packing import PackedBatch, Sequence, pack, split_by_tokens, split_data_parallel
from flowrl_mega.parallel.schedule import forward_backward
from flowrl_mega.rewards.registry import Score, load_reward, score_all
from flowrl_mega.rollout import EmbeddedEngine, Engine, Rollout


class Trainer:
    """Everything one rank needs to train; all methods are collective."""

    def __init__(self, config: Config, layout: Layout, resume: Path | None = None) -> None:
        self.config, self.layout = config, layout
        self.objective = objectives.build(config.objective)
        self.prompts, self.held_out, self.tokenizer, stop_ids = load_prompts(config)
        self.reward = load_reward(config.reward)
        arch = read_architecture(config.model.path)
        self.policy = Policy(arch, config, layout, self.objective.log_z)
        load_hf(self.policy, config.model.path)
        self.reference: Policy | None = None
        if self.objective.needs_reference:
            self.reference = build_reference(arch, config, layout)
            load_hf(self.reference, config.model.path)
        self.model = wrap(self.policy)
        self.optimizer = Optimizer(self.model, config.optimizer, bf16=config.model.dtype == "bf16")
        self.engine: Engine = EmbeddedEngine(layout)
        rollout = config.rollout
        self.sampling = Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, stop_ids)
        self.step_done = load_checkpoint(resume, self.policy, self.optimizer)["step"] if resume else 0
        self.engine.sync(self.policy, version=self.step_done)
        self.seconds: dict[str, float] = defaultdict(float)

    def step(self, step: int) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Train on one batch of prompts; returns the step's metrics and some readable samples."""
        rollout, temperature = self.config.rollout, self.config.rollout.temperature
        self.seconds.clear()
        prompts = self.prompts.take((step - 1) * rollout.prompts_per_step, rollout.prompts_per_step, self.config.seed)
        with self.timed("generate"):
            seed = derive_seed(self.config.seed, step)
            rollouts = self.engine.generate([p.token_ids for p in prompts], rollout.group_size, self.sampling, seed)
        rows = [p.row for p in prompts for _ in range(rollout.group_size)]
        with self.timed("reward"):
            texts, scores = self.score(rows, rollouts)
        with self.timed("score"):
            rewards = torch.tensor([score.reward for score in scores], dtype=torch.float64)
            credit = self.objective.credit(rewards, torch.arange(len(rewards)) // rollout.group_size)
            sequences = [
                Sequence(i, prompts[i // rollout.group_size].token_ids, r.response) for i, r in enumerate(rollouts)
            ]
            mini_batches = self.pack(sequences, credit)
            for batch in (batch for mini_batch in mini_batches for batch in mini_batch):
                if len(mini_batches) > 1:  # a step of one update has pi_old = pi_theta: its own forward will do
                    batch.scores["old_logp"] = self.policy.score(batch, temperature).logp
                if self.reference is not None:
                    batch.scores["ref_logp"] = self.reference.score(batch, temperature).logp
        with self.timed("update"):
            updates = [self.update(mini_batch) for mini_batch in mini_batches]
        with self.timed("sync"):
            self.engine.sync(self.policy, version=step)
        self.step_done = step
        samples = [
            {"prompt": rows[i]["prompt"], "response": texts[i], "reward": scores[i].reward, "reason": scores[i].reason}
            for i in range(min(self.config.monitor.samples_per_step, len(rows)))
        ]
        return self.metrics(sequences, rollouts, scores, updates), samples

    def score(self, rows: list[dict[str, Any]], rollouts: list[Rollout]) -> tuple[list[str], list[Score]]:
        """Texts and rewards of all answers; the ranks share the work."""
        texts = self.tokenizer.batch_decode([r.response for r in rollouts], skip_special_tokens=True)
        mine = range(self.layout.rank, len(rows), self.layout.world)
        scores = score_all(self.reward, [rows[i] for i in mine], [texts[i] for i in mine])
        everyone = self.layout.gather_objects(scores)
        return texts, [everyone[i % self.layout.world][i // self.layout.world] for i in range(len(rows))]

    def pack(self, sequences: list[Sequence], credit: torch.Tensor) -> list[list[PackedBatch]]:
        """This rank's micro-batches, for each mini-batch (= update) of the step."""
        size = self.config.batch.mini_batch or len(sequences)
        multiple = self.layout.tp if self.layout.sequence_parallel else 1
        mini_batches = []
        for start in range(0, len(sequences), size):
            mine = split_data_parallel(sequences[start : start + size], self.layout.dp)[self.layout.dp_rank]
            groups = split_by_tokens(mine, self.config.batch.tokens_per_microbatch)
            mini_batches.append([pack(group, multiple, self.layout.device) for group in groups])
            for batch in mini_batches[-1]:
                batch.scores["credit"] = credit.to(self.layout.device)[batch.index]
        return mini_batches

    def update(self, mini_batch: list[PackedBatch]) -> dict[str, float]:
        """One optimizer step on the mean loss over the mini-batch's sequences, on all ranks together."""
        self.optimizer.zero_grad()
        reports = forward_backward(self.model, mini_batch, self.loss)
        metrics = self.reduce(reports)
        return metrics | self.optimizer.step(math.isfinite(metrics["loss"]))

    def loss(self, model: Any, batch: PackedBatch) -> tuple[torch.Tensor, int, dict[str, torch.Tensor]]:
        """The objective on one micro-batch: the sum over its sequences, their number, and per-sequence metrics."""
        output = model(batch, self.config.rollout.temperature)
        sequences = Sequences(
            logp=output.logp,
            old_logp=batch.scores.get("old_logp", output.logp.detach()),
            ref_logp=batch.scores.get("ref_logp"),
            log_z=output.log_z,
            cu_seqlens=batch.response_cu_seqlens,
            credit=batch.scores["credit"],
        )
        result = self.objective.loss(sequences)
        report = result.metrics | {
            "loss": result.loss_sum.detach()[None],
            "entropy": sequences.mean(output.entropy),
            "count": torch.tensor([result.count]),
        }
        return result.loss_sum, result.count, report

    def reduce(self, reports: list[dict[str, torch.Tensor]]) -> dict[str, float]:
        """Means over all sequences of an update ("max_..." metrics: maxima), the same on every rank."""
        names = sorted(reports[0])
        sums = torch.stack([torch.cat([r[name] for r in reports]).double().sum() for name in names])
        largest = torch.stack([torch.cat([r[name] for r in reports]).double().max() for name in names])
        if self.layout.dp > 1:
            dist.all_reduce(sums, group=self.layout.dp_group)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self.layout.dp_group)
        count = float(sums[names.index("count")])
        pairs = zip(names, sums.tolist(), largest.tolist(), strict=True)
        return {n: top if n.startswith("max_") else total / count for n, total, top in pairs if n != "count"}

    def metrics(
        self, sequences: list[Sequence], rollouts: list[Rollout], scores: list[Score], updates: list[dict[str, float]]
    ) -> dict[str, float]:
        """The step's line of metrics.jsonl; seconds, rates and memory differ from run to run."""
        merged = {name: _merge(name, [u[name] for u in updates if name in u]) for u in updates for name in u}
        lengths = [len(r.response) for r in rollouts]
        seconds = dict(self.seconds)
        total = sum(seconds.values())
        memory = psutil.Process().memory_info().rss
        if self.layout.device.type == "cuda":
            memory = torch.cuda.max_memory_allocated()
        return {
            "reward": sum(score.reward for score in scores) / len(scores),
            "reward_failed": float(sum(score.failed for score in scores)),
            "response_length": sum(lengths) / len(lengths),
            "stopped": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
            **merged,
            **{f"seconds/{phase}": value for phase, value in seconds.items()},
            "seconds/step": total,
            "tokens_per_second": sum(s.rows + 1 for s in sequences) / total,
            "generated_tokens_per_second": sum(lengths) / seconds["generate"],
            "memory_gb": memory / 1e9,
        }

    def evaluate(self) -> dict[str, float]:
        """Sampled answers to the held-out prompts. The seed does not depend on the step: evaluations compare."""
        assert self.held_out is not None
        k, prompts = self.config.evaluation.samples, self.held_out.prompts
        seed = derive_seed(self.config.seed, 0)
        rollouts = self.engine.generate([p.token_ids for p in prompts], k, self.sampling, seed)
        texts, scores = self.score([p.row for p in prompts for _ in range(k)], rollouts)
        return held_out_metrics(texts, scores, k)

    def save(self) -> None:
        save_checkpoint(
            Path(self.config.run_dir), self.policy, self.optimizer, {"step": self.step_done}, self.config.checkpoint.keep_last
        )

    def run(self, stop_requested: Any = lambda: False) -> bool:
        """Train to the last step; False when it stopped early on request, with a checkpoint saved."""
        config, first = self.config, self.step_done
        monitor = self._monitor(first)
        saved = first
        if first == 0:
            self._evaluate_when_due(monitor, 0)
        for step in range(first + 1, config.steps + 1):
            metrics, samples = self.step(step)
            if monitor:
                monitor.log(step, metrics)
                monitor.samples(step, samples)
            self._evaluate_when_due(monitor, step)
            stop = self._agree(stop_requested())
            last = step == config.steps
            every = config.checkpoint.every
            if stop or (every and step % every == 0) or (last and config.checkpoint.at_end):
                self.save()
                saved = step
            if stop and not last:
                break
        if monitor:
            monitor.close()
        return saved == config.steps or self.step_done == config.steps

    def _monitor(self, first: int) -> Monitor | None:
        """Rank 0's; the others log nothing."""
        if self.layout.rank != 0:
            return None
        config = self.config
        remove_unfinished(Path(config.run_dir))
        return Monitor(
            Path(config.run_dir), config.dump(), config.steps, first,
            config.monitor.wandb, config.monitor.wandb_project, config.monitor.progress,
        )  # fmt: skip

    def _evaluate_when_due(self, monitor: Monitor | None, step: int) -> None:
        every = self.config.evaluation.every
        if every and (step % every == 0 or step == self.config.steps):
            metrics = self.evaluate()
            if monitor:
                monitor.evaluation(step, metrics)

    def _agree(self, flag: bool) -> bool:
        """True on all ranks where it is true on one: ranks that stop at different steps would wait for ever."""
        shared = torch.tensor(float(flag))
        dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return bool(shared)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


def derive_seed(seed: int, step: int) -> int:
    """An own seed for each step, so that nothing random has to be remembered between steps."""
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])


def _merge(name: str, values: list[float]) -> float:
    """One value of a step's updates: their mean; counters and maxima their largest."""
    return max(values) if name.startswith("max_") or name == "skipped_updates" else sum(values) / len(values)
