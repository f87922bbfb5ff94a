"""The `report` command: writes the page once, or again whenever a run has gone on."""

from __future__ import annotations

import base64
import hashlib
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import jinja2
from markupsafe import Markup

from flowrl_mega.config import ConfigError
from flowrl_mega.report.run import FILES, check_folders, has_anything, read_run
from flowrl_mega.report.sections import MOST_ANSWERS, MOST_RUNS, Page, page_of
from flowrl_mega.report.text import number, visible
from flowrl_mega.whole_file import write_whole

PAGE = "report.html"
MOST_SAMPLES = 200  # of all runs together
DONE = 0


def report(
    folders: Sequence[str], out: str | None, watch: float | None, stop_requested: Callable[[], bool] = lambda: False
) -> int:
    """Returns 0. `watch`: seconds between two looks at the runs, until interrupted; None: once."""
    paths = [Path(folder) for folder in folders]
    file = Path(out) if out else paths[0] / PAGE
    _check(paths, file)
    if watch is not None:
        return _watch(paths, file, watch, stop_requested)
    _write(file, render(_built(paths), None))
    print(f"{file}: {file.stat().st_size / 1e6:.1f} MB")
    return DONE


def end_with_page(folders: Sequence[Path], file: Path) -> None:
    """What a command ends with that has done its work: a page of these folders, as far as they are there. A page that
    cannot be made is told, and takes nothing from the work."""
    try:
        report([str(folder) for folder in folders if has_anything(folder)], str(file), None)
    except ConfigError as error:
        print(f"flowrl-mega: no {file.name}: {error}", file=sys.stderr)


def _check(paths: Sequence[Path], file: Path) -> None:
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise ConfigError(f"{path}: given twice; name each run once")
    check_folders(paths)
    if file.is_dir() or not file.parent.is_dir():
        why = "is a folder" if file.is_dir() else f"there is no folder {file.parent}"
        raise ConfigError(f"--out {file}: {why}; give the file that the page is written to")


def _watch(paths: Sequence[Path], file: Path, every: float, stop_requested: Callable[[], bool]) -> int:
    page = seen = None
    try:
        while not stop_requested():
            now = _state(paths)
            if now != seen:
                page = _built(paths)
                _write(file, render(page, every))
                print(f"{time.strftime('%T')} {file}" if seen else f"{file}: open it; Ctrl-C ends", flush=True)
                seen = now
            end = time.monotonic() + every
            while (left := end - time.monotonic()) > 0 and not stop_requested():
                time.sleep(min(0.2, left))
    except KeyboardInterrupt:
        print(file=sys.stderr)  # behind the terminal's ^C
    if page is not None:
        _write(file, render(page, None))  # a page that nobody renews must not reload
    return DONE


def _state(paths: Sequence[Path]) -> list[tuple[int, int] | None]:
    """Changes when one of the runs' files does."""
    found: list[tuple[int, int] | None] = []
    for path in (folder / name for folder in paths for name in FILES):
        try:
            known = path.stat()
            found.append((known.st_mtime_ns, known.st_size))
        except OSError:
            found.append(None)
    return found


def _built(paths: Sequence[Path]) -> Page:
    return page_of([read_run(path, MOST_SAMPLES // min(len(paths), MOST_RUNS)) for path in paths])


def render(page: Page, refresh: float | None) -> str:
    """Every value that the template writes is made visible, and escaped."""
    loader = jinja2.PackageLoader("flowrl_mega.report")
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=lambda value: value if isinstance(value, Markup) else visible(number(value)),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style, script = (loader.get_source(environment, name)[0] for name in ("page.css", "page.js"))
    return environment.get_template("page.html").render(
        page=page,
        refresh=refresh,
        made=time.strftime("%F %T"),
        most_runs=MOST_RUNS,
        most_answers=MOST_ANSWERS,
        style=Markup(style),
        script=Markup(script),
        # The page's own script is the only one that a browser runs, whatever an answer holds.
        script_sum=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _write(file: Path, html: str) -> None:
    try:
        write_whole(file, html)
    except OSError as error:
        raise ConfigError(f"{file}: cannot be written ({error.strerror}); choose another file with --out") from None
