"""The page in a real browser that has no network: nothing is asked for, nothing goes wrong, and it works."""

from __future__ import annotations

import chromium
import pytest
from report_runs import distribution, metrics_of, write_lines, write_run

from flowrl_mega import cli

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not chromium.FOUND, reason=f"needs one of {', '.join(chromium.NAMES)} on the PATH"),
]
HOSTILE = "<script>window.hostile = 1</script><img src=http://example.com/x onerror='window.hostile = 1'>"
CONTRAST = """(() => {
  const part = (v) => v <= .04045 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const light = (colour) => {
    const [r, g, b] = colour.match(/[0-9.]+/g).map((v) => part(v / 255));
    return .2126 * r + .7152 * g + .0722 * b;
  };
  const paper = light(getComputedStyle(document.body).backgroundColor);
  const ratio = (colour) => (Math.max(light(colour), paper) + .05) / (Math.min(light(colour), paper) + .05);
  const styles = (of) => [...document.querySelectorAll(of)].map((e) => getComputedStyle(e));
  const strokes = styles("figure path, .legend path").filter((s) => s.stroke !== "none" && s.strokeOpacity === "1");
  return {
    text: Math.min(...styles("h1, h2, p, a, td, th, small, summary, figcaption").map((s) => ratio(s.color))),
    labels: Math.min(...styles("svg text").map((s) => ratio(s.fill))),
    lines: Math.min(...strokes.map((s) => ratio(s.stroke))),
    colours: new Set(strokes.map((s) => s.stroke)).size,
  };
})()"""


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Six methods, a colour each, with everything that a run can have, and text that would like to be a script."""
    folder = tmp_path_factory.mktemp("runs")
    runs = []
    for at in range(6):
        names = ("kind__" + HOSTILE + "__reward", "policy__a_long_name" * 3)
        rows = metrics_of(60, at, rollout__stopped=0.1, **dict.fromkeys(names, lambda step: step))
        run = write_run(folder / f"{'run_with_a_long_name_' * 3}{at}", rows, {f"long.{at}" * 20: "v" * 300})
        write_lines(run / "evaluation.jsonl", [{"step": step, "aime24/avg@4": step / 100} for step in (0, 30, 60)])
        write_lines(run / "distributions.jsonl", [distribution(step) for step in (10, 20, 30)])
        sample = {"response": HOSTILE + "x" * 500, "reward": 0.5, "reason": "because"}
        write_lines(run / "samples.jsonl", [{"step": step, "prompt": f"prompt {step}", **sample} for step in range(9)])
        runs.append(str(run))
    assert cli.main(["report", *runs, "--out", str(folder / "page.html")]) == 0
    return (folder / "page.html").as_uri()


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = chromium.Browser(tmp_path_factory.mktemp("chromium"))
    yield found
    found.close()


def test_nothing_is_asked_for_and_nothing_goes_wrong(browser, page):
    browser.open(page, 1280)
    assert browser.value(
        "document.querySelectorAll('details').forEach((each) => { each.open = true; }); document.title"
    )
    browser.value("new Promise((done) => setTimeout(done, 300))")
    asked = [of["request"]["url"] for method, of in browser.events if method == "Network.requestWillBeSent"]
    assert asked == [page]
    wrong = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Page.javascriptDialogOpening")
    assert [event for event in browser.events if event[0] in wrong] == []
    assert browser.value("typeof window.hostile") == "undefined"


def test_a_script_that_is_not_the_pages_own_does_not_run(browser, page):
    """Were a text to become one after all, the browser would refuse it."""
    browser.open(page, 1280)
    add = "const s = document.createElement('script'); s.textContent = 'window.hostile = 1'; document.body.append(s);"
    assert browser.value(add + "typeof window.hostile") == "undefined"
    assert any("Content Security Policy" in str(event) for event in browser.events)


@pytest.mark.parametrize("width", [320, 375, 768, 1280])
def test_the_page_does_not_scroll_sideways(browser, page, width):
    browser.open(page, width)
    for opened in ("false", "true"):
        browser.value(f"document.querySelectorAll('details').forEach((each) => {{ each.open = {opened}; }})")
        assert browser.value("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("dark", [False, True])
def test_text_and_lines_stand_out(browser, page, dark):
    """By the ratios that WCAG 2.2 asks for: 4.5 for text, 3 for what is drawn."""
    browser.open(page, 1280, dark)
    ratios = browser.value(CONTRAST)
    assert ratios["text"] >= 4.5 and ratios["labels"] >= 4.5 and ratios["lines"] >= 3, ratios
    assert ratios["colours"] == 7, "six of curves, and that of the axes"
    paper = browser.value("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(21, 21, 21)" if dark else "rgb(255, 255, 255)")


def test_samples_are_found(browser, page):
    browser.open(page, 1280)
    find = "filter.value = {!r}; filter.dispatchEvent(new Event('input'))"  # an id is a name of the window
    shown = "[...document.querySelectorAll('.sample')].filter((each) => !each.hidden).length"
    assert browser.value(shown) == 54 and not browser.value("document.getElementById('find').hidden")
    browser.value(find.format("PROMPT 7"))
    assert browser.value(shown) == 6 and browser.value("document.getElementById('found').value") == "6 of 54 prompts"
    assert browser.value("[...document.querySelectorAll('.sample[open]')].length") == 6
    browser.value(find.format("no such text"))
    assert browser.value(shown) == 0
    browser.value(find.format(""))
    assert browser.value(shown) == 54


def test_what_a_screen_reader_is_told(browser, page):
    """The browser's own tree: the parts of the page, and a name for every picture, region and input."""
    browser.open(page, 1280)
    nodes = browser.ask("Accessibility.getFullAXTree")["nodes"]
    named = [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in nodes if not node["ignored"]]
    roles = [role for role, _ in named]
    assert all(roles.count(role) == 1 for role in ("banner", "navigation", "main"))
    pictures = [name for role, name in named if role in ("image", "img")]
    assert len(pictures) > 10 and all(pictures)
    assert all(name for role, name in named if role in ("region", "searchbox", "heading", "link", "table"))


def test_the_keyboard_reaches_everything(browser, page):
    """The first Tab shows the link to the content; whatever has the focus has an outline."""
    browser.open(page, 1280)
    key = {"key": "Tab", "code": "Tab", "windowsVirtualKeyCode": 9}
    where = (
        "(() => { const at = document.activeElement; return [at.tagName + '.' + at.className, "
        "getComputedStyle(at).outlineStyle, at.getBoundingClientRect().left >= 0]; })()"
    )
    reached = []
    for _ in range(40):
        browser.ask("Input.dispatchKeyEvent", type="keyDown", **key)
        browser.ask("Input.dispatchKeyEvent", type="keyUp", **key)
        reached.append(browser.value(where))
    assert reached[0] == ["A.skip", "solid", True]
    assert all(style == "solid" and is_seen for _, style, is_seen in reached), reached
    assert {"A.", "DIV.box", "SUMMARY."} <= {name for name, _, _ in reached}
