"""Modules beside the standard library, for programs and for the tests of rows: numpy, as HumanEval+ wants it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from sandbox_watch import SYSTEM_PYTHON, opened

from flowrl_mega.config import CodeSettings, ConfigError, RewardSettings
from flowrl_mega.rewards import code
from flowrl_mega.rewards.sandbox import packages

pytestmark = pytest.mark.slow

# The form of HumanEval+: its tests are numpy's, whatever the program uses.
PLUS = """
import numpy as np

def is_floats(x) -> bool:
    return isinstance(x, float) or isinstance(x, np.floating)

def assertion(out, exp, atol):
    assert np.allclose(out, exp, rtol=1e-07, atol=1e-06) if is_floats(exp) else out == exp

def check(candidate):
    for inp, exp in zip([[[1.0, 2.0]], [[0.1, 0.2]]], [3.0, 0.3]):
        assertion(candidate(*inp), exp, 0)
"""
ROW = {"tests": {"type": "check", "name": "total", "code": PLUS, "stub": 'def total(x):\n    """The sum."""\n'}}


@pytest.mark.parametrize(
    "body, reward, kind",
    [
        ("return sum(x)", 1.0, "right"),
        ("import numpy\n    return float(numpy.ones((300, 300)).dot(numpy.ones(300))[0] / 300 * sum(x))", 1.0, "right"),
        ("return sum(x) + 1", 0.0, "wrong"),
        ("import torch\n    return sum(x)", 0.0, "crash"),
    ],
)
def test_numpy_is_there_by_default(body, reward, kind):
    """For the judge and for the program; what else the trainer has is not."""
    found = code.score(ROW, f"```python\ndef total(x):\n    {body}\n```")
    assert (found[0], found[2]) == (reward, kind), found


def open_to_all(folder: Path) -> bool:
    return all(path.stat().st_mode & 0o005 == 0o005 for path in [folder, *folder.parents])


@pytest.mark.parametrize("way", ["root", "user", "process"])
def test_only_what_is_named_can_be_imported(way):
    """At every level of isolation; the modules are the trainer's own."""
    if way == "process" and os.geteuid() == 0 and not open_to_all(Path(np.__file__).parent):
        pytest.skip("numpy lies in a folder that other users cannot read, and programs run as one")
    with opened(CodeSettings(packages=("numpy", "packaging")), way) as sandbox:
        outcome = sandbox.run("import numpy, packaging.version\nprint(numpy.__file__)\nimport psutil", "")
        assert outcome.stdout.strip() == (np.__file__ if way == "process" else "/modules/numpy/__init__.py")
        assert "No module named 'psutil'" in outcome.stderr
    with opened(CodeSettings(packages=()), way) as sandbox:
        assert "No module named 'numpy'" in sandbox.run("import numpy", "").stderr


def test_a_module_of_one_file(tmp_path, monkeypatch):
    """Its neighbours stay hidden, at level `process` too, where the file system is not."""
    (tmp_path / "alone.py").write_text("value = 7")
    (tmp_path / "beside.py").write_text("")
    tmp_path.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    with opened(CodeSettings(packages=("alone",)), "root") as sandbox:
        outcome = sandbox.run("import alone, os\nprint(alone.value, os.listdir(os.path.dirname(alone.__file__)))", "")
        assert outcome.stdout.strip() == "7 ['alone.py']", outcome
        assert sandbox.run(f"import os\nprint(os.path.exists({str(tmp_path)!r}))", "").stdout == "False\n"
    with opened(CodeSettings(packages=("alone",)), "process") as sandbox:
        assert "No module named 'beside'" in sandbox.run("import beside", "").stderr


def test_libraries_of_a_wheel_come_along():
    """numpy.libs, where numpy is a wheel; a module of the interpreter's own needs no path."""
    libraries = Path(np.__file__).parents[1] / "numpy.libs"
    assert packages.find(["numpy"]) == [str(Path(np.__file__).parent), *[str(libraries)] * libraries.exists()]
    assert packages.find(["sys"]) == []


# What rows need is asked before a run


def settings(**fields):
    return RewardSettings(function="-", code=CodeSettings(**fields))


def test_what_tests_import_is_looked_for_at_the_start():
    """A module is missing for every answer to a row: one message says so, with what to set."""
    assert code.describe(code.DEFAULT, {"code"}, {"numpy", "math"}).startswith("sandbox: ")
    with pytest.raises(ConfigError) as caught:
        code.describe(code.DEFAULT, {"code"}, {"numpy", "packaging"})
    said = str(caught.value)
    assert said.startswith(
        "reward.code.packages = [numpy]: the tests of the data import packaging, and programs cannot"
    )
    assert "ModuleNotFoundError" in said and "set reward.code.packages=[numpy,packaging]" in said
    assert code.describe(settings(packages=("packaging",)), {"code"}, {"packaging"}).startswith("sandbox: ")


def test_a_module_that_ends_the_interpreter_is_missing(tmp_path, monkeypatch):
    """As a library that was built for another processor does."""
    (tmp_path / "ends.py").write_text("import os\nos._exit(3)")
    tmp_path.chmod(0o755)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"import ends, and programs cannot \(.*ended by exit 3"):
        code.describe(settings(packages=("ends",)), {"code"}, {"ends"})


@pytest.mark.parametrize("name", ["no_such_module", "numpy.linalg", "../numpy"])
def test_a_package_that_is_not_installed(name):
    """Said with the setting's name, where there is no such module or the name is none."""
    with pytest.raises(ConfigError, match=f"^reward.code.packages: {name} is no module of this environment; install"):
        code.describe(settings(packages=(name,)))


@pytest.mark.skipif(not SYSTEM_PYTHON.exists(), reason=f"no {SYSTEM_PYTHON}")
def test_another_interpreter_has_its_own():
    """The trainer's numpy would not load there; the fix is another one."""
    other = settings(python=str(SYSTEM_PYTHON), isolation="process")
    with pytest.raises(
        ConfigError, match="^reward.code.python = .* import no_such, and programs cannot .* it there, or"
    ):
        code.describe(other, {"code"}, {"no_such"})
