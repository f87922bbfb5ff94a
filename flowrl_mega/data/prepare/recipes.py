"""From published data sets to rows. A recipe is a function of one record: those in RECIPES, or one from anywhere.

Every recipe also takes the form {"problem", "answer", "source"} (code: {"problem", "entry_point", "tests"}). Column
names were read where each recipe says; no hub could be reached where this was written, so of the published files none
has been run except those that docs/data.md names.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from flowrl_mega.config import ConfigError
from flowrl_mega.data.prepare import code_recipes
from flowrl_mega.data.prepare.problem import (
    BAD_ANSWER,
    BROKEN,
    BadRow,
    Problem,
    answer_of,
    column,
    last_boxed,
    math,
    text_of,
    without_wording,
)
from flowrl_mega.imports import load

Record = dict[str, Any]
THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")  # and not the commas of a list


class Recipe(NamedTuple):
    make: Callable[[Record, str], Problem]  # (record, wording) -> problem; raises BadRow for a record unfit for it
    datasets: str  # ids on the hub
    wording: str = "boxed"  # the default: "boxed" or "answer"


def dapo_math(record: Record, wording: str) -> Problem:
    """prompt: one chat message, the problem in DAPO's words; reward_model: {"ground_truth"}. Every row is there about
    a hundred times. (Columns read in verl's and DAPO users' loaders.)
    """
    if "problem" in record or isinstance(record.get("prompt"), str):
        return math(without_wording(text_of(record, "problem", "prompt")), answer_of(record, "answer"), wording)
    messages, gold = column(record, "prompt"), column(record, "reward_model")
    if not (isinstance(messages, list) and len(messages) == 1 and isinstance(messages[0], dict)):
        raise BadRow(BROKEN, "'prompt' must be a list of one chat message")
    if not isinstance(gold, dict):
        raise BadRow(BROKEN, "'reward_model' must be an object with 'ground_truth'")
    problem = without_wording(text_of(messages[0], "content"))
    if not problem:
        raise BadRow(BROKEN, "'prompt' holds no problem, only how to answer")
    return math(problem, answer_of(gold, "ground_truth"), wording)


def gsm8k(record: Record, wording: str) -> Problem:
    """question; answer: the reasoning, then "#### 42". (Columns read in lm-eval 0.4.13's gsm8k.yaml.)"""
    answer = answer_of(record, "answer")
    if "question" in record:
        reasoning, mark, answer = answer.rpartition("####")
        if not mark or not answer.strip():
            raise BadRow(BAD_ANSWER, "'answer' does not end with '#### ' and a number")
    return math(text_of(record, "problem", "question"), THOUSANDS.sub("", answer.strip()), wording)


def competition(record: Record, wording: str) -> Problem:
    r"""problem (or Problem, question, Question); answer (or Answer), or a solution with \boxed{...}.

    DeepScaleR has problem, answer, solution; MATH problem, solution (lm-eval's minerva_math); MATH-500 problem, answer;
    AIME24 Problem, Answer (lm-eval's aime24.yaml) or problem, solution; AIME25 problem, answer (lm-eval's aime25.yaml);
    AMC23 and Minerva question, answer (users' loaders). Numbers like 27.0 are 27.
    """
    problem = text_of(record, "problem", "Problem", "question", "Question")
    if record.get("answer") is None and record.get("Answer") is None and "solution" in record:
        return math(problem, last_boxed(text_of(record, "solution")), wording)
    return math(problem, answer_of(record, "answer", "Answer"), wording)


def olympiadbench(record: Record, wording: str) -> Problem:
    """question; final_answer: a list; context, which comes before the question; image_1.. of problems with pictures,
    which are refused. (Columns read in lighteval's olympiade_bench.py; images by the data set's card.)
    """
    if "problem" in record:
        return competition(record, wording)
    pictures = [name for name in record if name.startswith("image") and record[name]]
    if pictures:
        raise BadRow(BROKEN, f"has a picture ({pictures[0]}), and the recipe is for problems in words")
    answers = column(record, "final_answer")
    if not isinstance(answers, list) or not answers:
        raise BadRow(BAD_ANSWER, "'final_answer' must be a list with at least one answer")
    gold = ", ".join(answer_of({"final_answer": answer}, "final_answer").strip("$ ") for answer in answers)
    problem = text_of(record, "question")
    if record.get("context"):
        problem = f"{text_of(record, 'context')}\n\n{problem}"
    return math(problem, gold, wording)


def rows(record: Record, wording: str) -> Problem:
    """Rows as the store has them: prompt, text or chat messages; kind, task and what its reward reads; image: a path,
    or {"bytes"} as Parquet files have it. `wording` has no effect.
    """
    if record.get("images"):
        raise BadRow(BROKEN, "has 'images', as verl's rows do; a row has one image here: name the column 'image'")
    image = record.get("image") or b""
    if isinstance(image, dict):
        image = image.get("bytes") or image.get("path") or b""
    if not isinstance(image, (bytes, str)):
        raise BadRow(BROKEN, "'image' must be a path, or an object with 'bytes'")
    row = {key: value for key, value in record.items() if key != "image"}
    kind = row.get("kind")
    if kind in ("math", "math_dapo"):
        row["answer"] = answer_of(row, "answer")
    elif kind == "code":
        code_recipes.check_tests(column(row, "tests"))
    return Problem(_words(column(row, "prompt")), row, image)


def _words(prompt: Any) -> str:
    """The text of a prompt; of chat messages all contents."""
    if isinstance(prompt, str):
        return text_of({"prompt": prompt}, "prompt")
    if not isinstance(prompt, list) or not prompt:
        raise BadRow(BROKEN, "'prompt' must be text, or a list of messages with 'role' and 'content'")
    said = []
    for message in prompt:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRow(BROKEN, "'prompt' must be text, or a list of messages with 'role' and 'content'")
        said.append(text_of(message, "content"))
    return "\n\n".join(said)


RECIPES = {
    "dapo-math-17k": Recipe(dapo_math, "BytedTsinghua-SIA/DAPO-Math-17k", "answer"),
    "deepscaler": Recipe(competition, "agentica-org/DeepScaleR-Preview-Dataset"),
    "math": Recipe(competition, "EleutherAI/hendrycks_math"),
    "gsm8k": Recipe(gsm8k, "openai/gsm8k:main"),
    "aime24": Recipe(competition, "Maxwell-Jia/AIME_2024, math-ai/aime24"),
    "aime25": Recipe(competition, "math-ai/aime25"),
    "amc23": Recipe(competition, "math-ai/amc23"),
    "math500": Recipe(competition, "HuggingFaceH4/MATH-500"),
    "minerva": Recipe(competition, "math-ai/minervamath"),
    "olympiadbench": Recipe(olympiadbench, "Hothan/OlympiadBench:OE_TO_maths_en_COMP"),
    "deepcoder": Recipe(code_recipes.deepcoder, "agentica-org/DeepCoder-Preview-Dataset:taco (or another of its four)"),
    "humaneval": Recipe(code_recipes.humaneval, "openai/openai_humaneval"),
    "humaneval+": Recipe(code_recipes.humaneval, "evalplus/humanevalplus"),
    "livecodebench": Recipe(code_recipes.livecodebench, "livecodebench/code_generation_lite"),
    "rows": Recipe(rows, "your own"),
}
GENERATED = "reasoning-gym"


def recipe(name: str) -> Recipe:
    """The recipe of this name, or the function that "module:function" or "path/to/file.py:function" names.

    Raises ConfigError with the nearest name.
    """
    if ":" in name:
        function = load(name, "--recipe")
        if not callable(function):
            raise ConfigError(f"--recipe {name}: is a {type(function).__name__}; must be a function (record, wording)")
        return Recipe(partial(_from_outside, name, function), "your own")
    if name not in RECIPES:
        names = [*RECIPES, GENERATED]
        near = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(names)}"
        raise ConfigError(f"--recipe {name}: unknown; {hint}; or give your own as path/to/file.py:function")
    return RECIPES[name]


def _from_outside(name: str, function: Callable[[Record, str], Any], record: Record, wording: str) -> Problem:
    """The problem that a user's recipe makes, its row checked like one of the recipe `rows`.

    A record on which the function fails is refused as broken: one odd record must not end the preparation.
    """
    try:
        problem = function(record, wording)
    except BadRow:
        raise
    except Exception as error:
        raise BadRow(BROKEN, f"the recipe failed ({type(error).__name__}: {error!s:.100})") from None
    if not isinstance(problem, Problem):
        raise ConfigError(
            f"--recipe {name}: returned a {type(problem).__name__}; must return a Problem, of "
            "flowrl_mega.data.prepare.problem"
        )
    checked = rows({**problem.row, "image": problem.image}, wording)
    return Problem(text_of(vars(problem), "text"), checked.row, problem.image)
