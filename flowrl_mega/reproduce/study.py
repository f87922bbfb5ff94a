"""A study: base model, data, methods, evaluation, and the published table that it is held against, in one YAML file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, model_validator

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_eval import EvalConfig, check_evaluation
from flowrl_mega.config_file import load_config
from flowrl_mega.settings import PathText, Settings, validated


class Shape(Settings):
    """The sizes in a model's config.json that memory and time are counted from."""

    layers: int = Field(ge=1)
    hidden: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int = Field(ge=1)
    ffn: int = Field(ge=1)
    vocab: int = Field(ge=1)
    tied: bool = Field(False, description="the embedding is the lm-head, too")

    @property
    def parameters(self) -> int:
        head = self.hidden // self.heads
        attention = 2 * self.hidden * self.hidden + 2 * self.hidden * self.kv_heads * head
        layer = attention + 3 * self.hidden * self.ffn + 2 * self.hidden
        return self.layers * layer + self.vocab * self.hidden * (1 if self.tied else 2) + self.hidden


class Model(Settings):
    """Where a Hugging Face folder comes from: the hub, or a command that makes it at {out}."""

    hub: str | None = Field(None, description="id on the hub")
    revision: str | None = Field(
        None, description="a commit there; null: the newest when it is fetched, which is noted"
    )
    command: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.hub is None) == (self.command is None):
            raise ValueError("set exactly one of hub and command")
        return self


class Base(Model):
    shape: Shape


class Method(Settings):
    """A training run, or a model that somebody else has trained."""

    config: PathText | None = Field(None, description="settings of `flowrl-mega train`, a preset say")
    overrides: list[str] = Field([], description="section.field=value, as on the command line")
    published: Model | None = Field(None, description="instead: a checkpoint that is fetched, and evaluated alone")

    @model_validator(mode="after")
    def _one(self) -> Method:
        if (self.config is None) == (self.published is None):
            raise ValueError("set exactly one of config and published")
        return self


class Published(Settings):
    source: str = Field(description="where the numbers stand")
    rows: dict[str, dict[str, float]] = Field(
        description="method, or base: benchmark: avg@k in percent; benchmark/figure: another figure; mean: over them"
    )

    def figures(self) -> dict[str, dict[str, str]]:
        """By benchmark the columns that the table has of it, each with the figure that it is; "" for avg@k."""
        found: dict[str, dict[str, str]] = {}
        for column in dict.fromkeys(column for row in self.rows.values() for column in row):
            benchmark, _, figure = column.partition("/")
            found.setdefault(benchmark, {})[column] = figure
        return found


class Hardware(Settings):
    gpus: int = Field(0, ge=0, description="of the machines that it is for; 0: a CPU")
    memory_gb: float = Field(80.0, gt=0, description="of one")
    tflops: float = Field(989.0, gt=0, description="dense bf16 of one; an H100's")
    sbatch_train: list[str] = Field([], description="--submit: options of sbatch for a training run (--nodes=4)")
    sbatch_other: list[str] = Field([], description="--submit: for data, evaluation and report (--gpus=8)")


class Study(Settings):
    title: str
    note: str = Field("", description="stands first in the report")
    run_dir: PathText
    base: Base
    data: str | None = Field(None, description="command that makes the prompt store {out} for the model {base}")
    inputs: dict[str, str] = Field({}, description="data sets of the hub that `data` reads, as {NAME}")
    methods: dict[str, Method] = Field(min_length=1)
    train: list[str] = Field([], description="overrides of every method, before its own")
    evaluate: dict[str, Any] = Field(description="settings of `flowrl-mega eval`, without run_dir and model.path")
    published: Published | None = None
    hardware: Hardware = Hardware()

    def folder(self, *names: str) -> Path:
        return Path(self.run_dir, *names)

    @property
    def base_folder(self) -> Path:
        return self.folder("base")

    @property
    def data_folder(self) -> Path:
        return self.folder("data", "train")

    def trained(self) -> dict[str, Method]:
        return {name: method for name, method in self.methods.items() if method.config}

    def train_overrides(self, name: str) -> list[str]:
        """The flags of a method's `flowrl-mega train`, as on a command line."""
        places = [f"run_dir={self.folder('methods', name)}", f"model.path={self.base_folder}"]
        places += [f"data.path={self.data_folder}"] if self.data else []
        return [f"--{override}" for override in (*self.train, *self.methods[name].overrides, *places)]

    def last_checkpoint(self, name: str) -> Path:
        """Of a method's training."""
        return self.folder("methods", name, "checkpoints", f"step_{self.train_config(name).steps}")

    def model_of(self, name: str) -> Path:
        """The Hugging Face folder that is evaluated under this name: the base, a fetched one, or what was trained."""
        if name == "base":
            return self.base_folder
        return self.folder("published" if self.methods[name].published else "models", name)

    def train_config(self, name: str) -> Config:
        config = self.methods[name].config
        assert config is not None
        # Whether there are data is looked at when the stage before has made them; until then any file stands for them.
        stand_in = [f"--data.path={config}"] if self.data and not self.data_folder.exists() else []
        return load_config(config, [*self.train_overrides(name), *stand_in])

    def evaluations(self) -> list[str]:
        return ["base", *self.methods]

    def eval_config(self, name: str) -> EvalConfig:
        """The settings of one model's evaluation, whose files the stage fetch has put into benchmarks/."""
        tree = {**self.evaluate, "run_dir": str(self.folder("evaluations", name))}
        tree["model"] = {**tree.get("model", {}), "path": str(self.model_of(name))}
        tree.setdefault("data", str(self.folder("benchmarks")))
        config = validated(EvalConfig, tree, "evaluate")
        check_evaluation(config)
        return config


def read_study(path: str) -> Study:
    """The checked study of a YAML file. Raises ConfigError naming file, field and fix."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such study; see examples/studies/") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from None
    try:
        return validated(Study, tree, "")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
