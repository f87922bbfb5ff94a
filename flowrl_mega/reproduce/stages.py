"""The stages of a study, in order: each is a list of steps, and a step that is done is not done again."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import yaml

from flowrl_mega.benchmark import codeforces
from flowrl_mega.benchmark.run import SCORES
from flowrl_mega.benchmark.table import BENCHMARKS
from flowrl_mega.checkpoint import find_checkpoint, step_of
from flowrl_mega.checkpoint.convert import megatron_to_hf
from flowrl_mega.config import ConfigError
from flowrl_mega.parallel.launch import launch_job
from flowrl_mega.report.command import PAGE, end_with_page
from flowrl_mega.reproduce.fetch import fetch_benchmark, fetch_contests, fetch_dataset, fetch_model
from flowrl_mega.reproduce.report import write_report
from flowrl_mega.reproduce.study import Model, Study

Stop = Callable[[], bool]
DONE, STOPPED = 0, 75


class Step(NamedTuple):
    """`words`: what it does, as a command where it is one. `run` returns an exit code."""

    stage: str
    name: str
    words: str
    is_done: Callable[[], bool]
    run: Callable[[Stop], int]


def steps(study: Study, data: str | None) -> list[Step]:
    """All steps of the study. `data`: a folder with the benchmarks' files, which then need no network."""
    found = [*_fetch(study, data)]
    if study.data:
        command = study.data.format(base=study.base_folder, out=study.data_folder, **_inputs(study))
        found.append(_command("data", "prompts", command, study.data_folder.is_dir))
    for name in study.trained():
        found.append(_train(study, name))
    found += [_convert(study, name) for name in study.trained()]
    for name in study.evaluations():
        found.append(_evaluate(study, name))
    report = study.folder("report.md")
    found.append(Step("report", "report", f"-> {report}", lambda: False, lambda stop: _report(study)))
    return found


def _report(study: Study) -> int:
    code = write_report(study)
    runs = [study.folder("methods", name) for name in study.trained()]
    end_with_page([study.folder(), *runs], study.folder(PAGE))
    return code


def _inputs(study: Study) -> dict[str, Path]:
    return {name: study.folder("data", f"{name}.jsonl") for name in study.inputs}


def _fetch(study: Study, data: str | None) -> list[Step]:
    models: dict[str, tuple[Model, Path]] = {"base": (study.base, study.base_folder)}
    models |= {name: (m.published, study.model_of(name)) for name, m in study.methods.items() if m.published}
    found = [_fetch_model(name, model, folder, study) for name, (model, folder) in models.items()]
    for name, dataset in study.inputs.items():
        file = study.folder("data", f"{name}.jsonl")
        words = f"{dataset} of the hub -> {file}"
        found.append(Step("fetch", name, words, file.is_file, _returning(fetch_dataset, dataset, "train", file)))
    for name in study.eval_config("base").benchmarks:
        if name == codeforces.NAME:
            folder = study.folder("benchmarks", name)
            words = f"{data or 'DATA'}/{name} -> {folder}"
            found.append(Step("fetch", name, words, folder.is_dir, _returning(fetch_contests, data, folder)))
        if name in BENCHMARKS:
            file = study.folder("benchmarks", f"{name}.jsonl")
            words = f"{data}/{name}.jsonl -> {file}" if data else f"{BENCHMARKS[name].dataset} of the hub -> {file}"
            found.append(Step("fetch", name, words, file.is_file, _returning(fetch_benchmark, name, data, file)))
    return found


def _fetch_model(name: str, model: Model, folder: Path, study: Study) -> Step:
    if model.command:
        return _command("fetch", name, model.command.format(out=folder), (folder / "config.json").is_file)
    words = f"{model.hub} at {model.revision or 'its newest commit, which is noted'} -> {folder}"
    noted = study.folder("fetched.json")
    return Step("fetch", name, words, (folder / "config.json").is_file, _returning(fetch_model, model, folder, noted))


def _returning(work: Callable[..., None], *arguments: object) -> Callable[[Stop], int]:
    def run(stop: Stop) -> int:
        work(*arguments)
        return DONE

    return run


def _command(stage: str, name: str, command: str, is_done: Callable[[], bool]) -> Step:
    words = shlex.split(command)
    if words[0] == "python":
        words[0] = sys.executable
    return Step(stage, name, command, is_done, lambda stop: launch_job(words, stop))


def _ours(*words: str) -> list[str]:
    return [sys.executable, "-m", "flowrl_mega.cli", *words]


def _train(study: Study, name: str) -> Step:
    config = study.methods[name].config
    assert config is not None
    words = ["train", config, *study.train_overrides(name)]

    def is_done() -> bool:
        newest = find_checkpoint(study.folder("methods", name), "auto")
        return newest is not None and step_of(newest) >= study.train_config(name).steps

    return Step(
        "train", name, shlex.join(["flowrl-mega", *words]), is_done, lambda stop: launch_job(_ours(*words), stop)
    )


def _convert(study: Study, name: str) -> Step:
    """The trained policy as others can load it; training itself starts from the base as it was fetched."""
    ckpt, out = study.last_checkpoint(name), study.model_of(name)

    def run(stop: Stop) -> int:
        if not ckpt.is_dir():
            raise ConfigError(f"{ckpt}: is not there yet; run the stages before convert first")
        out.parent.mkdir(parents=True, exist_ok=True)
        megatron_to_hf(ckpt, out)
        return DONE

    words = f"python tools/convert_ckpt.py mcore2hf --ckpt {ckpt} --out {out}"
    return Step("convert", name, words, (out / "config.json").is_file, run)


def _evaluate(study: Study, name: str) -> Step:
    folder = study.folder("evaluations", name)
    file = folder.with_suffix(".yaml")

    def run(stop: Stop) -> int:
        if not study.model_of(name).is_dir():
            raise ConfigError(f"{study.model_of(name)}: is not there yet; run the stages before evaluate first")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(study.eval_config(name).model_dump(mode="json"), sort_keys=False))
        return launch_job(_ours("eval", str(file)), stop)

    words = f"flowrl-mega eval {file}   (of {study.model_of(name)})"
    return Step("evaluate", name, words, (folder / SCORES).is_file, run)
