"""Which test problems are in a training set: small cases that are counted by hand, and a slow search as the oracle."""

import json
import random

import pytest

from flowrl_mega.data.prepare import contamination
from flowrl_mega.data.prepare.contamination import COMMON, RUN, Benchmark, find, read_test_set, table, words

LONG = "a train leaves the town at nine and goes to the sea at sixty miles an hour when is it"  # 20 words


def one(test, *train):
    return find(enumerate_ids(train), [Benchmark("t", {"t/1": " ".join(words(test))}, 0)])[0]


def enumerate_ids(texts):
    return [(f"train/{i}", text) for i, text in enumerate(texts)]


def test_the_same_words():
    """Case, punctuation, spaces and compatibility characters do not hide a copy; another number is no copy."""
    found = one("What is 2 + 3?", "what IS  2+3", "What is 2 + 4?", "x", "ｗｈａｔ ｉｓ ２ ３")
    assert found.exact == {"t/1": ["train/0", "train/3"]}
    assert found.shares == {}
    assert found.train_ids(0.5) == {"train/0", "train/3"}


def test_a_run_of_13_words_and_its_share():
    """20 words are 8 runs: 13 of them in common are 1, 16 of them 4; 12 are none."""
    said = LONG.split()
    assert len(said) == 20 and RUN == 13
    assert one(LONG, "so " + " ".join(said[2:14])).shares == {}
    assert one(LONG, "so " + " ".join(said[2:15])).shares == {"t/1": {"train/0": 1 / 8}}
    found = one(LONG, "so " + " ".join(said[2:18]), " ".join(said[:13]), f"And so: {LONG}")
    assert found.shares == {"t/1": {"train/0": 4 / 8, "train/1": 1 / 8, "train/2": 1.0}}
    assert found.exact == {}
    assert found.near(0.5) == {"t/1": ["train/2"]}
    assert found.train_ids(0.5) == {"train/0", "train/2"} and found.train_ids(0.1) == {"train/0", "train/1", "train/2"}


def test_short_problems():
    """8 to 12 words count as one run; fewer only where they are all there is."""
    eight = "how many primes are there below one hundred"
    assert one(eight, f"Ada asks: {eight}?").shares == {"t/1": {"train/0": 1.0}}
    assert one(eight, eight.replace("one", "two")).shares == {}
    seven = "how many primes are there below one"
    assert one(seven, f"Ada asks: {seven}?").shares == {}
    assert one(seven, f"{seven}?").exact == {"t/1": ["train/0"]}


def test_a_phrase_says_nothing_and_copies_are_no_phrase():
    """A run in more than 10 different problems is how problems are worded; 100 copies of one problem are still one."""
    said = LONG.split()
    start = " ".join(said[:14])  # runs 0 and 1
    few = [f"{start} number {i}" for i in range(COMMON)]
    assert set(one(LONG, *few).shares["t/1"].values()) == {2 / 8}
    assert one(LONG, *few, f"{start} and one more").shares == {}
    assert one(LONG, *([few[0]] * 100)).shares == {"t/1": {f"train/{i}": 2 / 8 for i in range(100)}}
    both = one(LONG, *few, f"{start} and one more", f"the {LONG}")
    assert both.shares == {"t/1": {"train/11": 1.0}}, "of the runs that are no phrase"


def test_against_a_slow_search():
    """Random texts over few words, all pairs compared: the same shares without any index."""
    draw = random.Random(0)
    vocabulary = "a b c".split()
    train = [draw.choices(vocabulary, k=draw.randint(5, 40)) for _ in range(60)]
    tests = [draw.choices(vocabulary, k=draw.randint(5, 30)) for _ in range(80)]
    for text in tests[::2]:  # parts of test problems, of every length
        train.append(["x", *text[draw.randint(0, 5) :], *draw.choices(vocabulary, k=3)])
    train += [[*tests[0][:15], *draw.choices(vocabulary, k=5)] for _ in range(COMMON + 3)]  # a phrase
    found = find(
        enumerate_ids(map(" ".join, train)), [Benchmark("t", {f"t/{i}": " ".join(t) for i, t in enumerate(tests)}, 0)]
    )[0]
    distinct = {" ".join(t) for t in train}
    for i, text in enumerate(tests):
        size = RUN if len(text) >= RUN else len(text)
        runs = {" ".join(text[k : k + size]) for k in range(len(text) - size + 1)} if size >= 8 else set()
        telling = [run for run in runs if sum(f" {run} " in f" {t} " for t in distinct) <= COMMON]
        expected = {}
        for k, t in enumerate(train):
            held = sum(f" {run} " in f" {' '.join(t)} " for run in telling)
            if held:
                expected[f"train/{k}"] = round(held / len(telling), 4)
        if text in train:
            assert found.exact[f"t/{i}"]
        else:
            assert found.shares.get(f"t/{i}", {}) == expected
    assert len(found.shares) > 10


def test_test_sets_of_any_form(tmp_path):
    """Columns have many names; how to answer is no part of a problem; what holds no problem is counted."""
    path = tmp_path / "mine.jsonl"
    wording = "x y\n\nPlease reason step by step, and put your final answer within \\boxed{}."
    records = [{"problem": "x y"}, {"question": "x y"}, {"Problem": "X, y"}, {"question_content": "x y"}]
    records += [
        {"prompt": wording},
        {"prompt": [{"role": "system", "content": "z"}, {"role": "user", "content": "x y"}]},
    ]
    bad = [{"answer": "3"}, {"problem": 7}, {"prompt": [1]}, {"prompt": [{"role": "user"}]}]
    path.write_text("".join(json.dumps(record) + "\n" for record in records + bad) + "[}\n")
    found = read_test_set(str(path), "test")
    assert found.name == "mine" and found.unreadable == 5
    assert set(found.problems) == {f"mine/{i}" for i in range(1, 7)}
    assert set(found.problems.values()) == {"x y"}


def test_the_table():
    overlaps = find(
        enumerate_ids(["What is it?", f"Now {LONG}"]),
        [
            Benchmark("one", {"one/1": "what is it", "one/2": LONG, "one/3": "new"}, 2),
            Benchmark("two", {"two/1": "new"}, 0),
        ],
    )
    lines = table(overlaps).splitlines()
    assert lines[2] == "| one | 3 (and 2 unreadable) | 1 | 1 | 1 | 2 | one/1 = train/0, one/2 ~ train/1 |"
    assert lines[3] == "| two | 1 | 0 | 0 | 0 | 0 | - |"
    assert len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("train", "same", "near"), [("flowrl_train_math", 0, 9), ("flowrl_train_aime", 5, 1), ("gsm8k_train", 0, 0)]
)
def test_real_training_sets_against_math500(real_data, train, same, near):
    """As they are: docs/data.md shows these figures. The five copies are compared once more, letter by letter."""
    read = contamination.read_test_set(str(real_data / f"{train}.jsonl"), "train").problems
    (found,) = find(read.items(), [read_test_set(str(real_data / "math500.jsonl"), "test")])
    assert (len(found.exact), len(found.near(0.5))) == (same, near)
    problems = [
        {"".join(json.loads(line)["problem"].split()) for line in (real_data / f"{name}.jsonl").open()}
        for name in (train, "math500")
    ]
    assert len(problems[0] & problems[1]) <= same
