"""No setting is silent: each field of the tree changes what a run does or the plan that --dry-run prints, or is refused
where nothing reads it. A field without evidence in the table fails. (The objectives' own fields are walked in
tests/objectives/test_no_silent_fields.py.)
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_file import load_config
from flowrl_mega.settings import Settings, section_of

TESTS = Path(__file__).parents[1]
PPO = "objective={name: ppo}"
BENCHMARK = f"evaluation.benchmarks.names=[{TESTS}/config/three_sums.jsonl]"
LONG = "evaluation.benchmarks.max_tokens=60"  # long enough for some answers to end before
SCORED = "reward.overlong.buffer=7"  # this policy is never right: else all rewards, and a critic's gradient, are 0


@dataclass(frozen=True)
class Refused:
    """This override is refused, by the field's name."""

    override: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planned:
    """This override changes the plan."""

    override: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trained:
    """This override changes what two steps leave in the run folder: records, samples, evaluations, checkpoints."""

    override: str
    beside: tuple[str, ...] = ()


@dataclass(frozen=True)
class Tested:
    """A test shows its effect: "file::function"; the file, or a helper in its folder, names the field."""

    place: str
    __test__ = False  # no class of tests, for all its name


def servers(value: str, test: str) -> tuple[Any, ...]:
    """Of a setting of the servers: refused with the embedded engine, tested with servers."""
    return (Refused(value), Tested(test))


def own_trunk(value: str) -> tuple[Any, ...]:
    """Of a setting of a critic with a trunk of its own."""
    return (
        Trained(value, (PPO, "critic.optimizer={lr: 1e-2, warmup_steps: 0}", SCORED)),
        Refused(value, (PPO, "critic.trunk=shared")),
    )


EVIDENCE: dict[str, Any] = {
    "run_dir": Planned("run_dir=elsewhere"),
    "steps": Trained("steps=3"),
    "seed": Trained("seed=1"),
    "model.path": Refused("model.path=nowhere"),
    "model.dtype": Trained("model.dtype=bf16"),
    "model.logits_budget_mb": (
        Planned("model.logits_budget_mb=1"),
        Tested("distributed/test_logits_budget.py::test_a_number_is_kept_to"),
    ),
    "model.spec": (Refused("model.spec=te"), Tested("model/test_precision.py::test_what_is_said")),
    "model.fp8": (Refused("model.fp8=tensorwise"), Tested("model/test_precision.py::test_fields_of_a_recipe")),
    "model.fp8_first_last_bf16": (
        Refused("model.fp8_first_last_bf16=true"),
        Tested("model/test_precision.py::test_fields_of_a_recipe"),
    ),
    "model.fp8_params": (Refused("model.fp8_params=true"), Tested("model/test_precision.py::test_weights_in_fp8")),
    "model.reference_fp8": (
        Refused("model.reference_fp8=tensorwise"),
        Tested("model/test_precision.py::test_the_reference_has_a_recipe_of_its_own"),
    ),
    "model.reference_offload": Planned("model.reference_offload=true"),
    "model.fp8_check_every": (
        Refused("model.fp8_check_every=3"),
        Tested("model/test_fp8_gate.py::test_a_run_ends_with_a_checkpoint_of_the_step"),
    ),
    "model.fp8_budget": (
        Refused("model.fp8_budget=3"),
        Tested("model/test_fp8_gate.py::test_within_and_beyond_the_budget"),
    ),
    "model.fp8_action": (
        Refused("model.fp8_action=fallback"),
        Tested("model/test_fp8_gate.py::test_within_and_beyond_the_budget"),
    ),
    "megatron": (
        Refused("megatron.no_such_field=1"),
        Tested("model/test_model_checks.py::test_whatever_the_trainer_sets_is_refused"),
    ),
    "ops.backend": Planned("ops.backend=torch"),
    "parallel.tp": Planned("parallel.tp=2"),
    "parallel.sequence_parallel": Planned("parallel.sequence_parallel=true", ("parallel.tp=2",)),
    "parallel.pp": Planned("parallel.pp=2"),
    "parallel.vpp": Refused("parallel.vpp=2"),
    "parallel.cp": Refused("parallel.cp=2"),
    "parallel.dp": Planned("parallel.dp=2"),
    "parallel.overlap_grad_reduce": Planned("parallel.overlap_grad_reduce=false", ("parallel.dp=2",)),
    "parallel.timeout_s": Planned("parallel.timeout_s=61"),
    "data.path": Refused("data.path=nowhere", ("data.task=null",)),
    "data.task": Refused("data.task=nowhere.py:Task"),
    "data.task_args": (
        Planned("data.task_args.hi=31"),
        Refused("data.task_args.hi=30", ("data.task=null", f"data.path={__file__}")),
    ),
    "data.held_out": Planned("data.held_out=0.4"),
    "data.chat_template": Refused("data.chat_template=true"),
    "data.template_date": (
        Refused("data.template_date=2025-01-01"),
        Tested("data/test_chat.py::test_a_store_made_on_another_date_is_refused"),
    ),
    "data.max_prompt_tokens": Refused("data.max_prompt_tokens=1"),
    "data.loader": (Refused("data.loader=dali"), Tested("data/test_loaders.py::test_dali_wants_a_store")),
    **{
        f"data.dali.{field}": (Refused(f"data.dali.{field}={value}"), Tested(f"data/test_loaders.py::{test}"))
        for field, value, test in (
            ("shuffle", "reader", "test_reader_reads_in_turn_through_its_buffer"),
            ("buffer", "3", "test_reader_reads_in_turn_through_its_buffer"),
            ("device", "gpu", "test_a_gpu_that_is_not_there_is_refused"),
        )
    },
    "reward.function": Planned("reward=flowrl_mega.rewards.math:dapo"),
    "reward.workers": Tested("rewards/test_scorer.py::test_processes_and_early_scores_do_not_change_a_run"),
    "reward.timeout_s": Tested("rewards/test_pool.py::test_a_hanging_or_dying_reward_is_a_wrong_answer_and_is_counted"),
    "reward.right_at": Tested("evaluation/test_sampled.py::test_right_is_by_a_threshold_of_the_rewards_own"),
    "reward.overlong.buffer": Trained("reward.overlong.buffer=7"),
    "reward.overlong.penalty": Trained("reward.overlong.penalty=2", ("reward.overlong.buffer=7",)),
    "reward.math.timeout_s": (
        Refused("reward.math.timeout_s=3"),
        Tested("rewards/test_math.py::test_what_takes_too_long_is_wrong"),
    ),
    **{
        f"reward.code.{field}": (Refused(f"reward.code.{field}={value}"), Tested(f"rewards/{test}"))
        for field, value, test in (
            ("isolation", "process", "test_sandbox.py::test_takes_less_where_that_is_asked_for"),
            ("score", "fraction", "test_code.py::test_no_test_begins_after_the_time_of_a_call"),
            ("python", "python3", "test_sandbox.py::test_another_interpreter"),
            ("packages", "[sys]", "test_packages.py::test_only_what_is_named_can_be_imported"),
            ("wall_s", "3", "test_sandbox.py::test_limits"),
            ("cpu_s", "3", "test_sandbox.py::test_limits"),
            ("memory_mb", "64", "test_sandbox.py::test_limits"),
            ("disk_mb", "3", "test_sandbox.py::test_limits"),
            ("processes", "3", "test_sandbox.py::test_limits"),
            ("open_files", "9", "test_sandbox.py::test_limits"),
            ("output_kb", "3", "test_code.py::test_programs_with_input"),
            ("url", "http://127.0.0.1:9", "test_code_remote.py::test_said_at_start"),
        )
    },
    "on_nonfinite.most": Tested("cli/test_cannot_learn.py::test_updates_that_are_all_skipped_end_the_run"),
    "rollout.engine": Refused("rollout.engine=nowhere.py:Engine"),
    "rollout.prompts_per_step": Trained("rollout.prompts_per_step=2"),
    "rollout.group_size": Trained("rollout.group_size=2"),
    "rollout.max_tokens": Trained("rollout.max_tokens=3"),
    "rollout.temperature": Trained("rollout.temperature=2"),
    "rollout.top_p": (
        Refused("rollout.top_p=0.5"),
        Trained("rollout={top_p: 0.5, allow_truncated_sampling: true}"),
    ),
    "rollout.top_k": Refused("rollout.top_k=2"),
    "rollout.ignore_eos": Trained("rollout.ignore_eos=true"),
    "rollout.allow_truncated_sampling": Refused("rollout.allow_truncated_sampling=true"),
    "rollout.ahead": (Trained("rollout.ahead=1"),),
    "rollout.replay.size": Tested("rollout/test_group_queue.py::test_groups_of_earlier_steps_are_taken_again"),
    "rollout.replay.share": Trained("rollout.replay={size: 4, share: 0.5}"),
    "rollout.max_staleness": (Tested("rollout/test_group_queue.py::test_no_group_has_a_token_that_is_too_old"),),
    "rollout.partial_tokens": servers(
        "rollout.partial_tokens=3",
        "rollout/test_group_queue.py::test_a_long_answer_goes_on_in_the_next_step_and_keeps_its_old_tokens",
    ),
    "rollout.oversample": Tested("rollout/test_group_queue.py::test_oversampled_groups_are_carried_not_lost"),
    "rollout.drop_uniform": Tested("rollout/test_group_queue.py::test_uniform_groups_are_replaced"),
    "rollout.mismatch.budget": Tested(
        "integration/test_sglang_training.py::test_the_mismatch_budget_ends_a_run_in_words"
    ),
    "rollout.mismatch.action": servers(
        "rollout.mismatch.action=stop",
        "integration/test_sglang_training.py::test_the_mismatch_budget_ends_a_run_in_words",
    ),
    **{
        f"rollout.{field}": servers(f"rollout.{field}={value}", f"rollout/{test}")
        for field, value, test in (
            ("servers", "2", "sglang/test_flags.py::test_gpus_are_shared_out"),
            ("nodes", "2", "sglang/test_announced.py::test_a_node_that_does_not_come_is_told_of"),
            ("python", "python3", "sglang/test_flags.py::test_a_command_line_says_what_the_settings_say"),
            ("server_args", "{tp_size: 2}", "sglang/test_flags.py::test_a_command_line_says_what_the_settings_say"),
            ("colocated", "true", "sglang/test_flags.py::test_gpus_are_shared_out"),
            ("api_key_file", "key", "sglang/test_attached.py::test_the_key_is_asked_for"),
            ("concurrency", "3", "test_dispatch.py::test_all_prompts_are_answered_in_their_places"),
            ("request_timeout_s", "3", "test_dispatch.py::test_no_answer_at_all_ends_the_job"),
            ("hang_s", "3", "test_health.py::test_prompts_of_a_silent_server_go_to_another"),
            ("start_timeout_s", "3", "sglang/test_fleet.py::test_one_that_never_listens_ends_the_start"),
            ("sync.transfer", "disk", "sglang/test_sync.py::test_every_server_holds_the_policy_to_the_bit"),
            ("sync.bucket_mb", "3", "sglang/test_sync.py::test_every_server_holds_the_policy_to_the_bit"),
            ("sync.dtype", "bf16", "sglang/test_sync.py::test_every_server_holds_the_policy_to_the_bit"),
            ("sync.pause", "wait", "sglang/test_sync.py::test_how_answers_under_way_are_paused"),
            ("sync.folder", "weights", "sglang/test_sync.py::test_a_folder_that_cannot_be_written_is_named"),
            ("sync.timeout_s", "3", "sglang/test_sync.py::test_a_server_that_hangs_costs_the_time_out_and_no_more"),
        )
    },
    "rollout.sync.checksum_every": servers(
        "rollout.sync.checksum_every=3", "integration/test_sglang_training.py::test_partial_rollouts_and_resume"
    ),
    "objective": Planned("objective={name: grpo}"),
    "optimizer.lr": Trained("optimizer.lr=2e-3"),
    "optimizer.log_z_lr": Trained("optimizer.log_z_lr=2e-2"),
    "optimizer.betas": Trained("optimizer.betas=[0.5, 0.5]"),
    "optimizer.eps": Trained("optimizer.eps=0.1"),
    "optimizer.weight_decay": Trained("optimizer.weight_decay=0.9"),
    "optimizer.clip_grad": Trained("optimizer.clip_grad=1e-6", ("optimizer.eps=0.1",)),
    "optimizer.warmup_steps": Trained("optimizer.warmup_steps=9"),
    "optimizer.decay": Trained("optimizer.decay=linear"),
    "optimizer.distributed": Refused("optimizer.distributed=true"),
    "optimizer.offload": Tested("parallel/test_offload.py::test_tensors_move_and_stay_the_same_objects"),
    "critic.trunk": Planned("critic.trunk=shared", (PPO, "critic={}")),
    "critic.path": Refused("critic.path=nowhere", (PPO, "critic={}")),
    "critic.value_coef": (
        Planned("critic.value_coef=0.7", (PPO, "critic.trunk=shared")),
        Refused("critic.value_coef=0.7", (PPO, "critic={}")),
    ),
    "critic.warmup_steps": (
        Planned("critic.warmup_steps=1", (PPO, "critic={}")),
        Refused("critic.warmup_steps=1", (PPO, "critic.trunk=shared")),
    ),
    "critic.optimizer.lr": Planned("critic.optimizer.lr=2e-3", (PPO, "critic={}")),
    "critic.optimizer.log_z_lr": Refused("critic.optimizer.log_z_lr=2e-2", (PPO, "critic={}")),
    "critic.optimizer.betas": own_trunk("critic.optimizer.betas=[0.5, 0.5]"),
    "critic.optimizer.eps": own_trunk("critic.optimizer.eps=0.1"),
    "critic.optimizer.weight_decay": own_trunk("critic.optimizer.weight_decay=0.9"),
    "critic.optimizer.clip_grad": own_trunk("critic.optimizer.clip_grad=1e-9"),
    "critic.optimizer.warmup_steps": own_trunk("critic.optimizer.warmup_steps=9"),
    "critic.optimizer.decay": Refused("critic.optimizer.decay=linear", (PPO, "critic.trunk=shared")),
    "critic.optimizer.distributed": Refused("critic.optimizer.distributed=true", (PPO, "critic={}")),
    "critic.optimizer.offload": Refused("critic.optimizer.offload=true", (PPO, "critic.trunk=shared")),
    "batch.mini_batch": Planned("batch.mini_batch=4"),
    "batch.tokens_per_microbatch": Trained("batch.tokens_per_microbatch=24"),
    "checkpoint.every": Trained("checkpoint.every=1"),
    "checkpoint.minutes": Trained("checkpoint.minutes=1e-9"),
    "checkpoint.keep_last": Trained("checkpoint.keep_last=1", ("checkpoint.every=1",)),
    "checkpoint.at_end": Trained("checkpoint.at_end=true"),
    "checkpoint.export_hf": Trained("checkpoint.export_hf=true", ("checkpoint.at_end=true",)),
    "evaluation.every": Trained("evaluation.every=0", ("evaluation.samples=4",)),
    "evaluation.benchmarks.names": (Trained(BENCHMARK), Refused(BENCHMARK, ("evaluation.every=0",))),
    "evaluation.benchmarks.data": Refused(
        "evaluation.benchmarks.data=nowhere", ("evaluation.benchmarks.names=[amc23]",)
    ),
    "evaluation.benchmarks.problems": Trained("evaluation.benchmarks.problems=2", (BENCHMARK, LONG)),
    "evaluation.benchmarks.k": (
        Trained("evaluation.benchmarks.k=2", (BENCHMARK,)),
        Refused("evaluation.benchmarks.k=2"),
    ),
    "evaluation.benchmarks.max_tokens": Trained("evaluation.benchmarks.max_tokens=2", (BENCHMARK,)),
    "evaluation.benchmarks.temperature": Trained("evaluation.benchmarks.temperature=0", (BENCHMARK, LONG)),
    "evaluation.benchmarks.top_p": Trained("evaluation.benchmarks.top_p=0.1", (BENCHMARK, LONG)),
    "evaluation.samples": (
        Trained("evaluation.samples=3"),
        Refused("evaluation.samples=3", ("evaluation.every=0",)),
    ),
    "evaluation.distinct_at": (
        Trained("evaluation.distinct_at=3"),
        Refused("evaluation.distinct_at=3", ("evaluation.every=0", "evaluation.samples=4")),
    ),
    "monitor.wandb": Tested("monitor/test_wandb_log.py::test_an_offline_run_reads_back_and_resumes_under_its_id"),
    "monitor.wandb_project": Refused("monitor.wandb_project=mine"),
    "monitor.wandb_checkpoints": Tested("monitor/test_wandb_log.py::test_a_checkpoint_is_an_artifact"),
    "monitor.trackio": Tested("integration/test_trackio.py::test_what_trackio_shows_is_what_was_logged"),
    "monitor.tensorboard": Tested("integration/test_tensorboard.py::test_what_tensorboard_reads_is_what_was_logged"),
    "monitor.samples_per_step": Trained("monitor.samples_per_step=1"),
    "monitor.distributions_every": Trained("monitor.distributions_every=0"),
    "monitor.progress": Tested("monitor/test_monitor.py::test_no_progress_no_output"),
}  # fmt: skip


def fields(model: type[Settings], place: str = "") -> Iterator[str]:
    for name in model.model_fields:
        section = section_of(model, name)
        if section:
            yield from fields(section, f"{place}{name}.")
        else:
            yield f"{place}{name}"


def evidence(kind: type) -> list[Any]:
    """(field, evidence) of one kind, as parameters."""
    found = []
    for field, entries in EVIDENCE.items():
        for entry in entries if isinstance(entries, tuple) else (entries,):
            if isinstance(entry, kind):
                found.append(pytest.param(field, entry, id=field))
    return found


def test_every_field_has_its_evidence() -> None:
    walked = set(fields(Config))
    assert walked == set(EVIDENCE), sorted(walked ^ set(EVIDENCE))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import make

    return make("llama", tmp_path_factory.mktemp("model"), vocab=15)


@pytest.fixture(scope="module")
def settings(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two small steps."""
    from jobs import write_config

    folder = tmp_path_factory.mktemp("settings")
    return write_config(
        folder, model, steps=2, parallel={"tp": 1}, checkpoint={"every": 0, "at_end": False},
        evaluation={"every": 2}, optimizer={"lr": 1e-3, "warmup_steps": 0},
    )  # fmt: skip


@pytest.mark.parametrize(("field", "entry"), evidence(Refused))
def test_refused(field: str, entry: Refused, settings: Path) -> None:
    from flowrl_mega.preflight import Inputs, check

    with pytest.raises(ConfigError) as refused:
        config = load_config(settings, [*entry.beside, entry.override])
        check(Inputs(config), 1, "auto", None)
    assert field.rpartition(".")[2] in str(refused.value), str(refused.value)
    assert entry.override.partition("=")[0].split(".")[0] in str(refused.value)


@pytest.mark.parametrize(("field", "entry"), evidence(Planned))
def test_the_plan_changes(field: str, entry: Planned, settings: Path) -> None:
    from flowrl_mega.preflight import Inputs, describe, ranks_to_start

    def plan(*overrides: str) -> str:
        config = load_config(settings, [*entry.beside, *overrides])
        return describe(Inputs(config), ranks_to_start(config), None)

    assert plan() != plan(entry.override)


@pytest.fixture(scope="module")
def trained(settings: Path, ranks1: Any) -> Callable[[tuple[str, ...]], Any]:
    """What a run with these overrides leaves; each is run once."""
    return cache(lambda overrides: ranks1.run(left, settings, overrides)[0])


@pytest.mark.ranks
@pytest.mark.parametrize(("field", "entry"), evidence(Trained))
def test_what_is_trained_changes(field: str, entry: Trained, trained: Callable[[tuple[str, ...]], Any]) -> None:
    assert trained(entry.beside) != trained((*entry.beside, entry.override))


def left(settings: Path, overrides: tuple[str, ...]) -> Any:
    """In a rank: the folders and records of a run."""
    from jobs import records

    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.preflight import Inputs
    from flowrl_mega.run import Run

    folder = Path(tempfile.mkdtemp(dir=settings.parent))
    config = load_config(settings, [*overrides, f"run_dir={folder}"])
    run = Run(Inputs(config), layouts.init(config.parallel, config.seed))
    run.run()
    run.close()
    files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_dir())
    names = [name for name in ("metrics", "samples", "evaluation") if (folder / f"{name}.jsonl").exists()]
    return files, [records(folder, name) for name in names]


@pytest.mark.parametrize(("field", "entry"), evidence(Tested))
def test_a_test_names_it(field: str, entry: Tested) -> None:
    file, _, function = entry.place.partition("::")
    assert f"def {function}(" in (TESTS / file).read_text(), entry.place
    name, folder = field.rpartition(".")[2], (TESTS / file).parent
    helpers = [path for path in folder.glob("*.py") if not path.name.startswith("test_")]
    named = [path for path in (TESTS / file, *helpers) if re.search(rf"\b{name}\b", path.read_text())]
    assert named, f"{file} does not name {name}"
