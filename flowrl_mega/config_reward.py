"""The settings of `reward`: what grades answers, and the sandbox that programs run in."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from flowrl_mega.settings import PathText, Settings


class CodeSettings(Settings):
    isolation: Literal["namespaces", "process"] = Field(
        "namespaces",
        description="Minimum isolation of programs: own user, pid, network and mount namespaces, or `process`: "
        "resource limits alone, without network or file isolation.",
    )
    score: Literal["all", "fraction"] = Field(
        "all",
        description="Reward of a program: 1 if all tests pass, else 0 (`all`), or the share of tests that pass "
        "(`fraction`).",
    )
    python: PathText | None = Field(
        None, description="Python interpreter that runs the programs; `null` takes the trainer's."
    )
    packages: tuple[str, ...] = Field(
        ("numpy",),
        description="Modules of the trainer's environment that programs and tests may import beside the standard "
        "library, with `python: null`.",
    )
    wall_s: float = Field(
        10.0, gt=0, description="Wall-time limit of a program in seconds, not counting its waits for a busy processor."
    )
    cpu_s: int = Field(8, ge=1, description="CPU-time limit of a program in seconds.")
    memory_mb: int = Field(1024, ge=32, description="Memory limit of a program in MB.")
    disk_mb: int = Field(64, ge=1, description="Size of a program's temporary folder, its only writable place, in MB.")
    processes: int = Field(16, ge=1, description="Limit on the processes and threads of a program.")
    open_files: int = Field(64, ge=8, description="Limit on the open files of each process.")
    output_kb: int = Field(
        1024, ge=1, description="Limit on a program's output to stdout and stderr in KB; exceeding it ends the program."
    )
    url: str | None = Field(
        None,
        description="URL of a remote sandbox that serves SandboxFusion's /run_code, used instead of the local one.",
    )


class OverlongSettings(Settings):
    buffer: int = Field(
        ge=1,
        description="Length of the range before `rollout.max_tokens`, in tokens, over which the penalty grows linearly "
        "from 0.",
    )
    penalty: float = Field(1.0, gt=0, description="Amount subtracted from the reward at `rollout.max_tokens`.")


class MathSettings(Settings):
    timeout_s: int = Field(
        5, ge=1, description="Time limit of math-verify in seconds, for parsing and for comparing one answer."
    )


class RewardSettings(Settings):
    """What a reward function gets as its third argument, if it takes one."""

    function: PathText = Field(
        description="Reward as module:function or path/to/file.py:function. It takes (row, response) or (row, "
        "response, settings) and returns a float, (float, why) or (float, why, kind)."
    )
    workers: int | None = Field(
        None,
        ge=0,
        description="Scoring processes per rank; `null` takes its share of the cores (0 for a function marked "
        "`is_quick`), 0 scores in the rank.",
    )
    timeout_s: float = Field(
        60.0,
        gt=0,
        description="Time limit of one call in seconds; a call that exceeds it is ended, and its answer counts as "
        "wrong.",
    )
    right_at: float | None = Field(
        None,
        description="Smallest reward that counts as right in evaluation figures; `null` takes the function's own "
        "threshold, or any reward above 0.",
    )
    overlong: OverlongSettings | None = Field(
        None, description="DAPO's soft penalty of long answers; `null` disables it."
    )
    math: MathSettings = Field(MathSettings(), description="Rules of math rewards.")
    code: CodeSettings = Field(CodeSettings(), description="Sandbox that runs programs for code rewards.")
