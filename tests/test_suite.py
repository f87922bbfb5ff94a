"""The suite itself: what a folder's tests import, and two halves of them side by side."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

REPO = Path(__file__).parents[1]


def test_a_folder_imports_only_what_it_needs():
    """Torch and Megatron take seconds to import: the settings' tests, which need neither, do not wait for them."""
    code = (
        "import sys, pytest\n"
        "status = pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', 'tests/config'])\n"
        "print(status == 0, sorted({'torch', 'megatron', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["True []"], done.stdout + done.stderr
