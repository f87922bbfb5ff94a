"""tools/prepare_data.py: every record is in the store or in the list of what was refused, with its place and a reason.

Oracles: the tokenizer itself, transformers' apply_chat_template, JSON, and counts of the input's lines.
"""

import io
import json
import os
import random
import sys
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer
from PIL import Image

from flowrl_mega.config import ConfigError
from flowrl_mega.data.prepare.make_store import Plan, prepare
from flowrl_mega.data.prepare.recipes import RECIPES
from flowrl_mega.data.store import MappedStore, open_store

REPO = Path(__file__).parents[3]
SAMPLES = Path(__file__).parent / "samples"
sys.path.append(str(REPO / "tools"))

import prepare_data  # noqa: E402

ANSWERS = {"1", "2", "3"}


@pytest.fixture
def run(model_folder, capsys):
    """Runs the command; gives (exit code, stdout, stderr)."""

    def run(*arguments):
        code = prepare_data.main([*map(str, arguments), "--model", str(model_folder)])
        return code, *capsys.readouterr()

    return run


def written(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def refused(store):
    return [json.loads(line) for line in (store / "refused.jsonl").read_text().splitlines()]


def check_answer(answer):
    return None if answer in ANSWERS else "is no answer of this test"


def test_ids_are_the_tokenizer_s_own(tmp_path, tokenizer):
    """Batches, and the folder between, change nothing: every prompt's ids are those of the text in its row."""
    records = [{"problem": f"What is {i}+{i}? {'é' * (i % 7)}!", "answer": "2"} for i in range(700)]
    plan = Plan("math", tmp_path / "s", [written(tmp_path / "in.jsonl", records)])
    report = prepare(plan, tokenizer, None)
    store = open_store(tmp_path / "s", tokenizer, 2048, False)
    assert (report.read, report.kept, len(store)) == (700, 700, 700)
    assert report.tokens == sum(len(p.token_ids) for p in store) and report.longest == max(store.lengths())
    for i, prompt in enumerate(store):
        assert prompt.token_ids == tokenizer(prompt.row["prompt"])["input_ids"]
        assert (prompt.row["id"], prompt.row["task"]) == (f"math/train/{i}", "math")
        assert records[i]["problem"] in prompt.row["prompt"]


def test_the_chat_template_is_transformers_own(tmp_path, chat_tokenizer):
    plan = Plan("rows", tmp_path / "s", [str(SAMPLES / "rows.jsonl")], chat_template=True)
    prepare(plan, chat_tokenizer, None)
    store = open_store(tmp_path / "s", chat_tokenizer, 2048, True)
    for prompt in store:
        said = prompt.row["prompt"]
        messages = said if isinstance(said, list) else [{"role": "user", "content": said}]
        expected = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompt.token_ids == expected
    assert [prompt.row["id"] for prompt in store] == ["mine/1", "rows/train/1"]


FAULTS = {
    1: ('{"problem": "one", "answer": "1"}', None),
    2: ('{"problem": "two", "answer": ', "broken"),
    3: ("", None),  # blank lines are no rows
    4: ('{"problem": " one ", "answer": "1"}', "duplicate"),
    5: ('{"problem": "one", "answer": "2"}', "duplicate with another answer"),
    6: ('{"problem": "  ", "answer": "2"}', "empty"),
    7: ('{"problem": "seven", "answer": "\\\\frac{"}', "bad answer"),
    8: ('{"problem": "%s", "answer": "2"}' % ("long " * 100), "too long"),
    9: ('{"question": "nine"}', "broken"),
    10: ('{"problem": ["ten"], "answer": "2"}', "broken"),
    11: ('{"problem": "a \\ud800 b", "answer": "2"}', "broken"),
    12: ('["problem"]', "broken"),
    13: ('{"problem": "twelve", "answer": "3"}', None),
    14: ('{"problem": "nul \\u0000", "answer": 3}', None),
    15: ('{"problem": "true", "answer": true}', "bad answer"),
    16: ('{"problem": "empty answer", "answer": ""}', "empty"),
    17: ('{"problem": "large", "answer": 1%s}' % ("0" * 5000), "broken"),
    18: ('{"problem": %s, "answer": "2"}' % ("[" * 100_000), "broken"),
}


def test_every_fault_is_counted_and_listed(tmp_path, tokenizer):
    """One row of each kind, refused for what it is, with file, line and beginning; the rest is kept in order."""
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(line for line, _ in FAULTS.values()) + "\n")
    report = prepare(Plan("math", tmp_path / "s", [str(path)], max_prompt_tokens=300), tokenizer, check_answer)
    listed = refused(tmp_path / "s")
    assert {row["row"]: row["reason"] for row in listed} == {n: why for n, (_, why) in FAULTS.items() if why}
    assert [prompt.row["id"] for prompt in MappedStore(tmp_path / "s")] == [f"math/train/{i}" for i in (0, 11, 12)]
    assert report.refused == Counter(row["reason"] for row in listed)
    assert report.read == 17 == report.kept + len(listed)
    for row in listed:
        assert row["file"] == "in.jsonl" and row["detail"]
        assert FAULTS[row["row"]][0].startswith(row["begins"])
    assert "says the same as math/train/0" in [r for r in listed if r["row"] == 5][0]["detail"]
    for reason, count in report.refused.items():
        assert f"{count}  {reason}" in str(report)


def test_bytes_that_are_no_text(tmp_path, tokenizer):
    """A byte order mark is skipped, as in other files; other bytes that are not UTF-8 are one row's fault."""
    good = json.dumps({"problem": "line\u2028end", "answer": "1"}, ensure_ascii=False).encode()
    (tmp_path / "in.jsonl").write_bytes(b"\xef\xbb\xbf" + good + b"\n\xff\xfe{}\n\x00\n" + good[:-1])
    report = prepare(Plan("math", tmp_path / "s", [str(tmp_path / "in.jsonl")]), tokenizer, None)
    assert (report.kept, report.refused) == (1, {"broken": 3})
    assert [row["row"] for row in refused(tmp_path / "s")] == [2, 3, 4]


def _any_value(draw, depth=0):
    kinds = ["text", "number", "huge", "none", "flag", "surrogate", "nul", "nan", "tests"]
    kind = draw.choice(kinds + ["list", "object"] * (depth < 3))
    if kind == "list":
        return [_any_value(draw, depth + 1) for _ in range(draw.randint(0, 3))]
    if kind == "object":
        names = "role content input output type inputs outputs name fn_name func_name testtype bytes path".split()
        return {draw.choice(names): _any_value(draw, depth + 1) for _ in range(draw.randint(0, 4))}
    texts = [
        "",
        " ",
        "#### ",
        "#### 3",
        "\\boxed{",
        "\\boxed{1}",
        "[]",
        "[{}]",
        '{"inputs": [1], "outputs": [2]}',
        "gAN4",
    ]
    tests = [{"type": t, "inputs": [[1]], "outputs": ["1"], "name": "f", "code": "def check(c): 1"} for t in "abc"]
    return {
        "text": draw.choice(texts + ["".join(chr(draw.randrange(32, 3000)) for _ in range(9))]),
        "number": draw.choice([0, -1, 1.5, 10**18]),
        "huge": draw.choice([10**400, 1e308, -(10**4000)]),
        "none": None,
        "flag": True,
        "surrogate": "\ud800x",
        "nul": "\x00",
        "nan": draw.choice([float("nan"), float("inf")]),
        "tests": json.dumps(draw.choice(tests)) if draw.random() < 0.5 else draw.choice(tests) | {"type": "stdin"},
    }[kind]


TEXTS = {"problem", "Problem", "question", "question_content", "prompt"}


def _numbered(text, number):
    if isinstance(text, list):
        return [message | {"content": _numbered(message["content"], number)} for message in text]
    return f"{number} {text}"


def _fuzzed(draw, name):
    """A line: a sample with a column gone, replaced or of another type; or bytes that were no row, or are none now."""
    files = sorted(SAMPLES.glob(f"{name}*.jsonl"))
    record = json.loads(draw.choice(draw.choice(files).read_text().splitlines()))
    for name in TEXTS & record.keys():  # else most would be refused as duplicates, and not for what is wrong
        record[name] = _numbered(record[name], draw.randrange(10**9))
    for _ in range(draw.randint(1, 3)):
        key = draw.choice(list(record))
        if draw.random() < 0.3:
            record.pop(key)
        else:
            record[key] = _any_value(draw)
        if not record:
            break
    line = json.dumps(record).encode()
    if draw.random() < 0.3:
        place = draw.randrange(len(line))
        line = (
            line[:place] + draw.randbytes(draw.randint(0, 4)).replace(b"\n", b"") + line[place + draw.randint(0, 9) :]
        )
    return line or b"x"


@pytest.mark.parametrize("name", RECIPES)
def test_malformed_rows_never_end_it(tmp_path, tokenizer, name):
    """300 damaged rows of each data set's form, and a good one: each is kept or refused, and what is kept is whole."""
    draw = random.Random(name)
    lines = [_fuzzed(draw, name) for _ in range(300)]
    good = [line for line in sorted(SAMPLES.glob(f"{name}*.jsonl"))[0].read_bytes().splitlines()][
        -1 if name == "rows" else 0
    ]
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([*lines, good]) + b"\n")
    report = prepare(Plan(name, tmp_path / "s", [str(tmp_path / "in.jsonl")]), tokenizer, None)
    rows = sum(bool(line.strip()) for line in lines) + 1
    listed = refused(tmp_path / "s")
    assert report.read == rows == report.kept + sum(report.refused.values())
    assert len(listed) == rows - report.kept > 0
    store = MappedStore(tmp_path / "s")
    assert len(store) == report.kept > 0
    for prompt in store:
        json.loads(store.row_bytes(prompt.index), parse_constant=pytest.fail)  # NaN and the like are no JSON
        assert prompt.token_ids and prompt.row["prompt"]
        assert prompt.row["id"].startswith((f"{name}/train/", "mine/")) or name == "rows"
    assert all(row["reason"] and row["detail"] for row in listed)


def test_nothing_to_keep_is_an_error(tmp_path, run):
    """Exit code 2, no store, and the list all the same."""
    source = written(tmp_path / "in.jsonl", [{"x": 1}, {"problem": ""}])
    code, out, err = run("--recipe", "math", "--input", source, "--out", tmp_path / "s")
    assert code == 2 and out == ""
    assert "no row can be kept" in err and "broken" in err and "row 1: has no 'problem'" in err
    assert sorted(os.listdir(tmp_path)) == ["in.jsonl", "s.refused.jsonl"]
    assert len((tmp_path / "s.refused.jsonl").read_text().splitlines()) == 2


def test_the_command_and_what_it_prints(tmp_path, run):
    source = str(SAMPLES / "dapo-math-17k.jsonl")
    code, out, err = run("--recipe", "dapo-math-17k", "--input", source, source, "--out", tmp_path / "s")
    assert code == 0
    assert "2 of 6 rows kept" in out and "4  duplicate" in out and "refused.jsonl in it lists" in out
    assert json.loads((tmp_path / "s" / "store.json").read_text())["made"]["recipe"] == "dapo-math-17k"
    assert prepare_data.main(["--verify", str(tmp_path / "s")]) == 0
    with (tmp_path / "s" / "tokens.bin").open("r+b") as file:
        file.write(b"\x01\x02\x03")
    assert prepare_data.main(["--verify", str(tmp_path / "s")]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "gsm", "--input", "x.jsonl", "--out", "{}/s"], "did you mean 'gsm8k'?"),
        (["--recipe", "gsm8k", "--out", "{}/s"], "needs --input; its data set is openai/gsm8k:main"),
        (["--recipe", "gsm8k", "--input", "{}/none.jsonl", "--out", "{}/s"], "cannot be read (No such file"),
        (["--input", "x.jsonl", "--out", "{}/s"], "--recipe is missing"),
        (["--recipe", "rows", "--input", "{}/in.jsonl"], "--out is missing"),
        (["--recipe", "rows", "--input", "{}/in.jsonl", "--out", "{}"], "exists already; remove it"),
        (["--recipe", "rows", "--input", "{}/in.jsonl", "--out", "{}/s", "--chat-template"], "has no chat template;"),
        (["--recipe", "rows", "--input", "{}/in.jsonl", "--out", "{}/s", "--columns", "a"], "must be OURS=THEIRS"),
        (["--recipe", "rows", "--input", "{}/in.jsonl", "--out", "{}/s", "--drop-contaminated"], "against what?"),
        (["--recipe", "rows", "--input", "{}/empty.jsonl", "--out", "{}/s"], "holds no rows"),
        (["--recipe", "reasoning-gym", "--out", "{}/s"], "give --task NAME"),
        (["--verify", "{}"], "is no prompt store"),
    ],
)
def test_wrong_input_is_one_message(tmp_path, run, arguments, message):
    """Exit code 2, what is wrong and what to do; nothing is left behind."""
    (tmp_path / "in.jsonl").write_text('{"prompt": "x"}\n')
    (tmp_path / "empty.jsonl").write_text("\n")
    code, out, err = run(*(argument.format(tmp_path) for argument in arguments))
    assert code == 2 and message in err and "Traceback" not in err
    assert sorted(os.listdir(tmp_path)) == ["empty.jsonl", "in.jsonl"]


def test_columns_with_other_names(tmp_path, run):
    source = written(tmp_path / "in.jsonl", [{"frage": "1+1?", "antwort": 2}])
    arguments = ["--recipe", "math", "--input", source, "--columns", "problem=frage", "answer=antwort"]
    assert run(*arguments, "--split", "test", "--out", tmp_path / "s")[0] == 0
    row = MappedStore(tmp_path / "s")[0].row
    assert (row["id"], row["answer"], row["prompt"][:4]) == ("math/test/0", "2", "1+1?")


def test_a_prompt_that_the_tokenizer_or_template_refuses(tmp_path):
    """Templates raise on roles that they do not know: that row's fault, not its batch's."""
    picky = byte_tokenizer(
        template="{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    rows = [{"prompt": "a"}, {"prompt": [{"role": "system", "content": "b"}]}, {"prompt": "c"}]
    plan = Plan("rows", tmp_path / "s", [written(tmp_path / "in.jsonl", rows)], chat_template=True)
    assert prepare(plan, picky, None).kept == 2
    (listed,) = refused(tmp_path / "s")
    assert listed["row"] == 2 and "no system" in listed["detail"]


def test_images_of_rows(tmp_path, tokenizer):
    """A path from the input's own folder; one that is missing or broken is that row's fault."""
    Image.new("RGB", (4, 3), (10, 20, 30)).save(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    names = ["a.png", None, "bad.png", "none.png", 3]
    rows = [{"prompt": f"what is {i}?", "image": name} for i, name in enumerate(names)]
    report = prepare(Plan("rows", tmp_path / "s", [written(tmp_path / "in.jsonl", rows)]), tokenizer, None)
    first, second = MappedStore(tmp_path / "s")
    assert first.image.shape == (3, 4, 3) and first.image[0, 0].tolist() == [10, 20, 30] and second.image is None
    assert "image" not in first.row
    assert report.refused == {"broken": 3}


def test_contaminated_rows_are_shown_and_dropped_when_asked(tmp_path, run):
    problem = "a farmer has seventeen sheep and all but nine of them run away how many sheep are left to him now"
    source = written(
        tmp_path / "in.jsonl", [{"problem": text, "answer": "9"} for text in (problem, f"Well: {problem}", "x")]
    )
    test = written(tmp_path / "test.jsonl", [{"question": problem.upper()}, {"question": "y"}])
    code, out, _ = run("--recipe", "math", "--input", source, "--out", tmp_path / "a", "--against", test)
    assert code == 0 and "3 of 3 rows kept" in out
    assert "| test | 2 | 1 | 0 | 0 | 1 | test/1 = math/train/0 |" in out
    found = json.loads((tmp_path / "a" / "contamination.json").read_text())
    assert found[0]["exact"] == {"test/1": ["math/train/0"]}
    arguments = [
        "--recipe",
        "math",
        "--input",
        source,
        "--out",
        tmp_path / "b",
        "--drop-contaminated",
        "--against",
        test,
    ]
    code, out, _ = run(*arguments)
    assert code == 0 and "2 of 3 rows kept" in out and "1  contaminated" in out
    assert [prompt.row["id"] for prompt in MappedStore(tmp_path / "b")] == ["math/train/1", "math/train/2"]
    assert refused(tmp_path / "b")[0]["reason"] == "contaminated"


@pytest.mark.integration
def test_answers_of_every_type_of_parquet(tmp_path, run):
    """As they were written; Parquet keeps 0.1 in 32 bits where JSON has text."""
    pytest.importorskip("datasets", reason="the extra data is not installed")
    import pyarrow
    import pyarrow.parquet

    for number, (cell, kind, expected) in enumerate(
        [
            (0.1, pyarrow.float32(), "0.1"),
            (1.5, pyarrow.float16(), "1.5"),
            (27.0, pyarrow.float32(), "27"),
            (0.1, pyarrow.float64(), "0.1"),
            (-4, pyarrow.int8(), "-4"),
            (2**63 + 1, pyarrow.uint64(), "9223372036854775809"),
            (Decimal("3.50"), pyarrow.decimal128(5, 2), "3.50"),
            ("1/3", pyarrow.large_string(), "1/3"),
            (float("nan"), pyarrow.float32(), None),
            (None, pyarrow.float32(), None),
            (b"12", pyarrow.binary(), None),
            (True, pyarrow.bool_(), None),
        ]
    ):
        path, out = tmp_path / f"{number}.parquet", tmp_path / str(number)
        table = pyarrow.table({"problem": ["a?", "b?"], "answer": pyarrow.array([cell, cell], kind)})
        pyarrow.parquet.write_table(table, path)
        code, _, err = run("--recipe", "amc23", "--input", path, "--out", out)
        assert code == (2 if expected is None else 0), (cell, kind, err)
        assert expected is None or {prompt.row["answer"] for prompt in MappedStore(out)} == {expected}, kind


@pytest.mark.integration
def test_parquet_and_folders_are_read_through_datasets(tmp_path, run):
    """The same rows as from JSON lines; numbers, nothing and nested values come as they are."""
    pytest.importorskip("datasets", reason="the extra data is not installed")
    import pyarrow
    import pyarrow.parquet

    records = [{"problem": f"{i}+1?", "answer": float(i + 1), "more": {"a": [i]}} for i in range(5)] + [
        {"problem": None, "answer": 1.0, "more": None}
    ]
    (tmp_path / "folder").mkdir()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "folder" / "train.parquet")
    lines = written(tmp_path / "in.jsonl", records)
    stores = []
    for name, source in (("a", lines), ("b", tmp_path / "folder" / "train.parquet"), ("c", tmp_path / "folder")):
        code, out, err = run("--recipe", "amc23", "--input", source, "--out", tmp_path / name)
        assert code == 0 and "5 of 6 rows kept" in out, err
        stores.append([(p.token_ids, p.row) for p in MappedStore(tmp_path / name)])
    assert stores[0] == stores[1] == stores[2]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records).slice(0, 0), tmp_path / "empty.parquet")
    code, _, err = run("--recipe", "amc23", "--input", tmp_path / "empty.parquet", "--out", tmp_path / "d")
    assert code == 2 and "empty.parquet: holds no rows" in err
    (tmp_path / "bad.parquet").write_bytes(b"PAR1 and no more")
    code, _, err = run("--recipe", "amc23", "--input", tmp_path / "bad.parquet", "--out", tmp_path / "d")
    assert code == 2 and "bad.parquet: cannot be read" in err
    code, _, err = run("--recipe", "amc23", "--input", tmp_path / "folder", "--split", "no", "--out", tmp_path / "d")
    assert code == 2 and "--split" in err


def test_no_datasets_library(tmp_path, run, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    code, _, err = run("--recipe", "gsm8k", "--input", "openai/gsm8k:main", "--out", tmp_path / "s")
    assert code == 2 and "pip install flowrl-mega[data]" in err


@pytest.mark.integration
def test_a_hub_that_cannot_be_reached(tmp_path, run, monkeypatch):
    """Made so by the library's own switch, for no test may ask a hub."""
    datasets = pytest.importorskip("datasets", reason="the extra data is not installed")
    import huggingface_hub.constants

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    code, _, err = run("--recipe", "gsm8k", "--input", "nobody/nothing:main", "--out", tmp_path / "s")
    assert code == 2 and "as the id of a Hugging Face dataset it cannot be loaded" in err and "Traceback" not in err


@pytest.mark.integration
def test_reasoning_gym(tmp_path, run):
    """The rows are the library's, so its scorer takes them from the store."""
    pytest.importorskip("reasoning_gym", reason="the example's requirements are not installed")
    from flowrl_mega.rewards.reasoning_gym import score

    code, out, _ = run("--recipe", "reasoning-gym", "--task", "gcd", "products", "--count", 20, "--out", tmp_path / "s")
    assert code == 0
    rows = [prompt.row for prompt in MappedStore(tmp_path / "s")]
    assert {row["task"] for row in rows} == {"gcd", "products"} and {row["kind"] for row in rows} == {"reasoning_gym"}
    assert all(score(row, f"<answer>{row['answer']}</answer>")[0] == 1.0 for row in rows)


REAL = {
    "aime24": ("aime24", 30),
    "aime25": ("aime25", 30),
    "amc23": ("amc23", 40),
    "flowrl_train_aime": ("math", 975),
    "flowrl_train_math": ("math", 7474),
    "gsm8k_test": ("gsm8k", 1319),
    "gsm8k_train": ("gsm8k", 7473),
    "humaneval": ("humaneval", 164),
    "math500": ("math500", 500),
    "olympiadbench": ("olympiadbench", 675),
}


def test_real_files_add_up(real_data, tmp_path, tokenizer):
    """rows in = kept + refused for every file, and what is kept is what the file says, in its order."""
    assert {path.stem for path in real_data.glob("*.jsonl")} == set(REAL)
    for name, (recipe, count) in REAL.items():
        path = real_data / f"{name}.jsonl"
        report = prepare(Plan(recipe, tmp_path / name, [str(path)], max_prompt_tokens=4096), tokenizer, None)
        records = [json.loads(line) for line in path.open()]
        assert report.read == count == len(records) == report.kept + sum(report.refused.values())
        store = MappedStore(tmp_path / name)
        assert len(store) == report.kept >= 0.99 * count
        for prompt in store[:: max(1, len(store) // 50)]:
            record = records[int(prompt.row["id"].split("/")[-1])]
            assert record["problem"].strip() in prompt.row["prompt"]
            if recipe != "humaneval":
                assert prompt.row["answer"] in (record["answer"].strip(), str(record["answer"]).removesuffix(".0"))


def test_real_humaneval_tests_pass_their_solutions(real_data, tmp_path, tokenizer):
    """Every fourth, in Python itself: the store holds what is needed to grade them."""
    path = real_data / "humaneval.jsonl"
    prepare(Plan("humaneval", tmp_path / "s", [str(path)]), tokenizer, None)
    solutions = [json.loads(line)["solution"] for line in path.open()]
    rows = [prompt.row for prompt in MappedStore(tmp_path / "s")]
    assert len(rows) == 164
    for row in rows[::4]:
        tests, solution = row["tests"], solutions[int(row["id"].split("/")[-1])]
        exec(f"{tests['stub']}{solution}\n{tests['code']}", space := {})
        space["check"](space[tests["name"]])


@pytest.mark.slow
def test_memory_is_bounded(tmp_path, tokenizer):
    """Preparing reads as it writes: 30 MB of rows are not held at once."""
    import tracemalloc

    with (tmp_path / "in.jsonl").open("w") as file:
        for i in range(500):
            tests = {"type": "stdin", "inputs": [f"{i}" * 20_000], "outputs": ["y"]}
            file.write(json.dumps({"prompt": f"problem {i}", "kind": "code", "tests": tests}) + "\n")
    size = (tmp_path / "in.jsonl").stat().st_size
    tracemalloc.start()
    report = prepare(Plan("rows", tmp_path / "s", [str(tmp_path / "in.jsonl")]), tokenizer, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert report.kept == 500
    assert peak < size / 2


def test_an_interrupted_run_leaves_nothing(tmp_path, tokenizer, monkeypatch):
    from flowrl_mega.data.prepare import make_store

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(make_store, "encode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(Plan("gsm8k", tmp_path / "s", [str(SAMPLES / "gsm8k.jsonl")]), tokenizer, None)
    assert os.listdir(tmp_path) == []


@pytest.mark.integration
def test_png_bytes_of_a_parquet_cell(tmp_path, tokenizer):
    """Hugging Face's image column: {"bytes", "path"}."""
    pytest.importorskip("datasets", reason="the extra data is not installed")
    import pyarrow
    import pyarrow.parquet

    Image.new("RGB", (2, 2), (1, 2, 3)).save(buffer := io.BytesIO(), "PNG")
    rows = [{"prompt": "x", "image": {"bytes": buffer.getvalue(), "path": None}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "in.parquet")
    prepare(Plan("rows", tmp_path / "s", [str(tmp_path / "in.parquet")]), tokenizer, None)
    assert MappedStore(tmp_path / "s").image_bytes(0) == buffer.getvalue()


def test_no_input_at_all(tmp_path, tokenizer):
    with pytest.raises(ConfigError, match="holds no rows"):
        prepare(Plan("rows", tmp_path / "s", [written(tmp_path / "in.jsonl", [])]), tokenizer, None)
    assert os.listdir(tmp_path) == ["in.jsonl"]
