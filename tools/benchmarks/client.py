"""Tokens a second through our client against SGLang's own benchmark client, in turns, on one running server.

    python tools/benchmarks/client.py --model DIR --python SERVER_PYTHON [--prompts 128] [--prompt-tokens 32]
        [--tokens 128] [--concurrency 32] [--rounds 3] [--ours training|eval] [--json FILE]

Both ask for the same: so many prompts of random ids, answers of exactly `--tokens` tokens with their log-probs, not
streamed, at most `--concurrency` under way, temperature 1. `theirs` is `python -m sglang.benchmark.serving`; its clock
starts after its imports. `ours` is the engine of training, attached to the server: from `start` to the end of
`finish`, validation and checks of the answers included; or what `flowrl-mega eval` sends its prompts by, each answer
decoded and written to the disk. Speeds are medians over the rounds, which begin with the other
each time; the ratio is the median of the rounds' ratios.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from workload import machine, turns, write

GOAL = 0.95  # of their speed, at least
# It imports torchvision, whose operators do not load beside a torch without CUDA, and datasets, which it does not need.
THEIRS = """
import importlib.util, runpy, sys, torch, types
if not importlib.util.find_spec("datasets"):
    sys.modules["datasets"] = types.ModuleType("datasets")
    sys.modules["datasets"].load_dataset = None
if not torch.cuda.is_available():
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
runpy.run_module("sglang.benchmark.serving", run_name="__main__", alter_sys=True)
"""


def main() -> None:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="client-") as folder:
        row = measure(options, Path(folder))
    met = "" if row["ratio"] >= GOAL else f"  goal {GOAL:g} missed"
    print(f"theirs {row['theirs']:,.0f} tok/s, ours {row['ours']:,.0f} tok/s, {row['ratio']:.3f}x{met}")
    versions = machine("torch", "aiohttp") | {"sglang": row.pop("sglang"), "goal": GOAL}
    write(options.json, versions, [row])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Our client against SGLang's own, on one server.")
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--python", required=True, help="interpreter that has sglang")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=128, help="new ones an answer")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ours", choices=["training", "eval"], default="training", help="which of our clients")
    parser.add_argument("--server-args", type=json.loads, default={}, help="SGLang's flags, as JSON")
    parser.add_argument("--json")
    return parser


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from flowrl_mega.config import RolloutSettings
    from flowrl_mega.rollout.sglang.flags import sglang_version
    from flowrl_mega.rollout.sglang.fleet import Fleet

    on_cpu = {"max_total_tokens": 16384, "mem_fraction_static": 0.3} if not has_gpu() else {}
    server_args = {**on_cpu, "skip_server_warmup": True, **options.server_args}
    settings = RolloutSettings(engine="sglang", servers=1, python=options.python, server_args=server_args)
    fleet = Fleet(
        settings, Path(options.model), folder, "fp32" if on_cpu else "bf16", trainer_gpus=0, load_format="auto"
    )
    fleet.start()
    try:
        ours = (Ours if options.ours == "training" else OursOfEval)(options, fleet.urls[0], folder)
        work = {"theirs": lambda seed: theirs(options, fleet.urls[0], folder, seed), "ours": ours.run}
        for run in work.values():
            run(0)  # to warm up
        speeds: dict[str, list[float]] = {"theirs": [], "ours": []}
        for name in turns(work, options.rounds):
            speeds[name].append(work[name](len(speeds[name]) + 1))
        ours.close()
    finally:
        fleet.close()
    ratios = [mine / other for mine, other in zip(speeds["ours"], speeds["theirs"], strict=True)]
    names = ("prompts", "prompt_tokens", "tokens", "concurrency", "rounds")
    return {
        **{name: getattr(options, name) for name in names},
        "client": options.ours,
        **{name: statistics.median(values) for name, values in speeds.items()},
        "ratio": statistics.median(ratios),
        "samples": speeds,
        "sglang": sglang_version(options.python),
    }


def has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def theirs(options: argparse.Namespace, url: str, folder: Path, seed: int) -> float:
    """Output tokens a second, as they report them; every prompt must have been answered."""
    out = folder / f"theirs_{seed}.jsonl"
    flags = {
        "backend": "sglang", "base-url": url, "model": options.model, "dataset-name": "random-ids",
        "num-prompts": options.prompts, "random-input-len": options.prompt_tokens,
        "random-output-len": options.tokens, "random-range-ratio": 1.0, "max-concurrency": options.concurrency,
        "temperature": 1.0, "seed": seed, "output-file": out, "warmup-requests": 0,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    switches = ["--tokenize-prompt", "--disable-stream", "--return-logprob", "--disable-tqdm"]
    command = [options.python, "-c", THEIRS, *words, *switches]
    with tempfile.TemporaryFile("w+") as output:
        result = subprocess.run(command, stdout=output, stderr=output, stdin=subprocess.DEVNULL, timeout=1800)
        if result.returncode or not out.exists():
            output.seek(0)
            sys.exit(f"sglang.benchmark.serving failed:\n{output.read()[-4000:]}")
    found = json.loads(out.read_text().splitlines()[-1])
    assert (found["completed"], found["total_output_tokens"]) == (options.prompts, options.prompts * options.tokens)
    return found["output_throughput"]


class Ours:
    """The engine of training, attached to the server."""

    def __init__(self, options: argparse.Namespace, url: str, folder: Path) -> None:
        from flowrl_mega.config import Config
        from flowrl_mega.model.architecture import read_architecture
        from flowrl_mega.model.policy import Policy
        from flowrl_mega.model.weights import load_hf
        from flowrl_mega.parallel import layout as layouts
        from flowrl_mega.parallel.launch import rank_environment
        from flowrl_mega.rollout.sglang.engine import SglangEngine
        from flowrl_mega.settings import validated

        os.environ.update(rank_environment(0, 1))
        tree = {
            "run_dir": str(folder), "steps": 1, "reward": "-",
            "model": {"path": options.model}, "data": {"task": "sums"},
            "rollout": {"engine": "sglang", "servers": [url], "concurrency": options.concurrency,
                        "sync": {"transfer": "disk", "checksum_every": 0}},
        }  # fmt: skip
        config = validated(Config, tree, "")
        layout = layouts.init(config.parallel, seed=0)
        self.options, self.arch = options, read_architecture(options.model)
        policy = Policy(self.arch, config, layout, None)
        load_hf(policy, options.model)
        files = {file.name: file.read_bytes() for file in Path(options.model).glob("*.json")}
        self.engine = SglangEngine(config, layout, self.arch, files, 0)
        self.engine.sync(policy, version=0)

    def run(self, seed: int) -> float:
        """Output tokens a second."""
        from flowrl_mega.model.generation import Sampling
        from flowrl_mega.rollout.engine import Request

        options = self.options
        requests = [Request(prompt, 1, options.tokens) for prompt in random_prompts(options, self.arch.vocab, seed)]
        start = time.perf_counter()
        rollouts = self.engine.finish(self.engine.start(requests, Sampling(options.tokens), seed))
        seconds = time.perf_counter() - start
        assert all(len(rollout.response) == options.tokens for of in rollouts for rollout in of)
        return options.prompts * options.tokens / seconds

    def close(self) -> None:
        from flowrl_mega.parallel import layout as layouts

        self.engine.close()
        layouts.shutdown()


class OursOfEval:
    """What `flowrl-mega eval` has for servers at their URLs."""

    def __init__(self, options: argparse.Namespace, url: str, folder: Path) -> None:
        from flowrl_mega.benchmark.servers import ServersWriter
        from flowrl_mega.config_eval import EvalConfig
        from flowrl_mega.data.load_prompts import load_tokenizer
        from flowrl_mega.model.architecture import read_architecture

        self.options, self.folder, self.arch = options, folder, read_architecture(options.model)
        tree = {
            "run_dir": str(folder), "benchmarks": ["random"], "k": 1, "model": {"path": options.model},
            "rollout": {"engine": "sglang", "servers": [url], "concurrency": options.concurrency,
                        "max_tokens": options.tokens, "temperature": 1.0, "top_p": 1.0},
        }  # fmt: skip
        tokenizer = load_tokenizer(options.model)
        self.writer = ServersWriter(EvalConfig.model_validate(tree), self.arch, tokenizer, ends=(), model=None)

    def run(self, seed: int) -> float:
        """Output tokens a second."""
        from flowrl_mega.benchmark.answers import AnswerFile, read_answers
        from flowrl_mega.benchmark.writer import Work

        options, folder = self.options, self.folder / f"ours_{seed}"
        prompts = random_prompts(options, self.arch.vocab, seed)
        start = time.perf_counter()
        file = AnswerFile(folder, 0)
        self.writer.write(Work("random", prompts, [[0]] * len(prompts)), file.add, lambda: False)
        file.close()
        seconds = time.perf_counter() - start
        assert [answer.tokens for answer in read_answers(folder).values()] == [options.tokens] * options.prompts
        return options.prompts * options.tokens / seconds

    def close(self) -> None:
        self.writer.close()


def random_prompts(options: argparse.Namespace, vocab: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(vocab) for _ in range(options.prompt_tokens)] for _ in range(options.prompts)]


if __name__ == "__main__":
    main()
