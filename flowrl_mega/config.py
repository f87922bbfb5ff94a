"""The one tree of settings. config_file.py reads it from YAML and dotted flags, and checks what one field cannot know.

Every error is a `ConfigError` with one message that names the field, the value and the fix.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flowrl_mega.config_rollout import MismatchSettings as MismatchSettings
from flowrl_mega.config_rollout import ReplaySettings as ReplaySettings
from flowrl_mega.config_rollout import RolloutSettings as RolloutSettings
from flowrl_mega.config_rollout import SyncSettings as SyncSettings
from flowrl_mega.settings import ConfigError as ConfigError
from flowrl_mega.settings import Diverged as Diverged
from flowrl_mega.settings import PathText, Settings, path
from flowrl_mega.settings import RunError as RunError

LogZKind = Literal["mlp", "mlp-detached", "zero", "constant", "group", "random", "frozen"]
Fp8Recipe = Literal["delayed", "tensorwise", "blockwise"]


class LogZ(Settings):
    """Which partition function the model has: what FlowRL's settings of `objective` ask of it."""

    kind: LogZKind = "mlp"
    prompt: Literal["all", "drop-last"] = "all"
    dropout: float = 0.0

    @property
    def learned(self) -> bool:
        """Whether the model has parameters for it."""
        return self.kind in ("mlp", "mlp-detached", "constant")


class ModelSettings(Settings):
    path: PathText = Field(description="Hugging Face folder with *.safetensors and tokenizer, or a Megatron checkpoint")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="type of weights and activations")
    logits_budget_mb: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="logits kept for the backward pass, more is recomputed; auto: 256, and on a GPU from the second "
        "update on half of the memory that was free at its peak",
    )
    spec: Literal["auto", "local", "te"] = Field(
        "auto", description="layers: Megatron's own or Transformer Engine's; auto: te for bf16, where it can be used"
    )
    fp8: Literal["off"] | Fp8Recipe = Field("off", description="recipe of the policy's linear layers; not of the head")
    fp8_first_last_bf16: bool | None = Field(
        None, description="the first and the last layer stay in bf16; null: yes, but not with delayed, which cannot"
    )
    fp8_params: bool = Field(
        False, description="the policy's FP8 weights are kept and gathered in FP8, beside fp32 ones in shares"
    )
    reference_fp8: Literal["off", "tensorwise", "blockwise"] = Field(
        "off", description="recipe of the reference; not delayed, whose scales come from training"
    )
    reference_offload: bool = Field(False, description="the reference lies in CPU memory while it is not scored")
    fp8_check_every: int = Field(50, ge=0, description="steps between comparisons with bf16; 0: at the start only")
    fp8_budget: float = Field(0.1, gt=0, description="mean |FP8 - bf16| of a sequence's residual, nats a token")
    fp8_action: Literal["stop", "fallback"] = Field("stop", description="beyond the budget; fallback: go on in bf16")

    @property
    def first_logits_budget_mb(self) -> int:
        """Of a run's first updates, before anything was measured."""
        return 256 if self.logits_budget_mb == "auto" else self.logits_budget_mb

    @field_validator("fp8", "reference_fp8", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML 1.1 reads the word off as false."""
        return "off" if value is False else value


class OpsSettings(Settings):
    backend: Literal["auto", "native", "torch", "liger"] = Field(
        "auto",
        description="log-prob kernels: csrc's, built on first use, plain torch, or Liger-Kernel's, which is installed "
        "apart; auto: csrc's where they build",
    )


class ParallelSettings(Settings):
    tp: int = Field(1, ge=1, description="tensor-parallel ranks")
    sequence_parallel: bool = Field(False, description="shard activations over the tensor-parallel ranks too")
    pp: int = Field(1, ge=1, description="pipeline stages: runs of layers on ranks of their own")
    vpp: int = Field(1, ge=1, description="virtual stages per pipeline rank (interleaved schedule)")
    cp: int = Field(1, ge=1, description="context-parallel ranks: each sequence is shared out over them")
    dp: int | None = Field(
        None, ge=1, description="data-parallel replicas; null: the ranks, or this host's GPUs, that are left (CPU: 1)"
    )
    timeout_s: int = Field(600, ge=10, description="a collective that takes longer ends the job")
    overlap_grad_reduce: bool = Field(
        True,
        description="gradients are summed over ranks during the backward pass; false: after it, for an objective of "
        "yours that reads a parameter on some ranks only",
    )

    @property
    def model_ranks(self) -> int:
        """The ranks that work on one data-parallel replica's share."""
        return self.tp * self.pp * self.cp


class DaliSettings(Settings):
    shuffle: Literal["index", "reader"] = Field(
        "index", description="the order of loader mmap, or that of DALI's own shuffle buffer, which reads sequentially"
    )
    buffer: int = Field(4096, ge=1, description="prompts in the buffer of shuffle: reader")
    device: Literal["auto", "cpu", "gpu"] = Field("auto", description="what decodes images; auto: a GPU where there is")


class DataSettings(Settings):
    path: PathText | None = Field(
        None,
        description="prompt store (tools/prepare_data.py), or JSON lines: a 'prompt' each and what rewards read",
    )
    task: PathText | None = Field(None, description="instead of a file: sums, or a class of yours as module:Class")
    task_args: dict[str, Any] = Field(default_factory=dict, description="arguments of the task")
    held_out: float | PathText | None = Field(
        None, description="prompts kept for evaluation: a share, or a JSON lines file"
    )
    chat_template: bool = Field(False, description="prompts go through the tokenizer's chat template")
    template_date: date = Field(
        date(2024, 7, 26), description="what a chat template that writes today's date gets: prompts stay the same"
    )
    max_prompt_tokens: int = Field(2048, ge=1, description="data with longer prompts is refused")
    loader: Literal["mmap", "dali"] = Field("mmap", description="what reads prompts; dali needs a prompt store")
    dali: DaliSettings = DaliSettings()

    @field_validator("task")
    @classmethod
    def _is_task(cls, value: str | None) -> str | None:
        if value not in (None, "sums") and ":" not in str(value):
            raise ValueError("must be 'sums', or a class of yours as module:Class or path/to/file.py:Class")
        return value


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    lr: float = Field(1e-6, gt=0, description="learning rate after warm-up")
    log_z_lr: float | None = Field(None, gt=0, description="learning rate of the partition function; null: lr")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay of both moments")
    eps: float = Field(1e-8, gt=0, description="added to the root of AdamW's second moment")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's, of matrices alone")
    clip_grad: float = Field(1.0, ge=0, description="largest gradient norm; 0: no clipping")
    warmup_steps: int = Field(10, ge=0, description="updates of linear warm-up")
    decay: Literal["constant", "linear", "cosine"] = Field("constant", description="after the warm-up; ends at 0")
    distributed: bool | Literal["auto"] = Field(
        "auto",
        description="each rank that has the same weights keeps a share of the moments (needs Transformer Engine's "
        "FusedAdam); auto: where that is there and ranks have the same",
    )
    offload: bool = Field(False, description="moments and fp32 weights lie in CPU memory between updates")

    @property
    def shares(self) -> bool:
        """`distributed`, once parallel.optimizer.decided has said what auto is."""
        return self.distributed is True


class CriticSettings(Settings):
    trunk: Literal["own", "shared"] = Field(
        "own", description="a model of its own, or a second head on the policy's last hidden states"
    )
    path: PathText | None = Field(None, description="what its own trunk starts from, as model.path; null: model.path")
    value_coef: float = Field(0.5, gt=0, description="weight of the value loss beside the policy's, shared trunk only")
    warmup_steps: int = Field(0, ge=0, description="first steps, in which its own trunk learns and the policy waits")
    optimizer: OptimizerSettings = Field(
        OptimizerSettings(lr=1e-5), description="its own trunk's; of a shared one lr alone is read, the head's rate"
    )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _own_rate(cls, value: Any) -> Any:
        """Setting one of its fields does not unset the critic's rate, ten times the policy's default."""
        return {"lr": 1e-5, **value} if isinstance(value, dict) else value


class CodeSettings(Settings):
    isolation: Literal["namespaces", "process"] = Field(
        "namespaces",
        description="the least that programs run in: own user, pid, network and mount namespaces; process: no network "
        "or file isolation, limits alone",
    )
    score: Literal["all", "fraction"] = Field("all", description="1 if all tests pass, else 0; or the share that does")
    python: PathText | None = Field(None, description="interpreter of the programs; null: this one's")
    packages: tuple[str, ...] = Field(
        ("numpy",),
        description="with python=null: modules of this environment that programs and tests may import beside the "
        "standard library",
    )
    wall_s: float = Field(
        10.0, gt=0, description="a program that runs longer, without its wait for a processor, is ended"
    )
    cpu_s: int = Field(8, ge=1, description="CPU time of a program")
    memory_mb: int = Field(1024, ge=32, description="memory of a program and all that it starts")
    disk_mb: int = Field(64, ge=1, description="the temporary folder, a program's only writable place")
    processes: int = Field(16, ge=1, description="processes and threads of a program")
    open_files: int = Field(64, ge=8, description="files that a process may have open")
    output_kb: int = Field(1024, ge=1, description="what a program may write to stdout and stderr; more ends it")
    url: str | None = Field(None, description="a remote sandbox instead: where /run_code of SandboxFusion answers")


class OverlongSettings(Settings):
    buffer: int = Field(ge=1, description="the last tokens before rollout.max_tokens, in which the penalty grows")
    penalty: float = Field(1.0, gt=0, description="at rollout.max_tokens")


class MathSettings(Settings):
    timeout_s: int = Field(5, ge=1, description="of math-verify, for parsing and for comparing one answer")


class RewardSettings(Settings):
    """What a reward function gets as its third argument, if it takes one."""

    function: PathText = Field(
        description="module:function or file.py:function; (row, response[, settings]) -> float, (float, why) or "
        "(float, why, kind)"
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="processes a rank that score; null: its share of the cores; 0: the rank itself",
    )
    timeout_s: float = Field(60.0, gt=0, description="a call that takes longer is ended and scores as wrong")
    right_at: float | None = Field(
        None, description="least reward of an answer that counts as right; null: the function's own, else any above 0"
    )
    overlong: OverlongSettings | None = Field(None, description="DAPO's soft penalty of long answers; null: none")
    math: MathSettings = MathSettings()
    code: CodeSettings = CodeSettings()


class NonfiniteSettings(Settings):
    most: int = Field(
        10, ge=1, description="updates skipped in a row for a loss or gradient that is not finite; more end the run"
    )


class BatchSettings(Settings):
    mini_batch: int | None = Field(None, ge=1, description="sequences an optimizer step; null: the whole batch")
    tokens_per_microbatch: int = Field(16384, ge=1, description="packed rows of a rank's micro-batch")


class CheckpointSettings(Settings):
    every: int = Field(0, ge=0, description="steps between checkpoints; 0: by time and at the end only")
    minutes: float = Field(
        30.0, ge=0, description="a step that ends so long after the last checkpoint is saved; 0: not by time"
    )
    keep_last: int = Field(2, ge=1, description="checkpoints that are kept; older ones are removed")
    at_end: bool = Field(True, description="save after the last step")
    export_hf: bool = Field(False, description="with each checkpoint the policy as a Hugging Face folder, step_N/hf")

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is to follow this step, which ends so long after the last one."""
        return bool(self.every and step % self.every == 0) or 0 < 60 * self.minutes <= seconds


class BenchmarkSettings(Settings):
    """As the settings of `flowrl-mega eval` (config_eval.py)."""

    names: list[str] = Field([], description="of docs/evaluation.md's table, reasoning_gym:TASK, or JSON lines files")
    data: PathText | None = Field(None, description="folder with NAME.jsonl of each benchmark; null: from the hub")
    problems: int | None = Field(None, ge=1, description="only the first so many of each benchmark; null: all")
    k: int = Field(4, ge=1, description="answers a problem")
    max_tokens: int | None = Field(None, ge=1, description="null: rollout.max_tokens")
    temperature: float = Field(0.6, ge=0, description="0: greedy")
    top_p: float = Field(0.95, gt=0, le=1, description="nucleus sampling; 1: off")


class EvaluationSettings(Settings):
    every: int = Field(0, ge=0, description="steps between evaluations on held-out prompts and benchmarks; 0: never")
    benchmarks: BenchmarkSettings = BenchmarkSettings()
    samples: int = Field(4, ge=1, description="answers a prompt")
    distinct_at: int = Field(64, ge=1, description="k of the exact figures, for rows that list their 'right_answers'")


class MonitorSettings(Settings):
    wandb: Literal["off", "offline", "online"] = Field("off", description="offline: files to be synced later")
    wandb_project: str = Field("flowrl-mega", description="the project's name in wandb and trackio")
    wandb_checkpoints: bool = Field(False, description="every checkpoint also as an artifact of the wandb run")
    tensorboard: bool = Field(False, description="also event files in run_dir/tensorboard; flowrl-mega[tensorboard]")
    trackio: bool = Field(False, description="also a run of trackio, in its own folder; flowrl-mega[trackio]")
    samples_per_step: int = Field(4, ge=0, description="answers written to samples.jsonl each step")
    distributions_every: int = Field(
        10,
        ge=0,
        description="steps between records of distributions.jsonl; 0: none, nor the metrics target/*, diversity/*, "
        "kind/* and loss/residual_p*",
    )
    progress: bool = Field(True, description="a line or bar per step on the console")

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML 1.1 reads the word off as false."""
        return "off" if value is False else value


class Config(Settings):
    run_dir: PathText = Field(description="the run folder: config.yaml, metrics.jsonl, samples.jsonl, checkpoints/")
    steps: int = Field(ge=1, description="training steps in all, those before a resume included")
    seed: int = Field(0, ge=0, description="rules everything: prompts, sampling, initial weights")
    model: ModelSettings
    megatron: dict[str, Any] = Field(default_factory=dict, description="passed to Megatron's TransformerConfig")
    ops: OpsSettings = OpsSettings()
    parallel: ParallelSettings = ParallelSettings()
    data: DataSettings
    reward: RewardSettings = Field(description="a string is short for {function: STRING}")
    rollout: RolloutSettings = RolloutSettings()
    objective: dict[str, Any] = Field(
        default_factory=lambda: {"name": "flowrl"}, description="its name, or module:Class, and its own settings"
    )
    optimizer: OptimizerSettings = OptimizerSettings()
    critic: CriticSettings | None = Field(None, description="the value function of objective ppo; {}: the defaults")
    on_nonfinite: NonfiniteSettings = NonfiniteSettings()
    batch: BatchSettings = BatchSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    evaluation: EvaluationSettings = EvaluationSettings()
    monitor: MonitorSettings = MonitorSettings()

    @field_validator("objective", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        """Setting one of its fields does not unset the default's name, which may be that of a file, too."""
        if not isinstance(value, dict):
            return value
        name = value.get("name", "flowrl")
        return {**value, "name": path(name) if isinstance(name, str) else name}

    @field_validator("reward", mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"function": value} if isinstance(value, str) else value

    @property
    def sequences_per_step(self) -> int:
        return self.rollout.prompts_per_step * self.rollout.group_size

    @property
    def updates_per_step(self) -> int:
        return self.sequences_per_step // (self.batch.mini_batch or self.sequences_per_step)

    def dump(self) -> dict[str, Any]:
        """Plain values, as written to config.yaml."""
        return self.model_dump(mode="json")
