"""The command line: `flowrl-mega train | ablate | serve CONFIG.yaml [--section.field=value ...]`.

Exit codes: 0 done; 2 the input or the settings are wrong (one message, no traceback); 70 the run cannot go on (one
message); 75 stopped on request with a checkpoint saved; 130 interrupted (Ctrl-C); anything else is a fault. `ablate`
ends with that of the first run that failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence

from flowrl_mega.config import ConfigError, RunError
from flowrl_mega.config_file import load_config

BAD_INPUT, CANNOT_GO_ON, INTERRUPTED = 2, 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = _parser().parse_known_args(arguments)
    stop = StopRequest()
    try:
        if options.command == "ablate":
            from flowrl_mega.ablation.run import ablate

            return ablate(options.config, overrides, options.vary, options.seeds, options.dry_run, stop)
        config = load_config(options.config, overrides)
        from flowrl_mega import job  # torch and megatron take seconds: only now, so that a wrong YAML is told at once

        if options.command == "serve":
            return job.serve(config, options.host, options.port, stop)
        return job.train(config, arguments, options.resume, options.dry_run, options.checked, stop)
    except (ConfigError, RunError) as error:
        # srun's name, too: settings are read before anything translates it, and one message of a job is enough.
        if os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0":
            print(f"flowrl-mega: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ConfigError) else CANNOT_GO_ON
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        stop.withdraw()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowrl-mega", description="FlowRL on Megatron-core.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train", help="train from a YAML file of settings", allow_abbrev=False)
    ablate = commands.add_parser(
        "ablate",
        help="a grid of settings, some seeds each: one table, one plot",
        description="Trains once for each combination of the varied settings and each seed, in RUN_DIR/CELL/seed_K, "
        "one after the other; run again, it goes on. Writes RUN_DIR/ablation.md, ablation.json and ablation.png.",
        allow_abbrev=False,
    )
    serve = commands.add_parser("serve", help="start the servers of rollout.* alone", allow_abbrev=False)
    for command in (train, ablate, serve):
        command.add_argument("config", help="YAML file of settings; --section.field=value changes one of them")
    ablate.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="NAME=V1,V2,...",
        help="a setting and its values, read as YAML; repeated: all combinations. Values with commas: 'NAME=[V1, V2]', "
        "as in 'objective=[{name: grpo}, {name: flowrl, beta: 6}]'; settings that change together: "
        "'NAME+NAME=[[V, V], ...]'",
    )
    ablate.add_argument("--seeds", type=int, default=3, help="runs of each combination: seed, seed + 1, ... (3)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0: for trainers elsewhere too")
    serve.add_argument("--port", type=int, help="the first server's; the others have those after it")
    train.add_argument("--resume", default="auto", help="auto (the run folder's newest checkpoint), never, or a folder")
    for command in (train, ablate):
        command.add_argument("--dry-run", action="store_true", help="check everything, say what would run, and stop")
    train.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # said to ranks that we start
    return parser


class StopRequest:
    """Remembers SIGTERM, which means: save at the end of this step, and stop. Even one that comes while we import."""

    def __init__(self) -> None:
        self.received = False
        self._previous = signal.signal(signal.SIGTERM, self._receive)

    def _receive(self, number: int, frame: object) -> None:
        self.received = True

    def __call__(self) -> bool:
        return self.received

    def withdraw(self) -> None:
        signal.signal(signal.SIGTERM, self._previous)


if __name__ == "__main__":
    sys.exit(main())
