"""docs/developer: what each page tells to do is done with its own code, and every place that it names exists.

A block of code under a line that begins with `file.ext` is that file.
"""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest
from test_layers import LEVELS

REPO = Path(__file__).parents[2]
FOLDER = REPO / "docs" / "developer"
PAGES = {page.stem: page.read_text() for page in sorted(FOLDER.glob("*.md"))}
FILE = re.compile(r"(?:^|(?<=\. ))`([\w.]+\.\w+)`[^`\n]*\n\n```\w+\n(.*?)```", re.M | re.S)
FENCE = re.compile(r"^```.*?^```\n", re.M | re.S)
SUFFIXES = (".py", ".md", ".toml", ".yaml", ".txt", ".sh", ".tsv", ".h")


def files(page: str) -> dict[str, str]:
    """The page's own files, by name."""
    return dict(FILE.findall(PAGES[page]))


def write(page: str, folder: Path) -> Path:
    for name, text in files(page).items():
        (folder / name).write_text(text)
    return folder


def tables(page: str) -> list[list[dict[str, str]]]:
    """The rows of each table, by column."""
    found = []
    for block in re.findall(r"(?:^\|.*\n)+", PAGES[page], flags=re.M):
        head, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found.append([dict(zip(head, row, strict=True)) for row in rows])
    return found


def places(page: str) -> set[str]:
    """What stands in backticks in the text and is a path, or path:symbol."""
    spans = re.findall(r"`([^`\n]+)`", FENCE.sub("", PAGES[page]))
    paths = {span for span in spans if re.fullmatch(r"[\w./-]+(:[\w.]+)?", span)}
    return {span for span in paths if "/" in span or span.partition(":")[0].endswith((*SUFFIXES, "Makefile"))}


def defined(source: str) -> set[str]:
    """Names at the top of a Python file, and Class.member."""
    names = set()
    for node in ast.parse(source).body:
        names |= _names(node)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{member}" for inner in node.body for member in _names(inner)}
    return names


def _names(node: ast.stmt) -> set[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {name.id for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}


def is_there(place: str, own: dict[str, str]) -> bool:
    """In the repository, or a file of the page itself, whose names start no path of it."""
    path, _, symbol = place.partition(":")
    if path in own:
        source = own[path]
    elif (REPO / path).exists():
        source = (REPO / path).read_text() if symbol else ""
    else:
        return False
    return not symbol or symbol in defined(source)


@pytest.mark.parametrize("page", PAGES)
def test_every_place_that_a_page_names_exists(page: str) -> None:
    generic = {place for place in places(page) if place.startswith("path/to/")}
    missing = sorted(place for place in places(page) - generic if not is_there(place, files(page)))
    assert not missing
    assert len(places(page)) >= 8, "the pattern finds them"
    assert len(PAGES[page].splitlines()) <= 90


@pytest.mark.parametrize("page", PAGES)
def test_every_target_that_a_page_names_exists(page: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPO / "Makefile").read_text(), flags=re.M))
    named = set(re.findall(r"`make ([a-z-]+)", PAGES[page]))
    assert named <= targets
    assert named or page not in ("testing", "release")


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_that_a_page_names_exists(page: str) -> None:
    from flowrl_mega.config import Config

    written = re.findall(r"(?<![\w.-])(?:`|--)([a-z]+)\.(\w+)", PAGES[page])
    named = [(section, field) for section, field in written if section in Config.model_fields]
    for section, field in named:
        assert field in Config.model_fields[section].annotation.model_fields, f"{section}.{field}"
    assert named or page not in ("add_reward", "add_engine")


def test_the_pages_are_those_that_are_tested() -> None:
    adding = {f"add_{what}" for what in ("engine", "model", "objective", "recipe", "reward")}
    assert PAGES.keys() == adding | {"house", "testing", "release"}


def test_the_rooms_are_in_the_order_of_the_levels() -> None:
    drawing = re.search(r"^ imports  rooms\n(.*?)^```", PAGES["house"], flags=re.M | re.S)
    assert drawing
    drawn = [set(line.lstrip(" |v").split(", ")) for line in drawing[1].splitlines()]
    assert drawn == list(LEVELS)
    told = re.findall(r"^    (\w+)  +\S", PAGES["house"].partition("## What each room is for")[2], flags=re.M)
    assert sorted(told) == sorted(room for rooms in LEVELS for room in rooms), "each has its line, once"


def test_megatron_is_imported_where_the_page_says() -> None:
    (said,) = re.findall(r"Megatron is imported in (.*?) alone", PAGES["house"], flags=re.S)
    importing = re.compile(r"^\s*(?:import|from) megatron\b", re.M)
    package = REPO / "flowrl_mega"
    found = {file.relative_to(package).parts[0] for file in package.rglob("*.py") if importing.search(file.read_text())}
    assert set(re.findall(r"`flowrl_mega/(\w+)`", said)) == found


def test_markers_and_limits_are_pytests() -> None:
    options = tomllib.loads((REPO / "pyproject.toml").read_text())["tool"]["pytest"]["ini_options"]
    told = [row["marker"].strip("`") for table in tables("testing") for row in table if "marker" in row]
    assert sorted(told) == sorted(line.partition(":")[0] for line in options["markers"])
    assert f"Every test has {options['timeout']} s" in PAGES["testing"]


MUTATIONS = {
    "as it is": ("", ""),
    "the other sign": ("-s.credit", "s.credit"),
    "the mean over tokens": ("s.sum(s.logp)", "s.mean(s.logp)"),
    "no baseline": (" - rewards.double().mean()", ""),
    "without scale": ("self.scale * ", ""),
    "another value of the same gradient": ("s.sum(s.logp)", "s.sum(s.logp - s.old_logp)"),
    "without gradient": ("s.sum(s.logp)", "s.sum(s.logp.detach())"),
    "a mean in place of the sum": ("loss.sum()", "loss.mean()"),
    "another count": ("len(s.credit)", "len(s.logp)"),
}


@pytest.mark.slow
def test_the_objective_passes_its_own_test_and_faulty_ones_fail(tmp_path: Path) -> None:
    for number, (old, new) in enumerate(MUTATIONS.values()):
        folder = tmp_path / f"case_{number}"
        folder.mkdir()
        source = (write("add_objective", folder) / "reinforce.py").read_text()
        assert old in source
        (folder / "reinforce.py").write_text(source.replace(old, new))
    # The option keeps files of one name in several folders apart.
    command = [sys.executable, "-m", "pytest", "-q", "--import-mode=importlib", "-p", "no:cacheprovider"]
    path = os.pathsep.join([str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [*command, "--junitxml=found.xml", "."],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    passed: dict[str, list[bool]] = {}
    for case in ElementTree.parse(tmp_path / "found.xml").iter("testcase"):
        number = re.findall(r"case_(\d)", case.attrib["classname"])[0]
        passed.setdefault(list(MUTATIONS)[int(number)], []).append(not len(case))
    assert passed.pop("as it is") == [True] * 3, done.stdout
    assert passed.keys() == MUTATIONS.keys() - {"as it is"}
    assert [name for name, verdicts in passed.items() if all(verdicts)] == [], done.stdout


def test_the_reward_gives_what_the_page_says(tmp_path: Path) -> None:
    from flowrl_mega.config import RewardSettings
    from flowrl_mega.rewards.load import call, load_reward

    folder = write("add_reward", tmp_path)
    reward = load_reward(RewardSettings(function=f"{folder}/nearest.py:score"))
    (row,) = [json.loads(line) for line in (folder / "numbers.jsonl").read_text().splitlines()]
    cases, attributes = [table for table in tables("add_reward") if table[0].keys() & {"response", "attribute"}]
    assert len(cases) == 3
    for case in cases:
        score = call(reward, row, case["response"])
        found = {"reward": str(score.reward), "kind": score.kind, "right": "yes" if score.right else "no"}
        assert found == {name: case[name] for name in found} and score.reason and not score.failed
    assert reward.is_quick and reward.right_at == 1.0
    for line in attributes:
        assert hasattr(reward, line["attribute"].strip("`"))
    assert call(reward, {}, "42").failed, "a row without its number"


def test_the_recipe_makes_the_store_that_the_page_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the page's own command, but for the model's folder."""
    from flowrl_mega.data.store import MappedStore
    from flowrl_mega.data.tokenizer import char_tokenizer

    monkeypatch.syspath_prepend(str(REPO / "tools"))
    import prepare_data

    monkeypatch.chdir(write("add_recipe", tmp_path))
    (shown,) = re.findall(r"```json\n(\{\"id\".*?)```", PAGES["add_recipe"], flags=re.S)
    tokenizer = char_tokenizer("".join(sorted(set(json.loads(shown)["prompt"]))))
    tokenizer.save_pretrained("model")
    (command,) = re.findall(r"^    python tools/prepare_data.py (.*)", PAGES["add_recipe"], flags=re.M)
    assert prepare_data.main(command.replace("HF_FOLDER", "model").split()) == 0
    assert "1 of 3 rows kept" in capsys.readouterr().out
    store = MappedStore(tmp_path / "stores" / "riddles")
    assert [store[i].row for i in range(len(store))] == [json.loads(shown)]
    listed = [json.loads(line) for line in Path("stores/riddles/refused.jsonl").read_text().splitlines()]
    (told,) = [table for table in tables("add_recipe") if "reason" in table[0]]
    found = [[str(entry["row"]), entry["reason"], entry["detail"]] for entry in listed]
    assert found == [list(row.values()) for row in told]


def test_the_engine_is_loaded_and_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it counts is worked out by hand; its protocol is the engine's, method by method."""
    from flowrl_mega.rollout import EmbeddedEngine, EngineSetup, Rollout, load_engine
    from flowrl_mega.rollout.engine import ENGINE_METHODS

    kind = load_engine(f"{write('add_engine', tmp_path)}/counting.py:Counting")
    groups = [[Rollout([5] * tokens, [], "stop", [(1, tokens)]) for tokens in group] for group in ([1, 2], [4])]
    monkeypatch.setattr(EmbeddedEngine, "finish", lambda self, job: groups)
    engine = kind(EngineSetup(None, None, None, {}))  # type: ignore[arg-type]
    assert engine.metrics() == {"rollout/tokens": 0.0}
    assert engine.finish(None) is groups and engine.finish(None) is groups
    assert engine.metrics() == {"rollout/tokens": 14.0}
    assert engine.metrics() == {"rollout/tokens": 0.0}, "counters since the last call"
    (table,) = tables("add_engine")
    assert [re.match(r"`(\w+)", row["method"])[1] for row in table] == list(ENGINE_METHODS)  # type: ignore[index]


@pytest.mark.ranks
def test_a_run_with_the_engine_logs_its_count(tmp_path: Path, tiny_llama: Path) -> None:
    """By the option of the page's command, on two ranks; every step has the tokens of its 8 answers and no others."""
    from jobs import Job, records, write_config

    folder = write("add_engine", tmp_path)
    (flag,) = re.findall(r"flowrl-mega train CONFIG.yaml (--rollout.engine=\S+)", PAGES["add_engine"])
    sizes = {"rollout": {"prompts_per_step": 2, "group_size": 4, "max_tokens": 6}, "evaluation": {"every": 0}}
    path = write_config(folder, tiny_llama, steps=2, checkpoint={"at_end": False}, **sizes)
    Job(["train", str(path), flag], folder / "log", world=2, cwd=folder).run()
    found = records(folder / "run", "metrics")
    assert [row["step"] for row in found] == [1, 2]
    wanted = [8 * row["rollout/response_length"] for row in found]
    assert [row["rollout/tokens"] for row in found] == pytest.approx(wanted)


def test_a_family_is_named_in_no_other_place() -> None:
    """Of the package's files those that name a family of models, or ask for its biases or norms, are on the page."""
    from flowrl_mega.model.architecture import SUPPORTED
    from flowrl_mega.model.names import LAYERS

    assert set(SUPPORTED) == LAYERS.keys()
    by_name, by_flag = set(), set()
    for file in sorted((REPO / "flowrl_mega").rglob("*.py")):
        nodes = list(ast.walk(ast.parse(file.read_text())))
        path = str(file.relative_to(REPO))
        if any(isinstance(node, ast.Constant) and node.value in SUPPORTED for node in nodes):
            by_name.add(path)
        if any(isinstance(node, ast.Attribute) and node.attr in ("qk_norm", "qkv_bias") for node in nodes):
            by_flag.add(path)
    first, second = PAGES["add_model"].split("## A family with a new part")
    listed = [set(re.findall(r"^\| `([\w./]+)", part, flags=re.M)) for part in (first, second)]
    assert by_name == listed[0]
    assert by_flag <= listed[0] | listed[1]


def test_the_version_stands_in_the_two_places_that_the_page_names() -> None:
    import flowrl_mega

    version = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["version"]
    assert version == flowrl_mega.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", version)


def test_the_checks_of_a_release_are_those_of_ci() -> None:
    """All that .ci/run does but set-up and builds."""
    steps = re.findall(r"^step make ([\w-]+)", (REPO / ".ci" / "run").read_text(), flags=re.M)
    (checks,) = tables("release")
    assert [row["command"].strip("`") for row in checks] == [
        f"make {name}" for name in steps if not name.startswith(("setup", "build"))
    ]
