"""A judge's verdicts on how varied the attempts at each problem are. Each is kept as it comes, in RUN_DIR/judged.jsonl,
and asked for again only where the attempts, the model or the words of the question are others."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from statistics import fmean
from typing import Any

from flowrl_mega.benchmark.chat import model_of
from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.benchmark.samples import Sample
from flowrl_mega.config_eval import JudgeSettings
from flowrl_mega.evaluation.judge import judge_messages, read_verdict
from flowrl_mega.rollout.chat import Ask, ChatAnswer, ChatServer, ask_all
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.attached import read_key_file

FILE = "judged.jsonl"


class Judge:
    """For one thread; `close` ends it."""

    def __init__(self, settings: JudgeSettings, run_dir: Path) -> None:
        self.settings, self.path = settings, run_dir / FILE
        self.server = ChatServer(settings.url, read_key_file(settings.api_key_file, "judge.api_key_file"))
        self.loop = LoopThread()
        try:
            self.model = self.loop.call(model_of([self.server], settings.model, "judge.model"))
        except BaseException:
            self.close()
            raise

    def scores(self, problems: Problems, samples: Sequence[Sample]) -> dict[str, Any]:
        """Of one benchmark's samples, sorted by problem and attempt: the mean verdict over the problems that have one,
        each problem's, and how many have none."""
        by_problem = [(i, [s.text for s in of]) for i, of in groupby(samples, key=lambda sample: sample.problem)]
        questions = [judge_messages(_text(problems.rows[i]["prompt"]), texts) for i, texts in by_problem]
        asks = [Ask(messages, self.model, self.settings.max_tokens, temperature=0.0) for messages in questions]
        keys, said = [_key(ask) for ask in asks], self._kept()
        missing = [i for i, key in enumerate(keys) if key not in said]
        with self.path.open("a", encoding="utf-8", errors="replace") as file:

            def on_answer(at: int, answer: ChatAnswer) -> None:
                said[keys[missing[at]]] = answer.text
                file.write(json.dumps({"asked": keys[missing[at]], "said": answer.text}, ensure_ascii=False) + "\n")
                file.flush()

            left, under_way = [asks[i] for i in missing], self.settings.concurrency
            timeout_s = self.settings.timeout_s
            self.loop.call(ask_all([self.server], left, on_answer, under_way=under_way, timeout_s=timeout_s))
        verdicts = [read_verdict(said[key]) for key in keys]
        known = [verdict for verdict in verdicts if verdict is not None]
        mean = fmean(known) if known else None
        return {"model": self.model, "mean": mean, "no_verdict": verdicts.count(None), "verdicts": verdicts}

    def close(self) -> None:
        self.loop.call(self.server.close())
        self.loop.close()

    def _kept(self) -> dict[str, str]:
        """What was said before; a last line that a kill has cut is taken off."""
        if not self.path.exists():
            return {}
        whole, end, _ = self.path.read_bytes().rpartition(b"\n")
        self.path.write_bytes(whole + end)
        rows = map(json.loads, whole.decode().split("\n")) if whole else ()
        return {row["asked"]: row["said"] for row in rows}


def _text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else "\n\n".join(message["content"] for message in prompt)


def _key(ask: Ask) -> str:
    return hashlib.sha256(json.dumps([ask.model, list(ask.messages), ask.max_tokens]).encode()).hexdigest()[:24]
