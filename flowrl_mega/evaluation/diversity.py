"""How much the answers to one problem differ: final answers, ways of solving, words.

Higher is more varied, but for self_bleu, where lower is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cache
from math import exp, nan
from typing import Any

import numpy as np

from flowrl_mega.evaluation.equations import equations, normal
from flowrl_mega.settings import ConfigError

Grams = Counter[tuple[str, ...]]


def distinct(votes: Iterable[str | None]) -> int:
    """How many different final answers there are; None, one that cannot be read, is none."""
    return len(set(votes) - {None})


def distinct_right(votes: Sequence[str | None], right: Sequence[bool]) -> int:
    """How many different final answers there are that are right in at least one attempt."""
    return distinct(vote for vote, is_right in zip(votes, right, strict=True) if is_right)


def solution_key(text: str, answer: str | None = None) -> tuple[str, ...]:
    """What says how a solution goes, so that equal keys are one way of solving: its equations, sorted, each once.

    A text without an equation has its final `answer` alone as the key, and one without either the empty key: by that
    key all attempts that say nothing are alike.
    """
    found = sorted(set(equations(text)))
    return tuple(found) if found or answer is None else (normal(answer),)


def clusters(texts: Sequence[str], answers: Sequence[str | None] | None = None) -> int:
    """How many different ways of solving there are, by `solution_key`; `answers` are the texts' final answers."""
    answers = [None] * len(texts) if answers is None else answers
    return len({solution_key(text, answer) for text, answer in zip(texts, answers, strict=True)})


def distinct_n(texts: Sequence[str], n: int) -> float:
    """The share of different ones among all runs of n words, of all texts together (Li et al. 2016, arXiv 1510.03055).

    Words are what spaces part. 0 where no text has n words.
    """
    grams = Counter[tuple[str, ...]]()
    for text in texts:
        grams += _grams(text.split(), n)
    return len(grams) / grams.total() if grams else 0.0


def self_bleu(texts: Sequence[str]) -> float:
    """The mean sentence BLEU of each text against all others (Zhu et al. 2018, arXiv 1802.01886), from 0 to 1.

    sacrebleu's words, smoothing and formula, and its result; but every text is read once and not once for each of the
    others. nan for fewer than two texts.
    """
    if len(texts) < 2:
        return nan
    bleu = _sentence_bleu()
    words = [bleu.tokenizer(text.rstrip()).split() for text in texts]
    orders = range(1, bleu.max_ngram_order + 1)
    correct = [[0] * len(orders) for _ in texts]
    for order in orders:
        counts = [_grams(of_text, order) for of_text in words]
        for found, own, others in zip(correct, counts, _most_elsewhere(counts), strict=True):
            found[order - 1] = sum(min(count, others[gram]) for gram, count in own.items())
    scores = []
    for at, own_words in enumerate(words):
        length = len(own_words)
        closest = min((len(other) for i, other in enumerate(words) if i != at), key=lambda n: (abs(n - length), n))
        total = [max(0, length - order + 1) for order in orders]
        score = bleu.compute_bleu(correct[at], total, length, closest, smooth_method="exp", effective_order=True)
        scores.append(score.score / 100)
    return sum(scores) / len(scores)


def _most_elsewhere(counts: Sequence[Grams]) -> list[Grams]:
    """For each text how often each of its runs of words is in that other text which has it most often."""
    most, second = Grams(), Grams()
    for own in counts:
        for gram, count in own.items():
            if count > most[gram]:
                most[gram], second[gram] = count, most[gram]
            elif count > second[gram]:
                second[gram] = count
    return [
        Counter({gram: (second if count == most[gram] else most)[gram] for gram, count in own.items()})
        for own in counts
    ]


def vendi(similarity: np.ndarray) -> float:
    """The Vendi score: the effective number of different ones (Friedman and Dieng 2023, arXiv 2210.02410).

    exp of the entropy of the eigenvalues of K / n, for K symmetric, positive semidefinite, with ones on its diagonal:
    1 where all are alike, n where no two have anything in common.
    """
    k = np.asarray(similarity, dtype=np.float64)
    if k.ndim != 2 or k.shape[0] != k.shape[1] or not k.size:
        raise ValueError(f"similarities of shape {k.shape}: must be a square matrix with a row for each")
    if not (np.allclose(k, k.T) and np.allclose(np.diagonal(k), 1)):
        raise ValueError("similarities must be symmetric, and that of each with itself 1")
    values = np.linalg.eigvalsh(k / len(k))
    if values[0] < -1e-6:
        raise ValueError(f"similarities with the eigenvalue {values[0] * len(k):.3g}: none may be negative")
    values = values[values > 0]
    return exp(-float(values @ np.log(values)))


def vendi_of_texts(texts: Sequence[str], orders: Sequence[int] = (1, 2, 3, 4)) -> float:
    """The Vendi score by words: similarity is the cosine of counts of runs of n words, its mean over n in `orders`.

    These orders are those of the authors' ngram_vendi_score, whose words are nltk's; here they are what spaces part. A
    text of fewer than n words is one run of its own, so that short texts are alike only where they are equal.
    """
    return vendi(np.mean([_cosines(texts, n) for n in orders], axis=0))


def _cosines(texts: Sequence[str], n: int) -> np.ndarray:
    words = [text.split() for text in texts]
    counts = [_grams(of_text, n) or Counter({tuple(of_text): 1}) for of_text in words]
    columns = {gram: at for at, gram in enumerate(dict.fromkeys(gram for of_text in counts for gram in of_text))}
    vectors = np.zeros((len(texts), len(columns)))
    for row, of_text in zip(vectors, counts, strict=True):
        row[[columns[gram] for gram in of_text]] = list(of_text.values())
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors @ vectors.T


def _grams(words: Sequence[str], n: int) -> Grams:
    return Counter(zip(*(words[start:] for start in range(n)), strict=False))


@cache
def _sentence_bleu() -> Any:
    """sacrebleu's BLEU for single sentences, with the settings of its sentence_bleu."""
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise ConfigError("self-BLEU needs sacrebleu; pip install flowrl-mega[eval]") from error
    return BLEU(effective_order=True)
