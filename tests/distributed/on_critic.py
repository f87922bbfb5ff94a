"""What ranks run to train a critic on recorded rollouts, in whatever layout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from attention_over_ranks import attention_over_ranks
from on_ranks import start, whole_gradients
from torch import Tensor

from flowrl_mega.checkpoint import load_model
from flowrl_mega.experience import Experience
from flowrl_mega.monitor.step_metrics import merge_updates
from flowrl_mega.run import Run


class Learnt(NamedTuple):
    """What a job's updates computed."""

    gradients: dict[str, dict[str, Tensor]]  # of the first update, of "policy" and "critic", under Hugging Face's names
    metrics: list[dict[str, float]]  # of every update
    weights: dict[str, list[Tensor]]  # this rank's at the end, by model
    kl_coef: float


def head(hidden: int) -> tuple[Tensor, Tensor]:
    """A value head that has learnt something: weight [1, H] and bias [1]."""
    draw = torch.Generator().manual_seed(5)
    return 0.3 * torch.randn(1, hidden, generator=draw), torch.tensor([0.2])


def learn(
    path: Path, reference: Path, answers: list[Experience], load: Path | None, save: bool, **sections: Any
) -> Learnt:
    """Train on these answers, a step each; `load` is a checkpoint to begin from, `save` writes one at the end.

    The reference is another model than the policy starts as, so that there is a KL from the start.
    """
    stand_in = sections.get("parallel", {}).get("cp", 1) > 1
    with attention_over_ranks() if stand_in else nullcontext():
        job = start(path, load, **sections)
        if job.models.reference is not None:
            load_model(job.models.reference, reference)
        if load is None:
            _set_head(job)
        return _learn(job, answers, save)


def _set_head(job: Run) -> None:
    stage = (job.models.critic or job.models.policy).stages[-1]
    if stage.value_head is not None:
        with torch.no_grad():
            for parameter, value in zip(
                stage.value_head.parameters(), head(job.models.policy.arch.hidden), strict=True
            ):
                parameter.copy_(value)


def _learn(job: Run, answers: list[Experience], save: bool) -> Learnt:
    gradients: dict[str, Any] = {}
    metrics: list[dict[str, float]] = []
    trainer = job.trainer
    for step in answers:
        updates = []
        for mini_batch in trainer.micro_batches(step):
            with ExitStack() as stack:
                for name, (model, optimizer) in job.models.trained().items() if not gradients else ():
                    stack.enter_context(_gathered(model, optimizer, name, gradients))
                updates.append(merge_updates([trainer.update(mini_batch)]))
        trainer.step_done += 1
        if (kl := "policy/kl_to_ref") in updates[0]:
            mean = {kl: sum(update[kl] for update in updates) / len(updates)}
            trainer.objective = trainer.objective.adapted(mean, len(step.sequences))
        metrics += updates
    if save:
        job.save()
    weights = {
        name: [p.detach().clone() for _, p in model.named_parameters()]
        for name, (model, _) in job.models.trained().items()
    }
    return Learnt(gradients, metrics, weights, getattr(trainer.objective, "kl_coef", 0.0))


@contextmanager
def _gathered(model: Any, optimizer: Any, name: str, into: dict[str, Any]) -> Iterator[None]:
    """The update's gradients, read when they are complete and before they are clipped."""
    real = optimizer.inner.prepare_grads

    def prepare_grads() -> Any:
        into[name], difference = whole_gradients(model)
        assert difference == 0.0, "replicas that get unlike gradients drift apart"
        return real()

    optimizer.inner.prepare_grads = prepare_grads
    try:
        yield
    finally:
        del optimizer.inner.prepare_grads
