"""A study as one chain of SLURM jobs: training by examples/slurm/train.sbatch, the other stages by this command."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from flowrl_mega.config import ConfigError
from flowrl_mega.reproduce.stages import Step
from flowrl_mega.reproduce.study import Study

SCRIPT = Path("examples/slurm/train.sbatch")


def submit(study: Study, path: str, steps: list[Step]) -> list[str]:
    """Hand in what is not done yet; the numbers of the jobs, in order. A stage waits for all jobs of those before it.

    ConfigError where SLURM or its script is missing, or something has yet to be fetched, for which a compute node may
    have no network.
    """
    if not shutil.which("sbatch"):
        raise ConfigError("--submit: no sbatch on this machine; leave it out to run the stages here")
    if not SCRIPT.is_file():
        raise ConfigError(f"--submit: no {SCRIPT} here; give the command in the repository's folder")
    to_do = [step for step in steps if not step.is_done()]
    if missing := [step.name for step in to_do if step.stage == "fetch"]:
        raise ConfigError(
            f"--submit: {', '.join(missing)} not fetched yet, and a compute node may have no network; run "
            f"flowrl-mega reproduce {path} --stage fetch first"
        )
    study.folder("slurm").mkdir(parents=True, exist_ok=True)
    before: list[str] = []  # jobs of the earlier stages
    now: list[str] = []  # and those of this one
    stage = ""
    for step in to_do:
        if step.stage != stage:
            before, now, stage = before + now, [], step.stage
        if step.stage != "train" and now:
            continue  # one job does all steps of a stage
        now.append(_sbatch(study, step, path, before))
        print(f"reproduce: job {now[-1]}, {step.stage}{' ' + step.name if step.stage == 'train' else ''}")
    return before + now


def _sbatch(study: Study, step: Step, path: str, before: list[str]) -> str:
    name = f"{Path(study.run_dir).name}-{step.stage}"
    words = ["sbatch", "--parsable", f"--job-name={name}", f"--output={study.folder('slurm')}/%x-%j.log"]
    if before:
        # What SLURM cannot start any more goes, too: a job that failed is told of once.
        words += [f"--dependency=afterok:{':'.join(before)}", "--kill-on-invalid-dep=yes"]
    hardware = study.hardware
    if step.stage == "train":
        words += [*hardware.sbatch_train, str(SCRIPT), *shlex.split(step.words)[2:]]
    else:
        command = shlex.join([sys.executable, "-m", "flowrl_mega.cli", "reproduce", path, "--stage", step.stage])
        words += [*hardware.sbatch_other, f"--wrap={command}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode or not re.match(r"\d+", done.stdout):
        said = " ".join((done.stderr or done.stdout).split())
        raise ConfigError(f"--submit: sbatch refuses {step.stage} {step.name} ({said}); see hardware.* of {path}")
    return done.stdout.strip().partition(";")[0]
