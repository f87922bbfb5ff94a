"""The `eval` command: write what is missing of the answers, grade all of them, and tell the scores."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from flowrl_mega.benchmark import codeforces
from flowrl_mega.benchmark.answers import ABOUT, Answer, AnswerFile, Place, about, check_about, read_answers
from flowrl_mega.benchmark.judged import Judge
from flowrl_mega.benchmark.policy import Evaluated, build_writer, prepare, work_of
from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.benchmark.samples import SAMPLES, Sample, describe_grader, grade, write_samples
from flowrl_mega.benchmark.scores import diversity_of_meaning, entropy, scores, table
from flowrl_mega.benchmark.table import load
from flowrl_mega.checkpoint.progress import Progress
from flowrl_mega.config import ConfigError, ParallelSettings
from flowrl_mega.config_eval import EvalConfig, JudgeSettings
from flowrl_mega.evaluation.embeddings import embedder
from flowrl_mega.launched import started_by_launcher
from flowrl_mega.monitor.machine import machine, versions
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.launch import launch, rank_environment
from flowrl_mega.parallel.layout import raise_on_all_ranks
from flowrl_mega.rewards.load import Reward, load_reward
from flowrl_mega.rewards.scorer import Scorer
from flowrl_mega.run_lock import run_lock
from flowrl_mega.whole_file import write_whole

DONE, STOPPED = 0, 75
SCORES, TABLE = "scores.json", "scores.md"


def evaluate(
    config: EvalConfig,
    arguments: list[str],
    regrade: bool,
    dry_run: bool,
    checked: bool,
    stop_requested: Callable[[], bool],
) -> int:
    """The command; returns the exit code. `arguments` are the command line's, for ranks that we start.

    `regrade`: grade what is stored once more, without a model. `checked`: a rank whose parent holds the folder's lock.
    """
    is_rank, run_dir = started_by_launcher(), Path(config.run_dir)
    every, reward = load(config.benchmarks, config.data, config.problems, config.seed), load_reward(config.reward)
    world = _world(config, is_rank, regrade)
    evaluated = None if regrade or config.rollout.engine == "chat" else prepare(config, every)
    words = describe_grader(reward, every)
    if dry_run:
        print(describe(config, every))
        return DONE
    holds = not checked and (not is_rank or os.environ["RANK"] == "0")
    with run_lock(run_dir) if holds else nullcontext():
        if holds:
            now = about(config, every)
            check_about(run_dir, {"benchmarks": now["benchmarks"]} if regrade else now)
            if words:
                print(f"rewards: {words}", flush=True)
        if world > 1 and not is_rank:
            return launch([sys.executable, "-m", "flowrl_mega.cli", *arguments, "--checked"], world)
        return Evaluation(config, every, reward, evaluated, stop_requested).run(regrade)


def _world(config: EvalConfig, is_rank: bool, regrade: bool) -> int:
    """The ranks of this job. Only the embedded engine has more than one."""
    started = int(os.environ["WORLD_SIZE"]) if is_rank else 1
    if config.rollout.engine == "embedded" and not regrade:
        gpus = torch.cuda.device_count() if torch.cuda.is_available() else None
        world = started if is_rank else layouts.world_size(config.parallel, gpus, sys.maxsize)
        layouts.check_world(config.parallel, world)
        return world
    if started > 1:
        raise ConfigError(
            f"{started} ranks: {'--regrade' if regrade else f'rollout.engine = {config.rollout.engine}'} takes one "
            "process; start it alone, and for servers on other nodes give their URLs (rollout.servers)"
        )
    return 1


def describe(config: EvalConfig, every: list[Problems]) -> str:
    """What would be asked, what is there already."""
    there, rollout = read_answers(Path(config.run_dir)), config.rollout
    lines = [
        f"run_dir {config.run_dir}; engine {rollout.engine}; model {config.model.path or config.model.name or 'first'}",
        f"k {config.k}, temperature {rollout.temperature:g}, top_p {rollout.top_p:g}, max_tokens {rollout.max_tokens}",
    ]
    for problems in every:
        have = len([place for place in there if _wanted(place, problems, config)])
        known = "as published" if problems.is_known else f"sum {problems.sum}, not compared"
        lines.append(
            f"  {problems.title}: {len(problems.rows)} problems x {config.k} answers, {have} there "
            f"({problems.source}; {known})"
        )
    return "\n".join(lines)


def _wanted(place: Place, problems: Problems, config: EvalConfig) -> bool:
    return place.benchmark == problems.name and place.problem < len(problems.rows) and place.attempt < config.k


class Evaluation:
    """One rank's part of it. Methods are collective."""

    def __init__(
        self,
        config: EvalConfig,
        every: list[Problems],
        reward: Reward,
        evaluated: Evaluated | None,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.config, self.every, self.reward, self.evaluated = config, every, reward, evaluated
        self.run_dir, self.stop_requested = Path(config.run_dir), stop_requested
        if "RANK" not in os.environ:
            os.environ.update(rank_environment(0, 1))
        embedded = config.rollout.engine == "embedded" and evaluated is not None
        self.layout = layouts.init(config.parallel if embedded else ParallelSettings(), config.seed)
        with raise_on_all_ranks():  # before anything is generated
            self.embed = embedder(config.embeddings) if config.embeddings and not self.layout.rank else None

    def run(self, regrade: bool) -> int:
        if not regrade and not self._write():
            if self.layout.rank == 0:
                print(f"stopped on request; {len(self._there())} answers are kept, and the same command goes on")
            return STOPPED
        self._score()
        layouts.shutdown()
        return DONE

    def _write(self) -> bool:
        """Write all answers that are missing; False where the job is to stop before that."""
        there = self.layout.broadcast_from_rank0(self._there())
        every = [work_of(problems, self._missing(problems, there), self.evaluated) for problems in self.every]
        total = sum(len(work.places) for work in every)
        if not total:
            return True
        writer = build_writer(self.config, self.evaluated, self.layout)
        file = AnswerFile(self.run_dir, self.layout.rank)
        share = "" if self.layout.world == 1 else f", rank 0 of {self.layout.world}"
        progress = Progress(f"answers{share}", total // self.layout.world, unit="") if not self.layout.rank else None

        def done(place: Place, answer: Answer) -> None:
            file.add(place, answer)
            if progress:
                progress(1)

        try:
            for work in every:
                if work.places and not writer.write(work, done, self.stop_requested):
                    return False
        finally:
            writer.close()
            file.close()
            if progress:
                progress.close()
        return True

    def _missing(self, problems: Problems, there: set[Place]) -> list[list[int]]:
        """The attempts that are not there, by problem."""
        attempts, count = range(self.config.k), len(problems.rows)
        return [[a for a in attempts if Place(problems.name, i, a) not in there] for i in range(count)]

    def _there(self) -> set[Place]:
        return set(read_answers(self.run_dir)) if self.layout.rank == 0 else set()

    def _score(self) -> None:
        """Grade all answers anew, and write samples.jsonl, scores.json and scores.md."""
        with raise_on_all_ranks():
            answers = read_answers(self.run_dir)
            self._check_all_there(answers)
        scorer = Scorer(self.reward, self.config.reward, self.layout)
        try:
            samples: dict[str, list[Sample]] = {}
            for problems in self.every:
                kept = {place: answer for place, answer in answers.items() if _wanted(place, problems, self.config)}
                samples[problems.name] = grade(problems, kept, scorer)
        finally:
            scorer.close()
        with raise_on_all_ranks():
            if self.layout.rank == 0:
                write_samples(self.run_dir, [sample for of in samples.values() for sample in of])
                found = {problems.name: self._scores(problems, samples[problems.name]) for problems in self.every}
                for name, of in found.items():
                    of["diversity"] |= entropy(answers[Place(name, s.problem, s.attempt)] for s in samples[name])
                self._record(found)
                if self.config.judge:
                    self._judge(self.config.judge, samples, found)
                    self._record(found)
                print(f"\n{table(found)}\n{self.run_dir}: {SCORES}, {TABLE}; the answers with their grades: {SAMPLES}")

    def _scores(self, problems: Problems, samples: list[Sample]) -> dict[str, Any]:
        about_it = {name: getattr(problems, name) for name in ("title", "source", "sum", "is_known")}
        found = about_it | scores(samples, self.config.k, slow=self.config.diversity == "all")
        if self.embed:
            found["diversity"] |= diversity_of_meaning(samples, self.config.k, self.embed)
        if problems.name == codeforces.NAME:
            right = ((sample.problem, sample.right) for sample in samples)
            found |= codeforces.rating(Path(problems.source), problems.rows, right, self.config.k)
        return found

    def _judge(self, settings: JudgeSettings, samples: dict[str, list[Sample]], found: dict[str, Any]) -> None:
        judge = Judge(settings, self.run_dir)
        try:
            for problems in self.every:
                found[problems.name]["judge"] = judge.scores(problems, samples[problems.name])
        finally:
            judge.close()

    def _check_all_there(self, answers: dict[Place, Answer]) -> None:
        for problems in self.every:
            for i in range(len(problems.rows)):
                have = sum(Place(problems.name, i, a) in answers for a in range(self.config.k))
                if have < self.config.k:
                    raise ConfigError(
                        f"k = {self.config.k}: {self.run_dir} holds {have} answers to problem {i} of {problems.title}; "
                        "leave out --regrade to have the others written, or take a smaller k"
                    )

    def _record(self, found: dict[str, Any]) -> None:
        record = {
            "benchmarks": found,
            "settings": self.config.model_dump(mode="json"),
            "answers_of": json.loads((self.run_dir / ABOUT).read_text()),
            "versions": versions(),
            "machine": machine(),
            "ended": time.strftime("%F %T"),
        }
        write_whole(self.run_dir / SCORES, json.dumps(record, indent=1, ensure_ascii=False) + "\n")
        write_whole(self.run_dir / TABLE, table(found))
