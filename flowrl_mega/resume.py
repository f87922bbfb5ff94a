"""What a run that goes on from a checkpoint compares: the settings and the data then and now.

Nothing of a difference is silent: each is a line, with what it means for the run. Answers that the checkpoint carries
are kept only where they are answers to today's prompts under today's sampling; what cannot go on is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.data.loader import Subset, whole
from flowrl_mega.data.prompts import Prompts
from flowrl_mega.settings import changed, flat

RUN = "run"  # the checkpoint's part that `record` makes
REFERENCE = "reference_answers"  # and what a frozen log Z is estimated from
UNSET = "unset"
SAID = 60  # characters of a value
# Settings, and sections, of which a line would be no news; where moments lie (`distributed`) changes none.
QUIET = ("run_dir", "steps", "monitor", "optimizer.distributed", "critic.optimizer.distributed")
# What a difference means, where it is not simply: the new value counts from here on.
MEANING = {
    "model.path": "the policy goes on as it is; tokenizer and reference are the new folder's",
    "seed": "prompts come in another order: of this epoch some come twice and others not at all",
    "data.held_out": "prompts that the run has trained on may be held out now",
    "objective.z_answers": "log Z stays as the first answers have it",
    "optimizer.decay": "the learning rate goes on where the new schedule is after so many updates",
    "optimizer.warmup_steps": "the learning rate goes on where the new schedule is after so many updates",
}
# What the reference's answers and their rewards depend on, beside the prompts.
ASKED_UNDER = ("model.path", "reward", "rollout.temperature", "rollout.max_tokens", "rollout.ignore_eos")
# Answers drawn under other values of these are no answers of this run: their prompts are asked again.
SAMPLING = [f"rollout.{name}" for name in ("group_size", "temperature", "top_p", "top_k", "ignore_eos")]
SAMPLING += ["rollout.max_tokens", "rollout.allow_truncated_sampling"]


class Resumption(NamedTuple):
    """What goes on: the rollout state to continue from, and what is said of it."""

    rollout: dict[str, Any]  # as GroupQueue.load_state_dict reads it
    lines: list[str]


def record(config: Config, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint keeps to be compared; `data` is the digest of the training data."""
    return {"settings": config.dump(), "data": data}


def resumption(state: dict[str, Any], config: Config, prompts: Prompts, data: dict[str, Any]) -> Resumption:
    """What of a checkpoint's `state` goes on under these settings, with these training prompts and their digest.

    Raises ConfigError for what cannot.
    """
    # Checkpoints without a rollout state took prompts in order.
    cursor = state["step"] * config.rollout.prompts_per_step
    rollout = state.get("rollout", {"cursor": cursor, "groups": []})
    saved = state.get(RUN)
    if saved is None:
        differences, lines = {}, ["the checkpoint is of an earlier version, which kept neither settings nor data"]
        other_data = False
    else:
        differences, other_data = _differences(saved["settings"], config), saved["data"] != data
        lines = [_line(name, *values) for name, values in differences.items()]
        lines += _adapted(differences, state.get("objective", {}))
        lines += _data_line(saved["data"], data, rollout) if other_data else []
        if REFERENCE in state:
            _refuse_unasked(state[REFERENCE], prompts, saved["data"]["tokens"] != data["tokens"])
            lines += _estimated_before(differences, saved["data"]["rows"] != data["rows"])
    _refuse_reader(rollout, other_data, differences)
    rounds, replayed = rollout.get("rounds", []), rollout.get("kept", [])
    every = [*rollout["groups"], *(group for saved in rounds for group in saved["groups"]), *replayed]
    kept, notes = _carried(every, config, prompts, [n for n in SAMPLING if n in differences])
    left = iter(kept)

    def of(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [group for _, group in zip(groups, left, strict=False) if group is not None]

    carried = {**rollout, "groups": of(rollout["groups"])}
    if rounds:
        carried["rounds"] = [{**saved, "groups": of(saved["groups"])} for saved in rounds]
    if replayed:
        carried["kept"] = of(replayed)
    return Resumption(carried, [*lines, *notes])


def _differences(saved: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """(then, now) of every setting that differs, by name. A setting that has come since counts where it was chosen."""
    then, now = flat(saved), flat(config.dump())
    chosen = changed(config)
    found = {}
    for name in dict.fromkeys([*then, *now]):
        is_news = name in then or any(f"{name}.".startswith(f"{given}.") for given in chosen)
        pair = then.get(name, UNSET), now.get(name, UNSET)
        if pair[0] != pair[1] and is_news and not any(f"{name}.".startswith(f"{quiet}.") for quiet in QUIET):
            found[name] = pair
    return found


def _line(name: str, then: Any, now: Any) -> str:
    meaning = MEANING.get(name)
    return f"{name}: {then!s:.{SAID}} -> {now!s:.{SAID}}" + (f"; {meaning}" if meaning else "")


def _adapted(differences: dict[str, Any], adapted: dict[str, Any]) -> Iterator[str]:
    """Settings of the objective that the run itself has moved: the checkpoint's value goes on."""
    for name, value in adapted.items():
        if f"objective.{name}" in differences:
            yield f"objective.{name}: the run has adapted it, and goes on with {value:g}"


def _data_line(then: dict[str, Any], now: dict[str, Any], rollout: dict[str, Any]) -> list[str]:
    if then["tokens"] == now["tokens"]:
        return ["data: the same prompts, with other rows; answers are graded by the new ones"]
    place = (rollout.get("stream") or {"place": rollout.get("cursor", 0)})["place"]
    return [
        f"data: {then['count']} prompts then, {now['count']} others now; from prompt {place} on they are the new ones"
    ]


def _refuse_unasked(asked: dict[str, Any], prompts: Prompts, other_data: bool) -> None:
    """log Z is frozen for the prompts that the reference was asked, and the policy is the reference no more."""
    unasked = len(set(_Training(prompts).indices) - set(asked["indices"].tolist()))
    if other_data or unasked:
        what = "the prompts are others" if other_data else f"{unasked} prompts were held out"
        raise ConfigError(
            f"objective.z = frozen: {what} when the reference was asked for log Z, before the first step, and no "
            "engine holds it any more; set data as they were, or start a new run (model.path can be this checkpoint)"
        )


def _estimated_before(differences: dict[str, Any], other_rows: bool) -> Iterator[str]:
    names = [n for n in differences if any(f"{n}.".startswith(f"{field}.") for field in ASKED_UNDER)]
    names += ["the rows of the data"] if other_rows else []
    if names:
        yield f"log Z stays frozen as it was estimated, and {', '.join(names)} would now give another"


def _refuse_reader(rollout: dict[str, Any], other_data: bool, differences: dict[str, Any]) -> None:
    """DALI's own shuffle buffer can go on with the very data and settings that filled it, and with no other."""
    loaders = (rollout.get("stream") or {}).get("loaders") or []
    if any("checkpoint" in loader for loader in loaders):
        names = [name for name in differences if name in ("seed", "data.held_out", "data.dali.buffer")]
        if other_data or names:
            what = names[0] if names else "data"
            raise ConfigError(
                f"{what}: differs from the run's, whose checkpoint holds the state of DALI's own shuffle buffer, and "
                "that cannot go on with other prompts; set it as it was, or start a new run"
            )


def _carried(
    groups: list[dict[str, Any]], config: Config, prompts: Prompts, other_sampling: list[str]
) -> tuple[list[dict[str, Any] | None], list[str]]:
    """Each carried group, without its answers where those cannot go on, None where it cannot itself; and a line for
    each kind of loss."""
    ours, size = _Training(prompts), config.rollout.group_size
    there = [group for group in groups if ours.has(group)]
    answered = [group for group in there if group["rollouts"]]
    asked_again = [group for group in answered if other_sampling or len(group["rollouts"]) != size]
    kept = [
        None if group not in there else {**group, "rollouts": []} if group in asked_again else group for group in groups
    ]
    lines = []
    if len(there) < len(groups):
        gone = len(groups) - len(there)
        lines.append(
            f"{gone} of {len(groups)} carried prompts with their answers are dropped: the data have not got them"
        )
    if asked_again:
        why = ", ".join(other_sampling) or "rollout.group_size"
        lines.append(f"{len(asked_again)} of {len(groups)} carried prompts are asked again, because of {why}")
    return kept, lines


class _Training:
    """Which of a checkpoint's prompts are still prompts to train on."""

    def __init__(self, prompts: Prompts) -> None:
        self.data = whole(prompts)
        self.indices = set(prompts.indices.tolist()) if isinstance(prompts, Subset) else range(len(self.data))

    def has(self, group: dict[str, Any]) -> bool:
        """Groups of checkpoints older than prompt stores know their prompt by its position only."""
        index = group.get("index")
        return index is None or (index in self.indices and list(self.data[index].token_ids) == list(group["prompt"]))
