"""docs/metrics.md knows every metric: those that the sources name, and those of real runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from flowrl_mega.monitor.metric_names import RENAMED
from flowrl_mega.rollout.dispatch import COUNTED

ROOT = Path(__file__).parents[2]
GROUPS = "loss|policy|critic|reward|verdict|rollout|mismatch|fp8|perf|target|diversity|kind"
NAME = re.compile(rf"(?:{GROUPS})/[a-zA-Z0-9_/]+")


def documented() -> set[str]:
    """The names in the first column of the page's tables, and the phases that perf/step_seconds lists."""
    page = (ROOT / "docs" / "metrics.md").read_text()
    return set(NAME.findall("\n".join(line for line in page.splitlines() if line.startswith("| "))))


def in_the_sources() -> set[str]:
    """Every string of the package that is the name of a metric."""
    found = set()
    for file in (ROOT / "flowrl_mega").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
                found.add(node.value)
    return found


def test_the_page_has_every_metric() -> None:
    old = {name for name in RENAMED if "/" in name}  # of earlier versions
    parts = {"loss/residual_p"}  # of a name that is put together
    pictures = {"loss/residual_histogram", "loss/log_z_calibration"}  # wandb's, no metrics
    assert all(name in (ROOT / "docs" / "metrics.md").read_text() for name in pictures)
    missing = in_the_sources() - documented() - old - parts - pictures
    assert not missing, sorted(missing)
    assert {f"rollout/{name}" for name in COUNTED} <= documented()


def test_the_page_has_no_others() -> None:
    """Names that are put together of parts are listed here, by hand."""
    made = {
        "kind/KIND/reward",
        "kind/KIND/length",
        "kind/KIND/entropy",
        "verdict/KIND",
        "loss/residual_p05",
        "loss/residual_p95",
    }
    made |= {f"{model}/{name}" for model in ("policy", "critic") for name in
             ("grad_norm", "max_grad_norm", "lr", "skipped_updates")}  # fmt: skip
    made |= {f"perf/{phase}_seconds" for phase in ("generate", "reward", "score", "update", "sync")}
    queue = ("rounds", "carried_groups", "uniform_dropped", "stale_dropped", "replayed_groups")
    made |= {f"rollout/{name}" for name in (*queue, *COUNTED)}
    assert documented() - in_the_sources() - made == set()
