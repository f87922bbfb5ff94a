"""The built-in sums task: its list of right answers, its scorer and its tokenizer agree."""

import itertools
import math

import pytest
from transformers import AutoTokenizer

from flowrl_mega.config import ConfigError
from flowrl_mega.data.sums import ALPHABET, Sums, right_answers
from flowrl_mega.data.tokenizer import char_tokenizer
from flowrl_mega.rewards.sums import score


@pytest.mark.parametrize(("n", "terms", "length"), [(0, 2, 4), (3, 2, 4), (9, 2, 4), (10, 2, 4), (3, 3, 5), (0, 3, 5)])
def test_the_scorer_accepts_exactly_the_listed_answers(n, terms, length):
    """Exact pass rates rest on this: among ALL strings up to `length`, those scored right are those listed."""
    (row,) = Sums(n, n, terms).rows()
    alphabet = "".join(sorted({*"0+:", *str(n), *"1239"} if terms == 3 else set(ALPHABET)))
    strings = map("".join, itertools.chain(*(itertools.product(alphabet, repeat=k) for k in range(length + 1))))
    accepted = {text for text in strings if score(row, text)[0] == 1.0}
    listed = {answer for answer in right_answers(n, terms) if len(answer) <= length and set(answer) <= set(alphabet)}
    assert accepted == listed
    assert accepted


def test_longer_answers_are_the_same_answers():
    """Their number is that of the short ones: distinct answers can be compared between lengths."""
    (row,) = Sums(3, 3, repeat=2).rows()
    strings = ("".join(text) for k in range(7) for text in itertools.product("0123+", repeat=k))
    assert {text for text in strings if score(row, text)[0] == 1.0} == {"00++33", "11++22", "22++11", "33++00"}
    assert set(row["right_answers"]) == {"00++33", "11++22", "22++11", "33++00"}
    assert score(row, "0++33") == (0.0, "not every character 2 times")
    assert score(row, "11++33") == (0.0, "makes 4, not 3")
    assert [a[::21] for a in right_answers(17, repeat=21)] == right_answers(17)


@pytest.mark.parametrize(("n", "terms"), [(0, 2), (17, 2), (99, 2), (12, 3), (40, 4)])
def test_right_answers_are_complete_and_distinct(n, terms):
    """Stars and bars gives their number independently; each is scored right for n and wrong for n + 1."""
    answers = right_answers(n, terms)
    assert len(answers) == len(set(answers)) == math.comb(n + terms - 1, terms - 1)
    assert {score({"total": n, "terms": terms}, answer) for answer in answers} == {(1.0, "right")}
    assert {score({"total": n + 1, "terms": terms}, answer)[0] for answer in answers} == {0.0}


@pytest.mark.parametrize(
    "response", ["05+7", "5+07", "5+7 ", "+12", "12", "5+7+0", "5+7\n", "٥+7", "-1+13", "5+7+", "", "1" * 9999 + "+1"]
)
def test_near_misses_are_wrong_with_a_reason(response):
    """Forms that a loose parser (int(), strip(), \\d) would let through."""
    assert score({"total": 12, "terms": 2}, response) == (0.0, "not 2 numbers joined by '+'")


def test_a_wrong_sum_is_named():
    """samples.jsonl shows the reason to people."""
    assert score({"total": 12, "terms": 2}, "5+8") == (0.0, "makes 13, not 12")


def test_rows_and_their_limits():
    """Prompts have two digits each; totals that do not fit are refused."""
    first = Sums(7, 10, 3).rows()[0]
    assert first == {"prompt": "07:", "total": 7, "terms": 3, "right_answers": right_answers(7, 3)}
    assert [row["prompt"] for row in Sums(7, 10).rows()] == ["07:", "08:", "09:", "10:"]
    for arguments in ((5, 4), (0, 100), (-1, 5)):
        with pytest.raises(ConfigError, match=r"must lie within 0\.\.99"):
            Sums(*arguments)
    with pytest.raises(ConfigError, match="terms=1"):
        Sums(0, 9, 1)
    with pytest.raises(ConfigError, match="repeat=0"):
        Sums(0, 9, repeat=0)


def test_char_tokenizer_round_trips_through_a_folder(tmp_path, monkeypatch):
    """The quick start saves it beside its model and loads it as any other model's, without a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    made = char_tokenizer(ALPHABET + " \n")
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for tokenizer in (made, loaded):
        assert len(tokenizer) == tokenizer.vocab_size == len(ALPHABET) + 4
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (0, 1)
        ids = tokenizer("12: 5+7\n ")["input_ids"]
        assert ids == [2 + (ALPHABET + " \n").index(character) for character in "12: 5+7\n "]
        assert tokenizer.decode(ids) == "12: 5+7\n "
        assert tokenizer.decode([*ids, 1, 0], skip_special_tokens=True) == "12: 5+7\n "
        assert tokenizer("5<eos>")["input_ids"] == [7, 1]


def test_unknown_characters_are_an_error():
    """Dropping them silently would train on other prompts than the user gave."""
    with pytest.raises(Exception, match=r"(?i)unk"):
        char_tokenizer("abc")("abd")
    with pytest.raises(ValueError, match="each character once"):
        char_tokenizer("aba")
