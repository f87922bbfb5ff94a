"""What a study would take, counted from shapes before anything is fetched: memory of a GPU, disk, GPU hours."""

from __future__ import annotations

from flowrl_mega.benchmark.table import BENCHMARKS
from flowrl_mega.config import Config, ConfigError
from flowrl_mega.reproduce.study import Shape, Study

# Assumed where nothing has been measured: the share of a GPU's peak that training and generation reach, and the part of
# the longest answer that the mean one has.
TRAINING, GENERATION, LENGTH = 0.35, 0.1, 0.5
UNKNOWN = 300  # problems of a benchmark whose number is not written down
GIB, GB = 2.0**30, 1e9


def memory_gib(shape: Shape, config: Config, gpus: int) -> dict[str, float]:
    """GiB of one GPU while training: weights, gradients, moments with fp32 weights, reference, inputs of the layers."""
    parallel = config.parallel
    shards = parallel.tp * parallel.pp
    copies = max(1, gpus // shards)
    weights = shape.parameters / shards
    shares = copies if config.optimizer.distributed is not False else 1
    tokens = config.batch.tokens_per_microbatch / parallel.cp / (parallel.tp if parallel.sequence_parallel else 1)
    full = config.megatron.get("recompute_granularity") == "full"
    inputs = tokens * shape.hidden * 2 * shape.layers / parallel.pp * (1 if full else 17)
    found = {"weights": 2 * weights, "gradients": 4 * weights, "moments": 12 * weights / shares, "activations": inputs}
    found["reference"] = 0.0 if config.model.reference_offload else 2 * weights
    if config.critic and config.critic.trunk == "own":
        found["critic"] = (2 + 4 + 12 / shares) * weights
    return {name: size / GIB for name, size in found.items()}


def disk_gb(study: Study) -> float:
    """The base, each run's end as a model, and of each run the checkpoints that are kept: weights, fp32 weights and
    moments."""
    parameters = study.base.shape.parameters
    kept = sum(study.train_config(name).checkpoint.keep_last for name in study.trained())
    fetched = sum(method.published is not None for method in study.methods.values())
    return parameters * (2 * (1 + fetched + len(study.trained())) + 14 * kept) / GB


def fetched_gb(study: Study) -> float:
    """The models that are fetched, at two bytes a parameter."""
    return 2 * study.base.shape.parameters * (1 + sum(m.published is not None for m in study.methods.values())) / GB


def check_disk(study: Study, free_gb: float) -> str | None:
    """A line where the whole study will not fit on the disk. ConfigError where not even what is fetched does."""
    fetched, whole = fetched_gb(study), disk_gb(study)
    if fetched > free_gb:
        raise ConfigError(
            f"{study.run_dir}: the models to be fetched take {fetched:,.1f} GB, and {free_gb:,.1f} GB are free; make "
            "room, or give the study's run_dir on another disk"
        )
    if whole <= free_gb:
        return None
    return f"the whole study takes about {whole:,.0f} GB, and {free_gb:,.0f} GB are free where {study.run_dir} is"


def hours(study: Study) -> dict[str, float]:
    """GPU hours of each step that has any, by the assumptions above; none on a CPU."""
    hardware, parameters = study.hardware, study.base.shape.parameters
    if not hardware.gpus:
        return {}
    flops = hardware.tflops * 1e12
    found = {}
    for name in study.trained():
        config = study.train_config(name)
        tokens = config.steps * config.sequences_per_step * config.rollout.max_tokens * LENGTH
        passes = (6 + 2 * 2) * parameters * tokens / TRAINING + 2 * parameters * tokens / GENERATION
        found[f"train {name}"] = passes / flops / 3600
    asked = study.eval_config("base")
    problems = sum(BENCHMARKS[name].rows or UNKNOWN for name in asked.benchmarks if name in BENCHMARKS)
    tokens = problems * asked.k * asked.rollout.max_tokens * LENGTH
    for name in study.evaluations():
        found[f"evaluate {name}"] = 2 * parameters * tokens / GENERATION / flops / 3600
    return found


def describe(study: Study) -> str:
    lines = [study.title, *filter(None, [study.note])]
    lines.append(f"base: {study.base.shape.parameters / 1e9:.2f}e9 parameters; disk {disk_gb(study):,.0f} GB")
    taken = hours(study)
    for name in study.trained():
        config = study.train_config(name)
        memory = memory_gib(study.base.shape, config, study.hardware.gpus or 1)
        parts = ", ".join(f"{what} {size:.1f}" for what, size in memory.items())
        needed, has = sum(memory.values()), study.hardware.memory_gb * GB / GIB
        fits = f" of a GPU's {has:.1f}{'' if needed <= has else ', WHICH IS TOO LITTLE'}" if study.hardware.gpus else ""
        lines.append(f"train {name}: {needed:.1f} GiB a rank{fits} ({parts}), without servers")
    lines += [f"{name}: {of:,.1f} GPU hours" for name, of in taken.items()]
    if taken:
        lines.append(
            f"in all {sum(taken.values()):,.0f} GPU hours on {study.hardware.gpus} GPUs of {study.hardware.tflops:g} "
            f"TFLOP/s; assumed, not measured: {TRAINING:.0%} of the peak while training, {GENERATION:.0%} while "
            f"generating, answers of {LENGTH:.0%} of the longest"
        )
    return "\n".join(lines)
