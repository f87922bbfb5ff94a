"""The command line: `flowrl-mega train | eval | ablate | reproduce | serve CONFIG.yaml [--section.field=value ...]`,
`flowrl-mega quickstart [--section.field=value ...]` and `flowrl-mega report RUN [RUN ...]`.

Exit codes:

0    done
2    the input or the settings are wrong (one message, no traceback)
70   the run cannot go on (one message, no traceback)
75   stopped on request (SIGTERM, or SIGHUP from a closed terminal), with a checkpoint saved
130  interrupted (Ctrl-C)
else the program failed; the traceback is on stderr. 128 + N: signal N ended a rank

Every rank of a job ends with the code of the job's first fault. `ablate` ends with that of the first run that failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError, RunError
from flowrl_mega.config_file import load_config, load_eval_config
from flowrl_mega.hangup import outlive_the_terminal, stop_signals
from flowrl_mega.launched import speaks, started_by_launcher

BAD_INPUT, CANNOT_GO_ON, INTERRUPTED = 2, 70, 130
SETTINGS = "YAML file of settings; --section.field=value changes one of them"
STAGES = ("fetch", "data", "train", "convert", "evaluate", "report")  # of a study


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options, overrides = _parser().parse_known_args(arguments)
    options.arguments, options.overrides = arguments, overrides
    stop = StopRequest()
    try:
        code: int = options.run(options, stop)
        return code
    except (ConfigError, RunError) as error:
        # Settings are read before the ranks of torchrun or srun meet, and all find the same: the first one says so.
        if speaks():
            print(f"flowrl-mega: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ConfigError) else CANNOT_GO_ON
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        stop.withdraw()


# Commands import what they need themselves: torch and megatron take seconds, and wrong settings are told before that.


def _quickstart(options: argparse.Namespace, stop: StopRequest) -> int:
    from flowrl_mega.quickstart.run import quickstart

    return quickstart(options.overrides, options.seeds, stop)


def _train(options: argparse.Namespace, stop: StopRequest) -> int:
    config = load_config(options.config, options.overrides)
    from flowrl_mega import job
    from flowrl_mega.faults import run_as_rank

    train = partial(job.train, config, options.arguments, options.resume, options.dry_run, options.checked, stop)
    return run_as_rank(train, Path(config.run_dir)) if started_by_launcher() else train()


def _eval(options: argparse.Namespace, stop: StopRequest) -> int:
    config = load_eval_config(options.config, options.overrides)
    from flowrl_mega.benchmark.run import evaluate
    from flowrl_mega.faults import run_as_rank

    run = partial(evaluate, config, options.arguments, options.regrade, options.dry_run, options.checked, stop)
    code = run_as_rank(run, Path(config.run_dir)) if started_by_launcher() else run()
    is_first = os.environ.get("RANK", "0") == "0" and not options.checked  # of ranks that we start, we are the one
    if code == 0 and is_first and not options.dry_run:
        from flowrl_mega.report.command import PAGE, end_with_page

        end_with_page([Path(config.run_dir)], Path(config.run_dir, PAGE))
    return code


def _ablate(options: argparse.Namespace, stop: StopRequest) -> int:
    from flowrl_mega.ablation.run import ablate

    return ablate(options.config, options.overrides, options.vary, options.seeds, options.dry_run, stop)


def _reproduce(options: argparse.Namespace, stop: StopRequest) -> int:
    if options.overrides:
        raise ConfigError(f"{options.overrides[0]}: a study is changed in its file; reproduce takes no settings")
    from flowrl_mega.reproduce.run import reproduce

    return reproduce(options.config, options.stage, options.data, options.dry_run, options.submit, stop)


def _report(options: argparse.Namespace, stop: StopRequest) -> int:
    if options.overrides:
        raise ConfigError(
            f"{options.overrides[0]}: no option of report; its options are --out FILE and --watch SECONDS"
        )
    from flowrl_mega.report.command import report

    return report(options.runs, options.out, options.watch, stop)


def _serve(options: argparse.Namespace, stop: StopRequest) -> int:
    config = load_config(options.config, options.overrides)
    from flowrl_mega import job

    return job.serve(config, options.host, options.port, stop)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="flowrl-mega", description="FlowRL on Megatron-core.", allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for add in (_add_quickstart, _add_train, _add_eval, _add_ablate, _add_reproduce, _add_report, _add_serve):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., int], about: str, more: str | None = None, file: str = SETTINGS
) -> argparse.ArgumentParser:
    """A command whose `run` is called with its options; `file` is the YAML file that it takes."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=about, description=more, allow_abbrev=False)
    command.set_defaults(run=run)
    command.add_argument("config", type=os.path.expanduser, help=file)
    return command


def _add_quickstart(commands: Any) -> None:
    quickstart = commands.add_parser(
        "quickstart",
        help="GRPO and FlowRL from one warm start: a table, a picture, a page; needs no model, data or GPU",
        description="Trains a small Llama from scratch on a task with many right answers a prompt and, from that one "
        "warm start, GRPO, GRPO with a KL term and FlowRL, about three minutes of two cores a seed. Writes "
        "RUN_DIR/summary.json, quickstart.png and report.html, beside every run; RUN_DIR is runs/quickstart in the "
        "current folder. An earlier quick start there is replaced. --section.field=value changes a setting of every "
        "method, --objective.field=value one of FlowRL's.",
        allow_abbrev=False,
    )
    quickstart.set_defaults(run=_quickstart)
    quickstart.add_argument("--seeds", type=int, default=1, help="how often, with seeds 0, 1, ...: the spread (1)")


def _add_train(commands: Any) -> None:
    train = _command(commands, "train", _train, "train from a YAML file of settings")
    train.add_argument(
        "--resume",
        default="auto",
        type=os.path.expanduser,
        help="auto (the run folder's newest checkpoint), never, or a folder",
    )
    _can_be_dry(train)
    _starts_ranks(train)


def _add_eval(commands: Any) -> None:
    evaluate = _command(
        commands,
        "eval",
        _eval,
        "a model on benchmarks: every answer kept, avg@k, pass@k, maj@k",
        "Has a model, or a running server, answer benchmarks. Run again, it goes on with what is missing. Writes "
        "RUN_DIR/samples.jsonl, scores.json and scores.md.",
    )
    evaluate.add_argument(
        "--regrade", action="store_true", help="grade the stored answers again, without a model, and score them"
    )
    _can_be_dry(evaluate)
    _starts_ranks(evaluate)


def _add_ablate(commands: Any) -> None:
    ablate = _command(
        commands,
        "ablate",
        _ablate,
        "a grid of settings, some seeds each: one table, one plot",
        "Trains once for each combination of the varied settings and each seed, in RUN_DIR/CELL/seed_K, one after the "
        "other; run again, it goes on. Writes RUN_DIR/ablation.md, ablation.json and ablation.png.",
    )
    ablate.add_argument(
        "--vary",
        action="append",
        required=True,
        metavar="NAME=V1,V2,...",
        help="a setting and its values, read as YAML; repeated: all combinations. Values with commas: 'NAME=[V1, V2]', "
        "as in 'objective=[{name: grpo}, {name: flowrl, beta: 6}]'; settings that change together: "
        "'NAME+NAME=[[V, V], ...]'",
    )
    ablate.add_argument("--seeds", type=int, default=3, help="runs per combination, with seed, seed + 1, ... (3)")
    _can_be_dry(ablate)


def _add_reproduce(commands: Any) -> None:
    again = _command(
        commands,
        "reproduce",
        _reproduce,
        "a published table made again: fetch, data, train, evaluate, report",
        "Runs the stages of a study (examples/studies/) that are not done yet. Run again, it goes on.",
        file="YAML file of a study",
    )
    again.add_argument("--stage", nargs="+", choices=STAGES, help="only these (all)")
    again.add_argument("--data", help="folder with NAME.jsonl of the benchmarks; else they are fetched from the hub")
    again.add_argument("--submit", action="store_true", help="hand the stages to SLURM as a chain of jobs, and return")
    _can_be_dry(again)


def _add_report(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="runs as one HTML page: curves, log Z, residuals, answers, warnings",
        description="Writes one HTML file that needs nothing beside it, of one run or of several next to each other "
        "(runs that differ in their seed alone are one method). Folders of eval and reproduce work, too.",
        allow_abbrev=False,
    )
    report.set_defaults(run=_report)
    report.add_argument("runs", nargs="+", type=os.path.expanduser, metavar="RUN", help="folder of a run")
    report.add_argument(
        "--out", type=os.path.expanduser, metavar="FILE", help="the page (report.html in the folder of the first run)"
    )
    report.add_argument(
        "--watch",
        nargs="?",
        const=15.0,
        type=_seconds,
        metavar="SECONDS",
        help="renew the page while the run goes on, every so many seconds (15), until Ctrl-C; put it behind RUN",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds; put RUN before --watch") from None
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} seconds: must be above 0")
    return seconds


def _add_serve(commands: Any) -> None:
    serve = _command(commands, "serve", _serve, "start the servers of rollout.* alone, on this node")
    serve.add_argument(
        "--host",
        help="address to listen on; 0.0.0.0 lets other hosts connect (127.0.0.1; with rollout.nodes the node's own)",
    )
    serve.add_argument("--port", type=int, help="port of the first server; the others take the ports after it")


def _can_be_dry(command: argparse.ArgumentParser) -> None:
    command.add_argument("--dry-run", action="store_true", help="check everything, print what would run, and stop")


def _starts_ranks(command: argparse.ArgumentParser) -> None:
    command.add_argument("--checked", action="store_true", help=argparse.SUPPRESS)  # given to ranks that we start


class StopRequest:
    """True once SIGTERM or SIGHUP has come, which ask to save at the end of this step and stop; also one during the
    imports."""

    def __init__(self) -> None:
        self.received = False
        self._previous = {number: signal.signal(number, self._receive) for number in stop_signals()}

    def _receive(self, number: int, frame: object) -> None:
        self.received = True
        if number == signal.SIGHUP:
            outlive_the_terminal()

    def __call__(self) -> bool:
        return self.received

    def withdraw(self) -> None:
        """Restore the previous handlers; one that was installed meanwhile stays."""
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)


if __name__ == "__main__":
    sys.exit(main())
