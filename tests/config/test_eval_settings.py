"""The settings of an evaluation: the paper's by default, and wrong ones refused by name before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from flowrl_mega.benchmark.table import BENCHMARKS
from flowrl_mega.config import ConfigError
from flowrl_mega.config_file import load_eval_config

PLAIN = {"run_dir": "run", "benchmarks": ["aime24"], "model": {"path": "model"}}


def load(folder: Path, *overrides: str, **changes: object):
    (folder / "eval.yaml").write_text(yaml.safe_dump(PLAIN | changes))
    return load_eval_config(folder / "eval.yaml", overrides)


def test_the_defaults_are_the_papers(tmp_path: Path) -> None:
    """arXiv 2509.15207, evaluation: 16 samples, T = 0.6, top_p = 0.95, answers of 8192 tokens."""
    config = load(tmp_path)
    rollout = config.rollout
    assert (config.k, rollout.temperature, rollout.top_p, rollout.max_tokens) == (16, 0.6, 0.95, 8192)
    assert config.reward.function == "flowrl_mega.rewards.by_kind:score"


def test_the_example_takes_a_model_and_a_folder() -> None:
    example = Path(__file__).parents[2] / "examples" / "eval.yaml"
    config = load_eval_config(example, ["--model.path=model", "--data=folder"])
    assert set(config.benchmarks) <= BENCHMARKS.keys() and len(config.benchmarks) == 6
    with pytest.raises(ConfigError, match=r"model.path: missing"):
        load_eval_config(example)


def test_flags_win_and_texts_stay_texts(tmp_path: Path) -> None:
    config = load(tmp_path, "--k=4", "--model.path=007", "--rollout.temperature=1", "--reward=my.py:score")
    assert (config.k, config.model.path, config.rollout.temperature) == (4, "007", 1.0)
    assert config.reward.function == "my.py:score"


CHAT = "--rollout={engine: chat, servers: ['http://127.0.0.1:1']}"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["--kk=4"], "kk: no such setting; did you mean 'k'?"),
        (["--k=0"], "k = 0: "),
        (["--benchmarks=[]"], "benchmarks = []: "),
        (["--benchmarks=[aime24, aime24]"], "benchmarks: 'aime24' is there twice"),
        (["--model.path=null"], "model.path: missing; give a Hugging Face folder"),
        (["--rollout.engine=sglang", "--rollout.servers=[]"], "rollout.servers = []: give at least one URL"),
        (["--rollout.engine=sglang", "--rollout.servers=[localhost]"], "'localhost' is no URL"),
        (["--rollout.engine=sglang", "--rollout.api_key_file=none"], "rollout.api_key_file = 'none': no such file"),
        (["--rollout.engine=chat", "--model.path=null"], "rollout.servers = 1: chat servers are not started here"),
        ([CHAT, "--model.path=null", "--rollout.top_k=5"], "rollout.top_k = 5: is not in OpenAI's protocol"),
        (["--rollout.servers=2"], "rollout.servers = 2: is read with rollout.engine=sglang or chat only"),
        (["--rollout.engine=sglang", "--parallel.dp=2"], "parallel.dp = 2: is read with rollout.engine=embedded only"),
        (["--model.name=x"], "model.name = 'x': is read with rollout.engine=chat only"),
        ([CHAT], "model.path = 'model': is read with rollout.engine=embedded or sglang only"),
        (["--judge.url=localhost"], "judge.url = 'localhost': is no URL"),
        (["--judge.url=http://x", "--k=1"], "judge: k = 1: what differs can only be judged of several attempts"),
        (["--judge={url: 'http://x', api_key_file: none}"], "judge.api_key_file = 'none': no such file"),
        (["--reward.overlong={buffer: 1}"], "reward.overlong: a penalty of training"),
    ],
)
def test_refused(tmp_path: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        load(tmp_path, *overrides)
    assert said in str(refusal.value)
