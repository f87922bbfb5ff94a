"""A real model through the converter: SmolLM2-135M-Instruct keeps its weights, its text and its training."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, records
from on_ranks import config_for
from rank_pool import RankPool
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from examples.smollm2.run import CONFIG
from flowrl_mega.checkpoint import load_model
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.rollout import EmbeddedEngine, generate

ROOT = Path(__file__).parents[2]
# The example with fewer and shorter answers (of twelve, one is right); a run ends in a checkpoint and its export.
SHORT = [
    "--steps=3", "--rollout.prompts_per_step=2", "--rollout.group_size=2", "--rollout.max_tokens=16",
    "--checkpoint.export_hf=true", "--monitor.progress=false",
]  # fmt: skip
QUESTIONS = (
    "What is gravity?",
    "Explain to a child why the sky is blue.",
    "Name the capital of France. Answer with one word.",
    "How do I sort a list of numbers in Python?",
    "What should I pack for a week in the mountains?",
)
pytestmark = [pytest.mark.integration, pytest.mark.ranks, pytest.mark.timeout(1800)]


def convert(command: str, **options: Any) -> str:
    """tools/convert_ckpt.py as a user starts it; gives what it said."""
    arguments = [f"--{name}={value}" for name, value in options.items()]
    tool = [sys.executable, "tools/convert_ckpt.py", command, *arguments]
    done = subprocess.run(tool, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def different(found: Path, wanted: Path) -> list[str]:
    """Tensors that are not the same to the bit in both folders, or are in one only."""
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (found, wanted))
    in_both = ours.keys() & theirs.keys()
    equal = {name for name in in_both if torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8))}
    return sorted((ours.keys() | theirs.keys()) - equal)


def files_beside_weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and ".safe" not in path.name}


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that does not outlive the tests: pytest would keep gigabytes."""
    folder = tmp_path_factory.mktemp("convert")
    yield folder
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def hf(smollm2: Path) -> Path:
    return smollm2


@pytest.fixture(scope="module")
def megatron(hf: Path, work: Path) -> Path:
    convert("hf2mcore", hf=hf, out=work / "megatron")
    return work / "megatron"


@pytest.mark.parametrize("tp", [1, 3])
def test_verify_says_that_they_are_the_same(tp: int, hf: Path, megatron: Path) -> None:
    """Its 9 heads share 3 key-value heads, so a third of them is the only real share."""
    said = convert("verify", hf=hf, ckpt=megatron, tp=tp)
    assert "272 compared: all equal" in said and said.endswith("\nthe same model\n")


def test_there_and_back(hf: Path, megatron: Path, work: Path) -> None:
    """Nothing that transformers needs is lost or changed on the way: weights, config, tokenizer, chat template."""
    convert("mcore2hf", ckpt=megatron, out=work / "back")
    assert different(work / "back", hf) == []
    assert files_beside_weights(work / "back") == files_beside_weights(hf)
    ours, theirs = (chat_prompts(folder) for folder in (work / "back", hf))
    assert ours == theirs and len(theirs[0]) > 20


def chat_prompts(folder: Path) -> list[list[int]]:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [[{"role": "user", "content": question}] for question in QUESTIONS]
    return [tokenizer.apply_chat_template(m, add_generation_prompt=True)["input_ids"] for m in messages]


def answers_of_policy(path: Path, prompts: list[list[int]], tokens: int, end: int) -> list[list[int]]:
    """In a rank: training's own policy, filled from `path`, and training's own generation, without its randomness."""
    config = config_for(path)
    layout = layouts.init(config.parallel, config.seed)
    policy = Policy(read_architecture(path), config, layout, log_z=None)
    load_model(policy, path)
    engine = EmbeddedEngine(layout)
    engine.sync(policy, version=0)
    return [r.response for (r,) in generate(engine, prompts, 1, Sampling(tokens, 0.0, stop_ids=(end,)), seed=0)]


def test_the_same_greedy_text_as_from_transformers(hf: Path, megatron: Path, ranks1: RankPool) -> None:
    """Rounding, 1e-4 at most, would decide between two best tokens that are nearly equal; the gaps show none are."""
    prompts, tokens = chat_prompts(hf), 32
    model = AutoModelForCausalLM.from_pretrained(hf, dtype=torch.float32)
    wanted, gaps, end = [], [], model.generation_config.eos_token_id
    for prompt in prompts:
        ids = torch.tensor([prompt])
        said = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False,
            return_dict_in_generate=True, output_logits=True,
        )  # fmt: skip
        wanted.append(said.sequences[0, len(prompt) :].tolist())
        best, second = torch.cat(said.logits).topk(2).values.T
        gaps.append((best - second).min().item())
    (found,) = ranks1.run(answers_of_policy, megatron, prompts, tokens, end, timeout=300)
    assert found == wanted, gaps
    assert min(gaps) > 1e-3
    assert sorted(len(answer) for answer in wanted)[1:] == [tokens] * 4, "and one that ends by itself"


def start(run: Path, model: Path, *settings: str, world: int = 1) -> Job:
    """The example in the folder `run`, from this model."""
    arguments = ["train", str(CONFIG), f"--model.path={model}", f"--run_dir={run}", *SHORT, *settings]
    return Job(arguments, run.with_suffix(".log"), world=world, cwd=ROOT)


def finish(*jobs: Job) -> None:
    """Wait for all, so that none is left when one has failed."""
    for job in jobs:
        job.wait(timeout=900)
    for job in jobs:
        job.run()


@pytest.fixture(scope="module")
def runs(hf: Path, megatron: Path, work: Path) -> tuple[Path, Path]:
    """From the Hugging Face folder and from the converted checkpoint, one beside the other."""
    finish(start(work / "run_hf", hf), start(work / "run_megatron", megatron))
    return work / "run_hf", work / "run_megatron"


def test_the_example_trains_as_it_does_from_the_folder(runs: tuple[Path, Path]) -> None:
    """To the last bit of every metric and every sampled text, and to the same weights."""
    wanted, found = runs
    for name in ("metrics", "samples"):
        assert records(found, name) == records(wanted, name)
    metrics = records(found, "metrics")
    assert [row["step"] for row in metrics] == [1, 2, 3]
    assert len({row["loss/policy"] for row in metrics}) == len({row["loss/log_z"] for row in metrics}) == 3
    assert all(math.isfinite(row["loss/policy"]) and row["policy/grad_norm"] > 0 for row in metrics)
    assert not any(row["policy/skipped_updates"] for row in metrics)
    assert different(found / "checkpoints/step_3/hf", wanted / "checkpoints/step_3/hf") == []


def test_the_trained_policy_is_exported(runs: tuple[Path, Path], hf: Path, work: Path) -> None:
    """As a model that transformers loads and computes as the policy does, and that is no longer the original."""
    checkpoint = runs[1] / "checkpoints" / "step_3"
    exported = checkpoint / "hf"
    _, report = AutoModelForCausalLM.from_pretrained(exported, output_loading_info=True)
    assert not any(report.values()), report
    assert chat_prompts(exported) == chat_prompts(hf)
    assert files_beside_weights(exported) == files_beside_weights(hf)
    original = load_file(hf / "model.safetensors").keys()
    assert different(exported, hf) == sorted(original), "all of them were trained, and there are no others"
    log_z = load_file(exported / "log_z" / "log_z.safetensors")
    assert log_z and all(tensor.isfinite().all() for tensor in log_z.values())
    with ThreadPoolExecutor() as pool:
        converted = pool.submit(convert, "mcore2hf", ckpt=checkpoint, out=work / "converted")
        said = convert("verify", hf=exported, ckpt=checkpoint)
        converted.result()
    assert said.endswith("\nthe same model\n")
    assert different(work / "converted", exported) == []
    assert files_beside_weights(work / "converted") == files_beside_weights(exported)


def test_a_new_run_starts_from_the_trained_checkpoint(runs: tuple[Path, Path], work: Path) -> None:
    """On another number of ranks than it was saved on; up to rounding it is the run that starts from the export."""
    checkpoint, only_one = runs[1] / "checkpoints" / "step_3", ["--steps=1", "--checkpoint.at_end=false"]
    finish(
        start(work / "again", checkpoint, *only_one, "--parallel.tp=3", world=3),
        start(work / "again_hf", checkpoint / "hf", *only_one),
    )
    (found,), (wanted,) = (records(work / run, "metrics") for run in ("again", "again_hf"))
    for name in ("loss/policy", "loss/log_z", "policy/mean_logp", "policy/entropy", "policy/grad_norm"):
        assert found[name] == pytest.approx(wanted[name], rel=1e-3), name
    assert found["policy/mean_log_ratio_to_ref"] == pytest.approx(0, abs=1e-6), "policy = reference"
    untrained = records(runs[1], "metrics")[0]
    assert abs(found["policy/mean_logp"] - untrained["policy/mean_logp"]) > 1e-2, "the same prompts, but other weights"
