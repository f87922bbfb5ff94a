"""The published runs fit GPUs of 80 GB, by a count of everything that lies on them."""

from __future__ import annotations

from pathlib import Path

import pytest
from memory_of_runs import ASLEEP, GPU, Memory, Model, counted
from test_published import LAYOUTS, RUNS, load

# Vocabulary and whether the embedding is tied, from the models' config.json; the parameters that Qwen publishes.
MODELS = {
    "qwen2.5_1.5b": (151936, True, 1_543_714_304),
    "qwen2.5_7b": (152064, False, 7_615_616_512),
    "qwen2.5_32b": (152064, False, 32_763_876_352),
}
# Counted by somebody else, from the same architectures, and rounded so.
TABLE: dict[str, dict[str, float]] = {
    "qwen2.5_1.5b": dict(
        parameters=1.548, weights=2.9, gradients=5.8, master=5.8, moments=11.5, reference=2.9, constant=28.8,
        layer_inputs=1.3, layer_again=1.9, head=1.0, before_servers=19.3, pool=30.2, server_weights=2.9,
        answers=118, update_te=38, update_torch=44, awake=65, saved_by_shares=15.1,
    ),
    "qwen2.5_7b": dict(
        parameters=1.930, weights=3.6, gradients=7.2, master=7.2, moments=14.4, reference=3.5, constant=35.9,
        layer_inputs=0.8, layer_again=1.2, head=1.4, before_servers=23.5, pool=28.0, server_weights=14.2,
        answers=30, update_te=44, update_torch=51, awake=70, saved_by_shares=10.8,
    ),
    "qwen2.5_32b": dict(
        parameters=2.100, weights=3.9, gradients=7.8, master=7.8, moments=15.6, reference=3.8, constant=39.0,
        layer_inputs=1.3, layer_again=1.0, head=1.7, before_servers=25.4, pool=27.1, server_weights=15.3,
        answers=22, update_te=48, update_torch=56, awake=72, saved_by_shares=11.7,
    ),
}  # fmt: skip


def memory(name: str, folder: Path) -> Memory:
    gpus, hidden, layers, heads, kv_heads, ffn = LAYOUTS[name]
    vocab, tied, _ = MODELS.get(name, MODELS["qwen2.5_7b"])
    return counted(Model(hidden, layers, heads, kv_heads, ffn, vocab, tied), load(name, folder), gpus)


@pytest.mark.parametrize("name", RUNS)
def test_the_models_have_the_published_sizes(name: str) -> None:
    _, hidden, layers, heads, kv_heads, ffn = RUNS[name]
    vocab, tied, parameters = MODELS[name]
    assert Model(hidden, layers, heads, kv_heads, ffn, vocab, tied).fullest_rank(1, 1) == parameters


@pytest.mark.parametrize("name", RUNS)
def test_the_count_is_the_tables(name: str, tmp_path: Path) -> None:
    """To its rounding."""
    found = memory(name, tmp_path)
    values = {**found._asdict(), "constant": found.constant, "before_servers": found.before_servers}
    values |= {"update_te": found.update(True), "update_torch": found.update(False), "awake": found.awake}
    for part, wanted in TABLE[name].items():
        digits = 3 if part == "parameters" else 0 if isinstance(wanted, int) else 1
        assert abs(values[part] - wanted) <= 0.5 * 10**-digits + 1e-2 * 10**-digits, (part, values[part], wanted)


@pytest.mark.parametrize("name", RUNS)
def test_it_fits(name: str, tmp_path: Path) -> None:
    """With torch's AdamW, which keeps nothing in shares; and the servers' cache holds an answer of full length."""
    found = memory(name, tmp_path)
    assert max(found.update(fused_adam=False), found.awake) < GPU
    assert found.before_servers + found.pool + found.moments + ASLEEP < GPU
    assert found.answers > 1


@pytest.mark.parametrize("name", LAYOUTS)
def test_answers_of_full_length_come_in_time(name: str, tmp_path: Path) -> None:
    """Of a step whose every answer is as long as it may be, at 10 ms a token (a guess) and with as much to spare."""
    found, rollout = memory(name, tmp_path), load(name, tmp_path).rollout
    at_once = rollout.servers * LAYOUTS[name][0] // 8 * found.answers
    seconds = rollout.prompts_per_step * rollout.group_size / at_once * rollout.max_tokens * 0.01
    assert 2 * seconds < rollout.request_timeout_s
