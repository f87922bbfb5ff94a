"""The body of a request to SGLang's /generate, and the checked reading of its response."""

from __future__ import annotations

import math
from typing import Any

from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.answers import REASONS
from flowrl_mega.rollout.engine import Request, Rollout
from flowrl_mega.rollout.server_client import Malformed, Stale


def request_body(request: Request, sampling: Sampling, seeds: list[int]) -> dict[str, Any]:
    """A request for all answers to one prompt, with one seed per answer."""
    shared = {
        "max_new_tokens": request.max_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k or -1,
        "stop_token_ids": list(sampling.stop_ids),
        "ignore_eos": not sampling.stop_ids,  # which would make it ignore the stop ids, too
        "skip_special_tokens": False,
    }
    return {
        "input_ids": [request.prompt] * request.answers,
        "sampling_params": [{**shared, "sampling_seed": seed} for seed in seeds],
        "return_logprob": True,
    }


def read_answers(body: Any, request: Request, vocab: int, versions: range | None) -> list[Rollout]:
    """The answers in the response to `request`, whose tokens may be of these `versions` of the weights (None: of any).

    Raises Malformed and Stale.
    """
    if not isinstance(body, list) or len(body) != request.answers:
        found = f"{len(body)} answers" if isinstance(body, list) else type(body).__name__
        raise Malformed(f"{found} where {request.answers} answers were asked for")
    return [_read(answer, request.max_tokens, vocab, versions) for answer in body]


def _read(answer: Any, max_tokens: int, vocab: int, versions: range | None) -> Rollout:
    meta = answer.get("meta_info") if isinstance(answer, dict) else None
    if not isinstance(meta, dict):
        raise Malformed("no meta_info")
    reason = meta.get("finish_reason")
    kind = reason.get("type") if isinstance(reason, dict) else None
    if kind not in REASONS:
        said = reason.get("message") if isinstance(reason, dict) else None
        raise Malformed(f"finish_reason {kind!r}" + (f" ({said})" if said else ""))
    ids = answer.get("output_ids")
    if not isinstance(ids, list) or not all(type(token) is int for token in ids):
        raise Malformed("output_ids is no list of integers")
    if not 1 <= len(ids) <= max_tokens:
        raise Malformed(f"{len(ids)} tokens where 1 to {max_tokens} were asked for")
    if min(ids) < 0 or max(ids) >= vocab:
        wrong = next(token for token in ids if not 0 <= token < vocab)
        raise Malformed(f"token id {wrong} outside the vocabulary of {vocab}")
    spans = [(0, len(ids))] if versions is None else _spans(meta, len(ids), versions)
    return Rollout(ids, _logp(meta, ids), kind, spans)


def _logp(meta: dict[str, Any], ids: list[int]) -> list[float]:
    """One log-prob per token, checked to belong to the tokens `ids`."""
    entries = meta.get("output_token_logprobs")
    if not isinstance(entries, list) or not all(isinstance(entry, list) and len(entry) >= 2 for entry in entries):
        raise Malformed("output_token_logprobs is missing or no list of [log-prob, id]")
    if [entry[1] for entry in entries] != ids:
        raise Malformed(f"{len(entries)} log-probs that are not those of the {len(ids)} tokens")
    logp = [entry[0] for entry in entries]
    for value in logp:  # SGLang writes NaN as null
        if type(value) not in (int, float) or not math.isfinite(value) or value > 1e-3:
            raise Malformed(f"log-prob {value!r}")
    return logp


def _spans(meta: dict[str, Any], tokens: int, versions: range) -> list[tuple[int, int]]:
    """(version, number of tokens) in order. An answer has several if weights were updated while it was written."""
    spans = meta.get("weight_versions")
    if not spans:  # a server that does not keep them
        spans = [{"version": meta.get("weight_version"), "start": 0, "end": tokens}]
    found, end = [], 0
    for span in spans:
        if not isinstance(span, dict) or span.get("start") != end or type(span.get("end")) is not int:
            raise Malformed(f"weight_versions {spans!r} do not cover the answer")
        version, length, end = str(span.get("version")), span["end"] - end, span["end"]
        if not version.isdecimal() or int(version) not in versions:
            expected = versions[0] if len(versions) == 1 else f"{versions[0]} to {versions[-1]}"
            raise Stale(f"answers with weights {version!r}, not version {expected}")
        if length:
            found.append((int(version), length))
    if end != tokens:
        raise Malformed(f"weight_versions {spans!r} do not cover the {tokens} tokens of the answer")
    return found
