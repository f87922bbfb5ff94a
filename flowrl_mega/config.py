"""The one tree of settings. config_file.py reads it from YAML and dotted flags, and checks what one field cannot know.

Every error is a `ConfigError` with one message that names the field, the value and the fix.
"""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from flowrl_mega.config_reward import CodeSettings as CodeSettings
from flowrl_mega.config_reward import MathSettings as MathSettings
from flowrl_mega.config_reward import OverlongSettings as OverlongSettings
from flowrl_mega.config_reward import RewardSettings as RewardSettings
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
    path: PathText = Field(description="Hugging Face folder (safetensors and tokenizer) or Megatron checkpoint.")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="Data type of the weights and of computation.")
    logits_budget_mb: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto",
        description="Memory for logits kept until the backward pass, in MB; the rest is recomputed. `auto` starts at "
        "256 and, on a GPU, adds half of the memory left free at the peak of the first updates.",
    )
    spec: Literal["auto", "local", "te"] = Field(
        "auto",
        description="Layer implementation: Megatron's own (`local`) or Transformer Engine's (`te`). `auto` takes `te` "
        "for bf16 where it is usable.",
    )
    fp8: Literal["off"] | Fp8Recipe = Field(
        "off", description="FP8 recipe of the policy's linear layers; the lm-head is never in FP8."
    )
    fp8_first_last_bf16: bool | None = Field(
        None,
        description="Keep the first and the last layer in bf16. `null` means true, except with `delayed`, which does "
        "not support it.",
    )
    fp8_params: bool = Field(
        False, description="Keep the policy's weights in FP8, with fp32 master weights in the distributed optimizer."
    )
    reference_fp8: Literal["off", "tensorwise", "blockwise"] = Field(
        "off",
        description="FP8 recipe of the reference model; `delayed` is excluded because its scales come from training.",
    )
    reference_offload: bool = Field(False, description="Keep the reference in CPU memory while it is not scored.")
    fp8_check_every: int = Field(
        50, ge=0, description="Steps between comparisons of FP8 with bf16; 0 compares at the start only."
    )
    fp8_budget: float = Field(
        0.1,
        gt=0,
        description="Largest accepted mean |FP8 - bf16| of a sequence's residual, in nats per token (per answer "
        "without length norm).",
    )
    fp8_action: Literal["stop", "fallback"] = Field(
        "stop", description="Action when `fp8_budget` is exceeded: end the run, or continue in bf16."
    )

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
        description="Log-prob kernels: csrc's (`native`, built on first use), plain PyTorch, or Liger-Kernel's, which "
        "is installed separately. `auto` takes csrc's where they build.",
    )


class ParallelSettings(Settings):
    tp: int = Field(1, ge=1, description="Tensor-parallel size.")
    sequence_parallel: bool = Field(False, description="Also shard activations over the tensor-parallel ranks.")
    pp: int = Field(1, ge=1, description="Pipeline-parallel size: consecutive layers are split into this many stages.")
    vpp: int = Field(1, ge=1, description="Virtual stages on each pipeline rank (interleaved schedule).")
    cp: int = Field(1, ge=1, description="Context-parallel size: each sequence is split over this many ranks.")
    dp: int | None = Field(
        None,
        ge=1,
        description="Data-parallel size. `null` takes all remaining ranks, or this host's remaining GPUs where `train` "
        "starts the ranks (1 on CPUs).",
    )
    timeout_s: int = Field(
        600, ge=10, description="Time limit of a collective operation in seconds; exceeding it ends the job."
    )
    overlap_grad_reduce: bool = Field(
        True,
        description="Sum gradients over ranks during the backward pass; false sums them afterwards, for an objective "
        "of your own that reads a parameter on some ranks only.",
    )

    @property
    def model_ranks(self) -> int:
        """The ranks that work on one data-parallel replica's share."""
        return self.tp * self.pp * self.cp


class DaliSettings(Settings):
    shuffle: Literal["index", "reader"] = Field(
        "index",
        description="Order of the prompts: `index` is the order of loader `mmap`, `reader` DALI's own shuffle buffer "
        "over sequential reads.",
    )
    buffer: int = Field(4096, ge=1, description="Prompts in the shuffle buffer of `shuffle: reader`.")
    device: Literal["auto", "cpu", "gpu"] = Field(
        "auto", description="Device that decodes images; `auto` takes a GPU where there is one."
    )


class DataSettings(Settings):
    path: PathText | None = Field(
        None,
        description="Prompt store made by tools/prepare_data.py, or JSON lines file with a 'prompt' and the reward's "
        "fields in each row.",
    )
    task: PathText | None = Field(
        None,
        description="Source of generated prompts, instead of `path`: `sums`, or a class of your own as module:Class or "
        "path/to/file.py:Class.",
    )
    task_args: dict[str, Any] = Field(
        default_factory=dict, description="Arguments for the constructor of the task's class."
    )
    held_out: float | PathText | None = Field(
        None,
        description="Prompts held out for evaluation: a share of the distinct prompts between 0 and 1, a JSON lines "
        "file or a prompt store.",
    )
    chat_template: bool = Field(False, description="Wrap prompts in the chat template of the model's tokenizer.")
    template_date: date = Field(
        date(2024, 7, 26),
        description="Date given to chat templates that insert the current date, so that prompts do not change.",
    )
    max_prompt_tokens: int = Field(
        2048, ge=1, description="Longest allowed prompt in tokens; data with a longer one is refused."
    )
    loader: Literal["mmap", "dali"] = Field("mmap", description="Reader of the prompts; `dali` needs a prompt store.")
    dali: DaliSettings = Field(DaliSettings(), description="NVIDIA DALI's reader; needs `data.loader=dali`.")

    @field_validator("task")
    @classmethod
    def _is_task(cls, value: str | None) -> str | None:
        if value not in (None, "sums") and ":" not in str(value):
            raise ValueError("must be 'sums', or a class of yours as module:Class or path/to/file.py:Class")
        return value


Decay = Annotated[float, Field(ge=0, lt=1)]


class OptimizerSettings(Settings):
    lr: float = Field(1e-6, gt=0, description="Learning rate after warm-up.")
    log_z_lr: float | None = Field(None, gt=0, description="Learning rate of log Z; `null` takes `lr`.")
    betas: tuple[Decay, Decay] = Field((0.9, 0.999), description="AdamW's decay rates of the first and second moments.")
    eps: float = Field(1e-8, gt=0, description="AdamW's epsilon, added to the denominator.")
    weight_decay: float = Field(0.1, ge=0, description="AdamW's decoupled weight decay.")
    clip_grad: float = Field(1.0, ge=0, description="Largest global gradient norm; 0 disables clipping.")
    warmup_steps: int = Field(10, ge=0, description="Optimizer updates of linear warm-up of the learning rate.")
    decay: Literal["constant", "linear", "cosine"] = Field(
        "constant",
        description="Learning-rate schedule after the warm-up; `linear` and `cosine` reach 0 at the last update.",
    )
    distributed: bool | Literal["auto"] = Field(
        "auto",
        description="Shard the optimizer's moments over ranks with equal weights (needs Transformer Engine's "
        "FusedAdam). `auto` does so where that is available and such ranks exist.",
    )
    offload: bool = Field(False, description="Keep moments and fp32 weights in CPU memory between updates.")

    @property
    def shares(self) -> bool:
        """`distributed`, once parallel.optimizer.decided has said what auto is."""
        return self.distributed is True


class CriticSettings(Settings):
    trunk: Literal["own", "shared"] = Field(
        "own", description="Critic network: a model of its own, or a second head on the policy's last hidden states."
    )
    path: PathText | None = Field(
        None, description="Initial weights of the critic's own trunk; `null` takes `model.path`."
    )
    value_coef: float = Field(
        0.5, gt=0, description="Weight of the value loss beside the policy's loss; `trunk: shared` only."
    )
    warmup_steps: int = Field(
        0, ge=0, description="Initial steps in which only the critic's own trunk is trained, not the policy."
    )
    optimizer: OptimizerSettings = Field(
        OptimizerSettings(lr=1e-5),
        description="Optimizer of the critic's own trunk; with `trunk: shared` only `lr`, the head's, is read.",
    )

    @field_validator("optimizer", mode="before")
    @classmethod
    def _own_rate(cls, value: Any) -> Any:
        """Setting one of its fields does not unset the critic's rate, ten times the policy's default."""
        return {"lr": 1e-5, **value} if isinstance(value, dict) else value


class NonfiniteSettings(Settings):
    most: int = Field(
        10, ge=1, description="Consecutive skipped updates, their loss or gradient not finite, that end the run."
    )


class BatchSettings(Settings):
    mini_batch: int | None = Field(None, ge=1, description="Sequences per optimizer update; `null` takes a whole step.")
    tokens_per_microbatch: int = Field(
        16384,
        ge=1,
        description="Most tokens of a packed micro-batch on each rank; a longer sequence is a micro-batch of its own.",
    )


class CheckpointSettings(Settings):
    every: int = Field(0, ge=0, description="Steps between checkpoints; 0 disables this rule.")
    minutes: float = Field(
        30.0,
        ge=0,
        description="Minutes after a checkpoint from which the next step that ends is saved; 0 disables this.",
    )
    keep_last: int = Field(2, ge=1, description="Number of newest checkpoints to keep; older ones are deleted.")
    at_end: bool = Field(True, description="Save a checkpoint after the last step.")
    export_hf: bool = Field(False, description="Also write the policy as a Hugging Face folder, step_N/hf.")

    def is_due(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is to follow this step, which ends so long after the last one."""
        return bool(self.every and step % self.every == 0) or 0 < 60 * self.minutes <= seconds


class BenchmarkSettings(Settings):
    """As the settings of `flowrl-mega eval` (config_eval.py)."""

    names: list[str] = Field(
        [], description="Benchmarks: names from docs/evaluation.md, reasoning_gym:TASK, or JSON lines files."
    )
    data: PathText | None = Field(
        None, description="Folder with NAME.jsonl for each benchmark; `null` downloads them from the Hugging Face hub."
    )
    problems: int | None = Field(
        None, ge=1, description="Problems taken from each benchmark, counted from its start; `null` takes all."
    )
    k: int = Field(4, ge=1, description="Answers per problem.")
    max_tokens: int | None = Field(
        None, ge=1, description="Longest answer in tokens, including the end token; `null` takes `rollout.max_tokens`."
    )
    temperature: float = Field(0.6, ge=0, description="Sampling temperature; 0 is greedy.")
    top_p: float = Field(0.95, gt=0, le=1, description="Probability mass of nucleus sampling; 1 disables it.")


class EvaluationSettings(Settings):
    every: int = Field(
        0, ge=0, description="Steps between evaluations on held-out prompts and benchmarks; 0 disables them."
    )
    benchmarks: BenchmarkSettings = Field(
        BenchmarkSettings(),
        description="Benchmarks evaluated while the run trains; each setting is as in `flowrl-mega eval`.",
    )
    samples: int = Field(4, ge=1, description="Answers per held-out prompt.")
    distinct_at: int = Field(
        64,
        ge=1,
        description="Number of draws for exact pass@k and distinct right answers, for rows that list 'right_answers'.",
    )


class MonitorSettings(Settings):
    wandb: Literal["off", "offline", "online"] = Field(
        "off", description="Weights & Biases logging: disabled, to local files only, or to its server."
    )
    wandb_project: str = Field("flowrl-mega", description="Project name in wandb and trackio.")
    wandb_checkpoints: bool = Field(False, description="Log every checkpoint as an artifact of the wandb run.")
    tensorboard: bool = Field(
        False, description="Write TensorBoard event files to run_dir/tensorboard (needs flowrl-mega[tensorboard])."
    )
    trackio: bool = Field(False, description="Log to trackio, in its own folder (needs flowrl-mega[trackio]).")
    samples_per_step: int = Field(4, ge=0, description="Answers written to samples.jsonl at each step.")
    distributions_every: int = Field(
        10,
        ge=0,
        description="Steps between records of distributions.jsonl; 0 disables them and the metrics `target/*`, "
        "`diversity/*`, `kind/*` and `loss/residual_p*`.",
    )
    progress: bool = Field(True, description="Show a progress bar on the console.")

    @field_validator("wandb", mode="before")
    @classmethod
    def _off(cls, value: Any) -> Any:
        """YAML 1.1 reads the word off as false."""
        return "off" if value is False else value


class Config(Settings):
    run_dir: PathText = Field(
        description="Run folder for config.yaml, metrics.jsonl, samples.jsonl, checkpoints/ and more."
    )
    steps: int = Field(ge=1, description="Training steps of the whole run, including those before a resume.")
    seed: int = Field(0, ge=0, description="Random seed of prompt order, sampling and new weights.")
    model: ModelSettings = Field(description="Policy and reference: source, precision and layers.")
    megatron: dict[str, Any] = Field(
        default_factory=dict,
        description="Fields passed to Megatron's TransformerConfig; README.md, Layouts, lists those that are accepted.",
    )
    ops: OpsSettings = Field(OpsSettings(), description="Kernels for log-probs.")
    parallel: ParallelSettings = Field(
        ParallelSettings(), description="Layout: how the model and the batch are divided among ranks."
    )
    data: DataSettings = Field(description="Training prompts and held-out prompts.")
    reward: RewardSettings = Field(description="Reward settings; a string is short for {function: STRING}.")
    rollout: RolloutSettings = Field(
        RolloutSettings(), description="Generation of answers, by the embedded engine or by servers."
    )
    objective: dict[str, Any] = Field(
        default_factory=lambda: {"name": "flowrl"},
        description="Objective: `name` is a built-in one or module:Class, the other fields are its own, each described "
        "in its file in flowrl_mega/objectives/.",
    )
    optimizer: OptimizerSettings = Field(
        OptimizerSettings(), description="Optimizer of the policy and the partition function."
    )
    critic: CriticSettings | None = Field(
        None, description="Value function of objective `ppo`; {} takes the defaults, `null` has none."
    )
    on_nonfinite: NonfiniteSettings = Field(
        NonfiniteSettings(), description="Handling of losses and gradients that are not finite."
    )
    batch: BatchSettings = Field(BatchSettings(), description="Division of a step into updates and micro-batches.")
    checkpoint: CheckpointSettings = Field(CheckpointSettings(), description="Frequency and contents of checkpoints.")
    evaluation: EvaluationSettings = Field(EvaluationSettings(), description="Evaluation while the run trains.")
    monitor: MonitorSettings = Field(MonitorSettings(), description="Logging to files, console and trackers.")

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
