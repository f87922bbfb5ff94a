"""Runs the methods on answers of one age: a learning rate for each, then seeds, clear losers left out.

The rules are fixed beforehand. The rate is the one of `make compare`'s rule, on a seed of its own; where that lies at
the edge of the grid, the next one beyond is tried, too. After two seeds a method whose pass rate is `LOSES` below the
best one's is left out; all others have five. So have the best of those with the matched KL, whatever their pass rate:
flow balance is judged against them.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from examples.compare import COMMON, NEAR_BEST, best_rate
from examples.staleness.methods import PARTS, Part
from examples.staleness.results import Results
from flowrl_mega.quickstart.trials import Figures, Trial, run_trials

RATES, LEAST, MOST = (1e-4, 2e-4, 5e-4, 1e-3), 2.5e-5, 4e-3
TUNING_SEED, SEEDS, FIRST = 100, (0, 1, 2, 3, 4), 2
LOSES = 0.1
MATCHED = "matched KL"  # in a name


class Stopped(RuntimeError):
    """The ranks ended with this exit code."""

    def __init__(self, code: int) -> None:
        super().__init__(f"the trials ended with exit code {code}")
        self.code = code


@dataclass(frozen=True)
class Study:
    """One part of the page on answers of one age. `steps`: of a run; None: the quick start's."""

    key: str
    ahead: int
    folder: Path
    results: Results
    steps: int | None = None
    jobs: int = 2

    @property
    def part(self) -> Part:
        return PARTS[self.key]

    @property
    def names(self) -> list[str]:
        return list(self.part.methods(self.ahead))

    def trial(self, name: str, rate: float, seed: int) -> Trial:
        own = self.part.methods(self.ahead)[name].overrides
        overrides = [f"optimizer.lr={rate:g}", *own, *self.part.overrides(self.ahead), *self._common()]
        return Trial(str(self._place(seed)), seed, f"{name} ahead {self.ahead} lr {rate:g}", overrides)

    def start(self, seed: int) -> Trial:
        """The warm start, which is the same for every age."""
        return Trial(str(self._place(seed)), seed, "start", [*self.part.overrides(0), *self._common()])

    def _place(self, seed: int) -> Path:
        return self.folder / self.key / f"seed_{seed}"

    def _common(self) -> list[str]:
        return [*COMMON, *([f"steps={self.steps}"] if self.steps is not None else [])]

    def run(self) -> None:
        """All of it, but for what has been run. Raises Stopped."""
        rate = self.part.rate
        if rate is not None:
            self.run_all([self.trial(name, rate, seed) for seed in SEEDS for name in self.names])
            return
        rates = self.tune()
        self.run_all([self.trial(name, rates[name], seed) for seed in SEEDS[:FIRST] for name in self.names])
        left = self.left(rates)
        self.run_all([self.trial(name, rates[name], seed) for seed in SEEDS[FIRST:] for name in left])

    def tune(self) -> dict[str, float]:
        """Every method's learning rate."""
        grids = {name: set(RATES) for name in self.names}
        while True:
            trials = [self.trial(name, rate, TUNING_SEED) for name, grid in grids.items() for rate in sorted(grid)]
            self.run_all(trials)
            found = {name: self.best(name, grid) for name, grid in grids.items()}
            wider = {name: beyond(grids[name], rate) for name, rate in found.items()}
            if not any(wider.values()):
                return found
            for name, more in wider.items():
                grids[name] |= more

    def best(self, name: str, grid: Iterable[float]) -> float:
        return best_rate({rate: self.figures(self.trial(name, rate, TUNING_SEED)) for rate in sorted(grid)})

    def left(self, rates: dict[str, float]) -> list[str]:
        """The methods that are no clear losers after the first seeds, and the best with the matched KL."""
        passed = {
            name: statistics.mean(
                self.figures(self.trial(name, rates[name], seed))["pass_rate"] for seed in SEEDS[:FIRST]
            )
            for name in self.names
        }
        matched = {name: value for name, value in passed.items() if MATCHED in name}
        near = [name for name, value in matched.items() if value >= max(matched.values()) - NEAR_BEST]
        return [name for name, value in passed.items() if value >= max(passed.values()) - LOSES or name in near]

    def figures(self, trial: Trial) -> Figures:
        found = self.results.figures(self.key, self.ahead, trial)
        assert found is not None, f"{trial.name}, seed {trial.seed}, has not been run"
        return found

    def run_all(self, trials: list[Trial]) -> None:
        """Those whose figures are not known yet, each seed's warm start before them."""
        ended = [t for t in trials if self.results.figures(self.key, self.ahead, t) is None and t.done]
        if ended:  # before the command was stopped
            self.results.add(self.key, self.ahead, ended)
        missing = [t for t in trials if self.results.figures(self.key, self.ahead, t) is None]
        if not missing:
            return
        starts = [start for start in map(self.start, sorted({t.seed for t in missing})) if not start.done]
        print(f"\n{self.key}, answers {self.ahead} steps old: {len(missing)} trials to run", flush=True)
        file = self.folder / self.key / f"trials_{self.ahead}.json"
        for some in filter(None, (starts, missing)):
            code = run_trials(some, file, side_by_side=True, timeout_s=None, ranks=self.jobs, may_diverge=True)
            self.results.add(self.key, self.ahead, [t for t in missing if t.done])
            if code:
                raise Stopped(code)


def beyond(grid: set[float], best: float) -> set[float]:
    """The next rate, where the best is the least or the greatest of those tried; none where that is far enough."""
    more = set()
    if best == min(grid) and best / 2 >= LEAST:
        more.add(best / 2)
    if best == max(grid) and best * 2 <= MOST:
        more.add(best * 2)
    return more
