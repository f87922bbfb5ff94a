"""What a resume compares, and what becomes of each difference: nothing of it is silent."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.data.digest import digest
from flowrl_mega.data.loader import Subset
from flowrl_mega.data.prompts import Prompt, Prompts, tokenized
from flowrl_mega.data.store import MappedStore, new_store
from flowrl_mega.data.tokenizer import char_tokenizer
from flowrl_mega.resume import REFERENCE, RUN, Resumption, record, resumption
from flowrl_mega.settings import validated

TOKENIZER = char_tokenizer("0123456789:")
ROWS = [{"prompt": f"{number}:", "answer": number} for number in range(10, 40)]
PROMPTS = tokenized(ROWS, TOKENIZER)


def settings(**changes: Any) -> Config:
    tree: dict[str, Any] = {
        "run_dir": "runs/one",
        "steps": 4,
        "model": {"path": "model"},
        "data": {"path": "rows.jsonl"},
        "reward": "flowrl_mega.rewards.sums:score",
        "rollout": {"group_size": 2, "prompts_per_step": 4},
        "objective": {"name": "ppo", "kl_coef": 0.1},
    }
    for name, value in changes.items():
        *sections, field = name.split("__")
        section = tree
        for part in sections:
            section = section.setdefault(part, {})
        section[field] = value
    return validated(Config, tree, "")


def carried(prompt: Prompt, answers: int = 2, position: int = 7) -> dict[str, Any]:
    rollouts = [{"response": [1, 2], "logp": [-0.1, -0.2], "finish_reason": "stop"}] * answers
    return {"place": position, "index": prompt.index, "prompt": prompt.token_ids, "rollouts": rollouts}


def state(*groups: dict[str, Any], prompts: Prompts = PROMPTS, loaders: Any = None, **more: Any) -> dict[str, Any]:
    rollout = {"stream": {"place": 9, "loaders": loaders or [{"taken": 9}]}, "groups": list(groups)}
    return {"step": 2, "rollout": rollout, RUN: record(settings(), digest(prompts)), **more}


def resumed(saved: dict[str, Any], prompts: Prompts = PROMPTS, **changes: Any) -> Resumption:
    before = copy.deepcopy(saved)
    found = resumption(saved, settings(**changes), prompts, digest(prompts))
    assert saved == before, "the checkpoint's state is read, not changed"
    return found


def test_the_same_run_goes_on_without_a_word() -> None:
    """Also to another step, in another folder, with other records."""
    saved = state(carried(PROMPTS[3]), carried(PROMPTS[5], answers=0))
    assert resumed(saved) == Resumption(saved["rollout"], [])
    assert resumed(saved, steps=9, run_dir="elsewhere", monitor__progress=False).lines == []


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"optimizer__lr": 0.5}, ["optimizer.lr: 1e-06 -> 0.5"]),
        ({"parallel__tp": 2}, ["parallel.tp: 1 -> 2"]),
        ({"reward": "mine:score"}, ["reward.function: flowrl_mega.rewards.sums:score -> mine:score"]),
        ({"objective": {"name": "grpo"}}, ["objective.name: ppo -> grpo", "objective.kl_coef: 0.1 -> unset"]),
        ({"batch__mini_batch": 4}, ["batch.mini_batch: None -> 4"]),
        ({"seed": 1}, ["seed: 0 -> 1; prompts come in another order"]),
        (
            {"model__path": "other"},
            ["model.path: model -> other; the policy goes on as it is; tokenizer and reference"],
        ),
        ({"data__held_out": 0.1}, ["data.held_out: None -> 0.1; prompts that the run has trained on may be held out"]),
    ],
)
def test_each_other_setting_is_a_line(changes: dict[str, Any], lines: list[str]) -> None:
    """And the carried answers go on: none of these makes them answers to something else."""
    saved = state(carried(PROMPTS[3]))
    found = resumed(saved, **changes)
    assert len(found.lines) == len(lines)
    assert all(line.startswith(begin) for line, begin in zip(found.lines, lines, strict=True)), found.lines
    assert found.rollout == saved["rollout"]


@pytest.mark.parametrize(
    ("name", "value"),
    [("group_size", 3), ("temperature", 0.5), ("top_p", 0.9), ("top_k", 5), ("max_tokens", 7), ("ignore_eos", True)],
)
def test_answers_of_another_sampling_are_asked_again(name: str, value: Any) -> None:
    """The prompt stays where it was; its answers would be mixed with those of other prompts, or weigh wrongly."""
    saved = state(carried(PROMPTS[3]), carried(PROMPTS[4]), carried(PROMPTS[5], answers=0))
    found = resumed(saved, **{f"rollout__{name}": value})
    assert [group["rollouts"] for group in found.rollout["groups"]] == [[], [], []]
    assert [group["index"] for group in found.rollout["groups"]] == [3, 4, 5]
    assert found.lines[-1] == f"2 of 3 carried prompts are asked again, because of rollout.{name}"


def test_other_settings_of_the_rollout_keep_the_answers() -> None:
    saved = state(carried(PROMPTS[3]))
    assert resumed(saved, rollout__prompts_per_step=8, rollout__oversample=2.0).rollout == saved["rollout"]


def test_other_data() -> None:
    """Prompts that are not there any more go, with their answers; those that are there go on."""
    others = tokenized([*ROWS[:5], *[{**row, "prompt": "9:"} for row in ROWS[5:20]]], TOKENIZER)
    saved = state(carried(PROMPTS[3]), carried(PROMPTS[6]), carried(PROMPTS[25]))
    found = resumed(saved, others, data__path="others.jsonl")
    assert [group["index"] for group in found.rollout["groups"]] == [3]
    assert found.rollout["stream"] == saved["rollout"]["stream"]
    assert found.lines == [
        "data.path: rows.jsonl -> others.jsonl",
        "data: 30 prompts then, 20 others now; from prompt 9 on they are the new ones",
        "2 of 3 carried prompts with their answers are dropped: the data have not got them",
    ]


def test_the_same_file_with_other_contents() -> None:
    """What counts is what is in it. Other answers to the same prompts: graded by those."""
    corrected = tokenized([{**row, "answer": 0} for row in ROWS], TOKENIZER)
    saved = state(carried(PROMPTS[3]))
    found = resumed(saved, corrected)
    assert found.lines == ["data: the same prompts, with other rows; answers are graded by the new ones"]
    assert found.rollout == saved["rollout"]
    assert "29 others now" in resumed(saved, tokenized(ROWS[:-1], TOKENIZER)).lines[0]


def test_a_prompt_that_is_held_out_now_is_not_trained_on() -> None:
    """With another share held out, a carried prompt may have come to that side."""
    training = Subset(PROMPTS, [0, 1, 2, 3])
    found = resumed(state(carried(PROMPTS[3]), carried(PROMPTS[4])), training)
    assert [group["index"] for group in found.rollout["groups"]] == [3]
    assert found.lines == ["1 of 2 carried prompts with their answers are dropped: the data have not got them"]


def test_what_the_run_has_adapted_goes_on() -> None:
    """PPO's coefficient against a KL target moves; another one in the settings would seem to count."""
    saved = state(objective={"kl_coef": 0.25})
    assert resumed(saved, objective={"name": "ppo", "kl_coef": 0.4}).lines == [
        "objective.kl_coef: 0.1 -> 0.4",
        "objective.kl_coef: the run has adapted it, and goes on with 0.25",
    ]


FROZEN = {"name": "flowrl", "z": "frozen", "reward_norm": "none"}


def of_a_frozen_log_z(training: Prompts) -> dict[str, Any]:
    """A checkpoint's state whose reference has answered these prompts."""
    asked = {"indices": torch.tensor([prompt.index for prompt in training])}
    saved = record(settings(objective=FROZEN), digest(training))
    return {"step": 2, "rollout": {"stream": {"place": 9}, "groups": []}, RUN: saved, REFERENCE: asked}


@pytest.mark.parametrize(
    ("changes", "last"),
    [
        ({}, None),
        ({"optimizer__lr": 0.5}, "optimizer.lr: 1e-06 -> 0.5"),
        ({"reward": "mine:score"}, "and reward.function would now give another"),
        ({"rollout__temperature": 0.5}, "and rollout.temperature would now give another"),
        ({"model__path": "other"}, "and model.path would now give another"),
        ({"objective": {**FROZEN, "z_answers": 4}}, "log Z stays as the first answers have it"),
        ({"objective": {**FROZEN, "beta": 4.0}}, "objective.beta: unset -> 4.0"),
    ],
)
def test_a_frozen_log_z_stays_as_it_was_estimated(changes: dict[str, Any], last: str | None) -> None:
    """And what would change it is told; beta would not: it is no part of the answers."""
    found = resumption(
        of_a_frozen_log_z(PROMPTS), settings(**{"objective": FROZEN, **changes}), PROMPTS, digest(PROMPTS)
    )
    assert (last is None and found.lines == []) or found.lines[-1].endswith(str(last)), found.lines


def test_a_frozen_log_z_is_of_the_prompts_that_were_asked() -> None:
    """Corrected answers in the rows, or fewer prompts, are no hindrance; a prompt without an estimate is."""
    saved = of_a_frozen_log_z(Subset(PROMPTS, [0, 1, 2, 3]))
    corrected = tokenized([{**row, "answer": 0} for row in ROWS], TOKENIZER)
    config = settings(objective=FROZEN)
    assert resumption(saved, config, Subset(PROMPTS, [3, 0]), digest(PROMPTS)).lines == []
    last = resumption(saved, config, Subset(corrected, [0, 1, 2, 3]), digest(corrected)).lines[-1]
    assert last == "log Z stays frozen as it was estimated, and the rows of the data would now give another"
    added = tokenized([*ROWS, {"prompt": "77:", "answer": 77}], TOKENIZER)
    for other, words in ((Subset(PROMPTS, [0, 4, 5]), "2 prompts were held out"), (added, "the prompts are others")):
        with pytest.raises(ConfigError, match=f"objective.z = frozen: {words} when .*; set data as they were, or"):
            resumption(saved, config, other, digest(other))


@pytest.mark.parametrize("changes", [{"seed": 1}, {"data__held_out": 0.5}, {"data__dali": {"buffer": 3}}, {}])
def test_dalis_own_buffer_goes_on_with_what_filled_it_alone(changes: dict[str, Any]) -> None:
    saved = state(loaders=[{"checkpoint": "abc"}])
    assert resumed(saved).lines == []
    with pytest.raises(ConfigError, match=r"differs from the run's, whose checkpoint holds the state of DALI's own"):
        resumed(saved, PROMPTS if changes else tokenized(ROWS[:-1], TOKENIZER), **changes)


def test_checkpoints_of_earlier_versions() -> None:
    """Without settings only what the answers themselves show is compared; without a rollout state nothing is."""
    saved = state(carried(PROMPTS[3]), carried(PROMPTS[4], answers=3))
    del saved[RUN]
    found = resumed(saved)
    assert [len(group["rollouts"]) for group in found.rollout["groups"]] == [2, 0]
    assert "kept neither settings nor data" in found.lines[0] and "because of rollout.group_size" in found.lines[1]
    assert resumed({"step": 5}).rollout == {"cursor": 20, "groups": []}
    by_position = {"place": 3, "rollouts": carried(PROMPTS[3])["rollouts"]}
    assert resumed({"step": 5, "rollout": {"cursor": 20, "groups": [by_position]}}).rollout["groups"] == [by_position]


def test_a_setting_that_has_come_since_counts_where_it_was_chosen() -> None:
    saved = state()
    del saved[RUN]["settings"]["on_nonfinite"], saved[RUN]["settings"]["checkpoint"]["every"]
    assert resumed(saved).lines == []
    assert resumed(saved, checkpoint__every=3).lines == ["checkpoint.every: unset -> 3"]


def test_a_stores_digest_is_that_of_its_files(tmp_path: Path) -> None:
    """Known without reading them, and another where a prompt or a row is another."""
    digests = []
    for number, rows in enumerate((ROWS, ROWS[:-1], [{**row, "answer": 0} for row in ROWS], ROWS)):
        with new_store(tmp_path / str(number), TOKENIZER) as writer:
            for prompt in tokenized(rows, TOKENIZER):
                writer.add(prompt.token_ids, prompt.row)
        store = MappedStore(tmp_path / str(number))
        digests.append(digest(Subset(store, [1, 2])))
        assert json.loads(json.dumps(digests[-1])) == digests[-1] and digests[-1]["count"] == len(rows)
    assert digests[0] == digests[3] and digests[0]["tokens"] == digests[2]["tokens"]
    assert len({row["rows"] for row in digests}) == 3 and digests[1]["tokens"] != digests[0]["tokens"]
