"""What a model has written stays text, whatever it is; a page holds only the elements of its template."""

from __future__ import annotations

import pytest
from report_runs import distribution, metrics_of, report, write_lines, write_run

from flowrl_mega.report.text import visible

HOSTILE = (
    "<script>alert(1)</script>",
    "</pre></details></main><img src=x onerror=alert(1)>",
    "--><style>*{display:none}</style><!--",
    "\" onmouseover='alert(1)' x=\"",
    "{{ 7 * 7 }}{% raw %}&lt;b&gt;&#60;",
    "$\\frac{1$ $x^2$ \\alpha",
    "\x00\x07\x1b[31m\x7f\x85\u202e\u2028\ufeff",
    "\ud800 and \udfff",
    "<svg onload=alert(1)><a href=javascript:alert(1)>",
    "]]><![CDATA[",
)


def run_with(folder, text):
    """A run in which every text that is not the trainer's own is `text`; so are names, as rewards bring their own."""
    name = f"kind/{text}/reward"
    rows = [row | {name: row["step"] / 60} for row in metrics_of(60)]
    setting = text.encode("utf-8", "replace").decode()  # lone surrogates are no YAML
    run = write_run(folder, rows, {"objective": {"name": setting}, f"with {setting}": 1})
    write_lines(run / "evaluation.jsonl", [{"step": step, text: step / 60} for step in (30, 60)])
    sample = {"step": 60, "prompt": text, "response": text, "reward": 1.0, "right": False, "kind": text, "reason": text}
    write_lines(run / "samples.jsonl", [sample, sample | {"reward": text}])
    record = distribution(60)
    record["prompts"] = [{"prompt": text, "answers": [{"text": text, "count": text, "reward": text, "target": 0.5}]}]
    write_lines(run / "distributions.jsonl", [record])
    start = {"at": text, "step": 0, "ranks": text, "gpus": 1, "device": text, "versions": {text: text}, "commit": text}
    write_lines(run / "run.json", [{"starts": [start]}])
    return run


@pytest.mark.parametrize("text", HOSTILE)
def test_a_text_adds_no_element(tmp_path, text):
    harmless, page = report(run_with(tmp_path / "a", "harmless")), report(run_with(tmp_path / "b", text))
    assert page.tags() == harmless.tags()
    known = {(each.tag, name) for each in harmless.elements for name in each.attributes}
    assert {(each.tag, name) for each in page.elements for name in each.attributes} <= known
    shown = [each.text for each in page.all("pre")]
    assert shown == [visible(text)] * 3, "as it is written, and whole"


def test_what_cannot_be_seen_is_shown(tmp_path):
    page = report(run_with(tmp_path / "run", HOSTILE[6] + HOSTILE[7]))
    assert page.all("pre")[1].text == r"\x00\x07\x1b[31m\x7f\x85\u202e\u2028\ufeff\ud800 and \udfff"
    assert not [c for c in page.html if ord(c) < 32 and c not in "\n\t" or 0x7F <= ord(c) < 0xA0]


def test_line_breaks_tabs_and_other_scripts_stay():
    assert visible("a\n\tb é 中文 😀 नमस्ते 👩\u200d🚀") == "a\n\tb é 中文 😀 नमस्ते 👩\u200d🚀"


def test_long_answers_are_cut(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [
        {"step": step, "prompt": "p" * 5000, "response": "r" * 1_000_000, "reward": 0.0, "reason": "w" * 9000}
        for step in range(40)
    ]
    write_lines(run / "samples.jsonl", rows)
    page = report(run)
    assert len(page.html) < 1_000_000
    assert page.section("samples").count("996000 more characters are left out.") >= 20


def test_only_the_last_samples_are_shown(tmp_path):
    run = write_run(tmp_path / "run")
    rows = [{"step": step, "prompt": f"prompt {step}", "response": "x", "reward": 0.0} for step in range(1, 5001)]
    write_lines(run / "samples.jsonl", rows)
    shown = [each.text for each in report(run).all("summary") if each.is_in("section", id="samples")]
    assert len(shown) == 200 and shown[0].startswith("step 5000: ") and shown[-1].startswith("step 4801: ")
