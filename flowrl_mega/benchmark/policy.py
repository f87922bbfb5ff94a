"""The model of an evaluation, checked before anything starts, and the prompts that its tokenizer makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from flowrl_mega.benchmark.chat import ChatWriter
from flowrl_mega.benchmark.embedded import EmbeddedWriter
from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.benchmark.servers import ServersWriter
from flowrl_mega.benchmark.writer import Work, Writer
from flowrl_mega.checkpoint import check_model, is_megatron, megatron_to_hf
from flowrl_mega.config_eval import EvalConfig
from flowrl_mega.data.chat import as_messages
from flowrl_mega.data.fit import check_positions, check_vocabulary
from flowrl_mega.data.load_prompts import load_tokenizer
from flowrl_mega.data.prompts import Prompt, tokenized
from flowrl_mega.data.stop_ids import check_stop_ids, stop_ids
from flowrl_mega.model.architecture import Architecture, read_architecture
from flowrl_mega.model.checks import check_layout, check_pipeline
from flowrl_mega.parallel.layout import Layout


class Evaluated(NamedTuple):
    """A model with its tokenizer, and each benchmark's prompts by its name."""

    arch: Architecture
    tokenizer: Any
    ends: tuple[int, ...]  # token ids that end an answer
    prompts: dict[str, list[Prompt]]


def prepare(config: EvalConfig, every: list[Problems]) -> Evaluated:
    """Raises ConfigError for a model or prompts that cannot be evaluated as the settings say."""
    path = config.model.path
    assert path is not None, "the settings' check has seen to it"
    arch, tokenizer = read_architecture(path), load_tokenizer(path)
    check_model(path, arch)
    ends = stop_ids(path, tokenizer)
    check_stop_ids(ends, arch.vocab, path)
    template = bool(tokenizer.chat_template) if config.chat_template is None else config.chat_template
    prompts = {
        problems.name: tokenized(problems.rows, tokenizer, template, None, config.template_date) for problems in every
    }
    embedded = config.rollout.engine == "embedded"
    for name, of in prompts.items():
        check_vocabulary(name, of, arch.vocab, tokenizer)
        if embedded:
            check_positions(name, of, arch.max_positions, config.rollout.max_tokens)
    if embedded:
        check_layout(arch, config.parallel.tp)
        check_pipeline(arch, config.parallel.pp, config.parallel.vpp)
    return Evaluated(arch, tokenizer, ends, prompts)


def work_of(problems: Problems, missing: list[list[int]], evaluated: Evaluated | None) -> Work:
    if evaluated is None:
        return Work(problems.name, [as_messages(row["prompt"]) for row in problems.rows], missing)
    return Work(problems.name, [prompt.token_ids for prompt in evaluated.prompts[problems.name]], missing)


def build_writer(config: EvalConfig, evaluated: Evaluated | None, layout: Layout) -> Writer:
    """Collective. `evaluated`: None where a chat server has the model. Servers that are started here read a Hugging
    Face folder: of a checkpoint one is made in run_dir."""
    if evaluated is None:
        return ChatWriter(config)
    arch, tokenizer, ends, _ = evaluated
    if config.rollout.engine == "embedded":
        return EmbeddedWriter(config, layout, arch, tokenizer, ends)
    model = Path(str(config.model.path))
    if isinstance(config.rollout.servers, int) and is_megatron(model):
        folder = Path(config.run_dir) / "hf"
        if not folder.is_dir():  # it appears whole, and of the same weights: answers of others are refused
            megatron_to_hf(model, folder)
        model = folder
    return ServersWriter(config, arch, tokenizer, ends, model)
