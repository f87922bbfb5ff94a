"""What answers mean, by a real model of sentence-transformers: its vectors are transformers' own, and `eval` tells what
they come to."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import Job
from tiny_models import make
from transformers import AutoTokenizer, BertConfig, BertModel

from flowrl_mega.benchmark.samples import read_samples
from flowrl_mega.data.task import task_rows
from flowrl_mega.data.tokenizer import char_tokenizer
from flowrl_mega.evaluation.diversity import vendi
from flowrl_mega.evaluation.embeddings import embedder, similarities
from flowrl_mega.settings import ConfigError

pytest.importorskip("sentence_transformers", reason="the extra embeddings is not installed")
pytestmark = [pytest.mark.integration, pytest.mark.timeout(300)]


@pytest.fixture(scope="module")
def embeddings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small BERT of random weights, mean-pooled."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    bert, folder = tmp_path_factory.mktemp("bert"), tmp_path_factory.mktemp("embeddings")
    torch.manual_seed(0)
    tokenizer = char_tokenizer("0123456789+:")
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(bert)
    tokenizer.save_pretrained(bert)
    words = Transformer(str(bert))
    SentenceTransformer(modules=[words, Pooling(32)]).save(str(folder))
    return folder


def test_its_vectors_are_those_of_transformers(embeddings: Path) -> None:
    texts = ["1+2", "12+30", "99"]
    tokenizer, model = AutoTokenizer.from_pretrained(embeddings), BertModel.from_pretrained(embeddings).eval()
    expected = []
    for text in texts:
        with torch.no_grad():
            hidden = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        mean = hidden.mean(0)
        expected.append((mean / mean.norm()).numpy())
    np.testing.assert_allclose(embedder(str(embeddings))(texts), expected, atol=1e-5)


def test_an_evaluation_tells_what_its_answers_mean(tmp_path: Path, embeddings: Path) -> None:
    model = make("llama", tmp_path / "model", vocab=15)
    rows = task_rows("sums", {"lo": 10, "hi": 13})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({**row, "kind": "sums"}) + "\n" for row in rows))
    settings = {
        "run_dir": str(tmp_path / "run"),
        "benchmarks": [str(tmp_path / "sums.jsonl")],
        "k": 3,
        "model": {"path": str(model), "dtype": "fp32"},
        "rollout": {"max_tokens": 8},
        "embeddings": str(embeddings),
    }
    (tmp_path / "eval.yaml").write_text(json.dumps(settings))
    Job(["eval", str(tmp_path / "eval.yaml")], tmp_path / "log", world=1).run()
    found = json.loads((tmp_path / "run" / "scores.json").read_text())["benchmarks"]["sums"]["diversity"]
    embed, texts = embedder(str(embeddings)), dict[int, list[str]]()
    for sample in read_samples(tmp_path / "run"):
        texts.setdefault(sample.problem, []).append(sample.text)
    expected = np.mean([vendi(similarities(embed(of))) for of in texts.values()])
    assert found["vendi_embeddings"] == pytest.approx(expected, rel=1e-5)


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="embeddings = .*give its folder, or a name of the hub"):
        embedder(str(tmp_path))
