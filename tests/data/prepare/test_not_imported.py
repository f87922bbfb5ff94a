"""What training needs of the data package."""

import subprocess
import sys

import pytest


@pytest.mark.slow
def test_training_imports_nothing_that_prepares_stores() -> None:
    """Recipes and contamination are for tools/prepare_data.py alone: the ranks of a job must not load them."""
    code = "import sys, flowrl_mega.job; print(*(name for name in sys.modules if 'data.prepare' in name))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, check=True)
    assert said.stdout.split() == []
