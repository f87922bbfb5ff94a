"""docs/ops.md: its example runs as it stands, in a process that has torch and numpy alone."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl_mega import ops

REPO = Path(__file__).parents[2]
PAGE = (REPO / "docs" / "ops.md").read_text()
CHECK = """
assert out.logp.shape == out.entropy.shape == out.lse.shape == (2, 5) and out.sequence.shape == (2, 3)
assert hidden.grad.shape == hidden.shape and weight.grad.abs().sum() > 0
assert (logps - torch.log_softmax(logits, -1)[:, :-1].gather(2, ids[:, 1:, None].long())[..., 0]).abs().max() < 1e-5
assert not {"megatron", "transformers", "yaml", "matplotlib", "tokenizers"} & set(sys.modules)
"""


def test_the_example_runs(native):
    """Ten lines, and nothing of the project but ops."""
    (example,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len([line for line in example.splitlines() if line]) <= 10
    done = subprocess.run(
        [sys.executable, "-c", f"import sys\n{example}{CHECK}"], cwd=REPO, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", re.findall(r"^\| `(.*?)` \|", PAGE, re.MULTILINE) + ["softcap", "raise_if_flagged"])
def test_what_it_names_exists(name):
    """An argument of one of the two functions, or a name of ops."""
    for part in re.findall(r"\w+", name.replace("=False", "").replace("`", "")):
        known = {*ops.__all__, *ops.logprob.__annotations__, *ops.lm_head_logprob.__annotations__}
        assert part in known, part
