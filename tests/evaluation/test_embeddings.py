"""Groups of answers by their embeddings: by hand, and whatever their order; what is missing is named."""

from __future__ import annotations

import builtins
import itertools
import math
from typing import Any

import numpy as np
import pytest

from flowrl_mega.benchmark.samples import Sample
from flowrl_mega.benchmark.scores import diversity_of_meaning
from flowrl_mega.evaluation.embeddings import clusters_of, embedder, similarities
from flowrl_mega.settings import ConfigError


def angles(*degrees: float) -> np.ndarray:
    """Unit vectors in the plane."""
    return np.array([[math.cos(math.radians(d)), math.sin(math.radians(d))] for d in degrees])


@pytest.mark.parametrize(
    ("degrees", "groups"),
    [
        ((0,), 1),
        ((0, 20, 40), 1),  # cos 20 = 0.94, cos 40 = 0.77: the one between joins them
        ((0, 40), 2),
        ((0, 1, 90, 91, 180), 3),
        ((0, 26), 2),  # cos 26 = 0.899
        ((0, 25), 1),  # cos 25 = 0.906
    ],
)
def test_what_is_alike_is_one_group_in_any_order(degrees: tuple[float, ...], groups: int) -> None:
    for order in itertools.permutations(degrees):
        assert clusters_of(similarities(angles(*order))) == groups
    assert clusters_of(np.zeros((0, 0))) == 0


def sample(problem: int, attempt: int, text: str, right: bool) -> Sample:
    kind = "right" if right else "wrong"
    return Sample("own", problem, attempt, text, 1, "stop", None, float(right), right, kind, kind)


def test_the_figures_of_a_benchmark() -> None:
    """Means over problems; groups count among right answers, and problems without any do not count there."""
    places = {"a": 0.0, "b": 10.0, "c": 90.0, "d": 180.0}
    samples = [
        *(sample(0, i, text, right) for i, (text, right) in enumerate([("a", True), ("b", True), ("c", False)])),
        *(sample(1, i, text, False) for i, text in enumerate("aaa")),
        *(sample(2, i, text, True) for i, text in enumerate("acd")),
    ]
    found = diversity_of_meaning(samples, 3, lambda texts: angles(*(places[text] for text in texts)))
    assert found["right_clusters_embeddings"] == (1 + 3) / 2
    first = diversity_of_meaning(samples[:3], 3, lambda texts: angles(*(places[text] for text in texts)))
    third = diversity_of_meaning(samples[6:], 3, lambda texts: angles(*(places[text] for text in texts)))
    assert 1.5 < first["vendi_embeddings"] < 2.5
    mean = (first["vendi_embeddings"] + 1.0 + third["vendi_embeddings"]) / 3
    assert found["vendi_embeddings"] == pytest.approx(mean, rel=1e-9)
    none_right = diversity_of_meaning(samples[3:6], 2, lambda texts: angles(*(places[text] for text in texts)))
    assert none_right == {"vendi_embeddings": pytest.approx(1.0)}


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *arguments: Any, **more: Any) -> Any:
        if name == "sentence_transformers":
            raise ImportError(name)
        return real(name, *arguments, **more)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install flowrl-mega\[embeddings\]"):
        embedder("any")
