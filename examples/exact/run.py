"""Every objective and every FlowRL variant, trained by the real trainer where the right end is known exactly.

    python -m examples.exact.run [--seeds 1] [--jobs 2] [--only 'plain-*']

A result a run goes to runs/exact/seed_N/ROW.json; what is there already is not run again. With all of them it writes
the tables of docs/results/exact.md, docs/images/log_z.png and tools/benchmarks/results/exact.json.
"""

from __future__ import annotations

import argparse
import sys


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.exact.run", description="Every objective on a space small enough to enumerate."
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a process each")
    parser.add_argument("--only", default="*", help="rows whose name fits this pattern; no page is written then")
    return parser


def main() -> int:
    options = parser().parse_args()
    from examples.exact import table  # seconds, so only after the arguments have been looked at

    table.make(options.seeds, options.jobs, options.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
