"""Answers are written once and read back after any end; a folder keeps to one model, one sampling and one data set."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from flowrl_mega.benchmark import answers
from flowrl_mega.benchmark.answers import Answer, AnswerFile, Place, check_about, read_answers, weights_of
from flowrl_mega.config import ConfigError, RunError

FIRST, SECOND = Place("a", 0, 0), Place("a", 0, 1)


def write(run_dir: Path, rank: int, **texts: str) -> None:
    file = AnswerFile(run_dir, rank)
    for name, text in texts.items():
        file.add(Place(name, 0, 0), Answer(text, 3, "stop"))
    file.close()


def test_what_is_written_reads_back(tmp_path: Path) -> None:
    """Line ends of all kinds, text of other scripts, no length."""
    text = "a\nb\u2028c\r\n日本語 \\boxed{1} \x00"
    file = AnswerFile(tmp_path, 0)
    file.add(FIRST, Answer(text, None, "length"))
    file.add(SECOND, Answer("half a pair: \ud83d", 1, "stop"))
    file.close()
    write(tmp_path, 1, b="of another rank")
    assert read_answers(tmp_path) == {
        FIRST: Answer(text, None, "length"),
        SECOND: Answer("half a pair: ?", 1, "stop"),
        Place("b", 0, 0): Answer("of another rank", 3, "stop"),
    }


@pytest.mark.parametrize("cut", range(1, 60, 7))
def test_a_kill_costs_the_line_being_written_and_no_more(tmp_path: Path, cut: int) -> None:
    """Cut anywhere, also behind a brace; whoever goes on there does not write behind half a line."""
    write(tmp_path, 0, a="kept", b="}" * 40)
    path = tmp_path / "answers" / "rank_0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert list(read_answers(tmp_path).values()) == [Answer("kept", 3, "stop")]
    write(tmp_path, 0, c="new")
    assert [answer.text for answer in read_answers(tmp_path).values()] == ["kept", "new"]


def test_a_line_that_is_no_answer_is_named(tmp_path: Path) -> None:
    write(tmp_path, 0, a="x")
    path = tmp_path / "answers" / "rank_0.jsonl"
    path.write_text("half a li\n" + path.read_text())
    with pytest.raises(ConfigError, match=r"rank_0.jsonl, line 1: is no answer"):
        read_answers(tmp_path)


def test_a_full_disk_keeps_what_is_there(tmp_path: Path) -> None:
    """By the system's own limit on a file's size, which a write meets as it meets a full disk."""
    import signal

    file, limits = AnswerFile(tmp_path, 0), resource.getrlimit(resource.RLIMIT_FSIZE)
    file.add(FIRST, Answer("kept", 3, "stop"))
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file.path.stat().st_size + 100, limits[1]))
    try:
        with pytest.raises(RunError, match=r"rank_0.jsonl: cannot be written .* all answers before this one are kept"):
            file.add(SECOND, Answer("x" * 1000, 3, "stop"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    file.close()
    assert list(read_answers(tmp_path)) == [FIRST]
    write(tmp_path, 0, b="after it was mended")
    assert len(read_answers(tmp_path)) == 2


ABOUT: dict[str, Any] = {"seed": 0, "rollout": {"temperature": 0.6}, "benchmarks": {"a": "1"}}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seed": 1}, "seed = 1: run_dir = .* holds answers with 0"),
        ({"rollout": {"temperature": 1.0}}, "rollout.temperature = 1.0"),
        ({"benchmarks": {"a": "2"}}, "benchmarks.a = '2'"),
    ],
)
def test_other_answers_want_another_folder(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    check_about(tmp_path, ABOUT)
    check_about(tmp_path, ABOUT)
    with pytest.raises(ConfigError, match=said):
        check_about(tmp_path, ABOUT | change)


def test_benchmarks_may_be_added_and_left_out(tmp_path: Path) -> None:
    for benchmarks in ({"a": "1"}, {"b": "2"}, {"a": "1", "c": "3"}):
        check_about(tmp_path, ABOUT | {"benchmarks": benchmarks})
    with pytest.raises(ConfigError, match="benchmarks.b"):
        check_about(tmp_path, ABOUT | {"benchmarks": {"b": "9"}})


def test_weights_are_known_by_what_is_in_them(tmp_path: Path) -> None:
    """Elsewhere the same, with one byte of a tensor another."""
    folders = [tmp_path / name for name in "abc"]
    for folder, byte in zip(folders, (1, 1, 2), strict=True):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        body = bytearray(3 * answers.SAMPLED)
        body[-5] = byte
        (folder / "model.safetensors").write_bytes(bytes(body))
    a, b, c = map(weights_of, map(str, folders))
    assert a == b != c
