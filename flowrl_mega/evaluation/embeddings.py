"""How much answers differ in meaning, by the embeddings of a model of sentence-transformers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flowrl_mega.settings import ConfigError

ALIKE = 0.9  # cosine, from which two answers are one way of solving
Embed = Callable[[Sequence[str]], np.ndarray]


def embedder(model: str) -> Embed:
    """texts -> unit vectors [texts, dimensions] float64, by a folder or a name of the hub.

    ConfigError where the library is missing or the model cannot be loaded.
    """
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise ConfigError("embeddings need sentence-transformers; pip install flowrl-mega[embeddings]") from error
    try:
        loaded = SentenceTransformer(model)
    except (OSError, ValueError) as error:
        said = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"embeddings = {model!r}: no model of sentence-transformers ({said}); give its folder, or a name of the "
            "hub where there is a network"
        ) from error

    def embed(texts: Sequence[str]) -> np.ndarray:
        vectors = loaded.encode(list(texts), normalize_embeddings=True, show_progress_bar=False)
        return np.asarray(vectors, dtype=np.float64)

    return embed


def similarities(vectors: np.ndarray) -> np.ndarray:
    """Cosines of unit vectors, [n, n], for `diversity.vendi`: each is as like itself as can be."""
    found = np.clip(vectors @ vectors.T, -1, 1)
    np.fill_diagonal(found, 1.0)
    return found


def clusters_of(similarity: np.ndarray, alike: float = ALIKE) -> int:
    """How many groups there are where any two that are `alike` are of one group, and so are all that these reach."""
    left, count = set(range(len(similarity))), 0
    while left:
        reached = [left.pop()]
        while reached:
            one = reached.pop()
            near = {other for other in left if similarity[one, other] >= alike}
            left -= near
            reached += near
        count += 1
    return count
