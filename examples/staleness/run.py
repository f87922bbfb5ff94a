"""What survives stale data: methods on answers 0, 8, 16 and 64 steps old, and on longer ones, each tuned alike.

    python -m examples.staleness.run [--part age --ahead 0 8 16 64]      goes on where it was stopped

What a trial came to is kept in tools/benchmarks/results/staleness.json; one that is there is not run again. With
--page nothing is run, and docs/results/staleness.md gets its tables and its picture.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

RESULTS, FOLDER = Path("tools/benchmarks/results/staleness.json"), Path("runs/staleness")


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.staleness.run", description="What survives stale data, in the real trainer."
    )
    parser.add_argument("--part", default="age", help="age, length-24, length-96 or updates")
    parser.add_argument("--ahead", type=int, nargs="*", help="steps that answers are old; none named: all of the part")
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time, a core each")
    parser.add_argument("--steps", type=int, help="of a run; not given: the quick start's")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--page", action="store_true", help="run nothing: write the page from the results")
    return parser


def main() -> int:
    options = parser().parse_args()
    from examples.staleness import page  # seconds, so only after the arguments have been looked at
    from examples.staleness.methods import PARTS
    from examples.staleness.results import Results
    from examples.staleness.study import Stopped, Study

    if options.part not in PARTS:
        sys.exit(f"staleness: --part {options.part}: one of {', '.join(PARTS)}")
    results = Results(options.results)
    if not options.page:
        for ahead in options.ahead or PARTS[options.part].ahead:
            try:
                Study(options.part, ahead, FOLDER, results, options.steps, options.jobs).run()
            except Stopped as stopped:
                print(f"staleness: {stopped}; the same command goes on", file=sys.stderr)
                return stopped.code
    page.write(results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
