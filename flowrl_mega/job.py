"""From checked settings to a job: start the ranks or be one; or the servers alone."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from flowrl_mega.checkpoint import find_checkpoint, is_megatron, step_of
from flowrl_mega.config import Config, ConfigError
from flowrl_mega.host_checks import check_gpus, check_hosts
from flowrl_mega.launched import started_by_launcher
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.precision import row_alignment
from flowrl_mega.network import LIMIT_S, check_interfaces, check_network
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.launch import launch, rank_environment
from flowrl_mega.preflight import Inputs, check, check_ops_of_ranks, describe, ranks_to_start
from flowrl_mega.run import Run
from flowrl_mega.run_lock import is_locked, run_lock

DONE, STOPPED = 0, 75


def train(
    config: Config, arguments: list[str], resume: str, dry_run: bool, checked: bool, stop_requested: Callable[[], bool]
) -> int:
    """The `train` command; returns the exit code. `arguments` are the command line's, for ranks that we start.

    `checked`: this is a rank whose parent has already checked everything, and holds the run folder's lock. Of ranks
    that others started the first one holds it, before the checks: what they find must not change until the run begins.
    """
    holds = not checked and not dry_run and (not started_by_launcher() or os.environ["RANK"] == "0")
    with run_lock(Path(config.run_dir)) if holds else nullcontext():
        return _train(config, arguments, resume, dry_run, checked, stop_requested)


def _train(
    config: Config, arguments: list[str], resume: str, dry_run: bool, checked: bool, stop_requested: Callable[[], bool]
) -> int:
    is_rank = started_by_launcher()
    world = int(os.environ["WORLD_SIZE"]) if is_rank else ranks_to_start(config)
    if config.parallel.tp > 1:
        # One queue of kernels, from before CUDA starts: with more, those of a collective that Megatron and Transformer
        # Engine let overlap a GEMM may come to run after it.
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    checkpoint = find_checkpoint(Path(config.run_dir), resume)
    first_rank = os.environ.get("RANK", "0") == "0"
    inputs = Inputs(config)
    if not checked:
        if (warning := check_gpus()) and first_rank:
            print(f"flowrl-mega: {warning}", file=sys.stderr)
        check(inputs, world, resume, checkpoint, one_of_many=is_rank)
        if inputs.reward_description and not dry_run:
            _say(f"rewards: {inputs.reward_description}", first_rank)
    if dry_run:
        _say(describe(inputs, world, checkpoint), first_rank)
        return DONE
    if checkpoint and step_of(checkpoint) >= config.steps:
        done = f"{checkpoint} is of step {step_of(checkpoint)} of {config.steps}: this run is finished"
        _say(f"{done}; raise steps to go on", first_rank)
        return DONE
    if world > 1:
        check_interfaces()
    if is_rank or world == 1:
        return run_rank(inputs, checkpoint, stop_requested)
    if stop_requested():
        return STOPPED
    found = ["--checked", f"--resume={checkpoint or 'never'}"]
    return launch([sys.executable, "-m", "flowrl_mega.cli", *arguments, *found], world)


def run_rank(inputs: Inputs, checkpoint: Path | None, stop_requested: Callable[[], bool]) -> int:
    """Train as one rank of a job, in torchrun's environment or alone."""
    if "RANK" not in os.environ:
        os.environ.update(rank_environment(0, 1))
    config = inputs.config
    layout = layouts.init(config.parallel, config.seed, row_alignment(config.model, config.parallel.sequence_parallel))
    if layout.world > 1:
        check_hosts(config, inputs.arch)
        for line in check_network(layout, min(LIMIT_S, 0.9 * config.parallel.timeout_s)):
            if layout.rank == 0:
                print(f"flowrl-mega: {line}", file=sys.stderr)
    check_ops_of_ranks(config.ops.backend, layout)
    run = Run(inputs, layout, checkpoint)
    try:
        finished = run.run(stop_requested)
    finally:
        run.close()
    layouts.shutdown()
    return DONE if finished else STOPPED


def serve(config: Config, host: str | None, port: int | None, stop_requested: Callable[[], bool]) -> int:
    """The `serve` command: the fleet alone, with the weights of model.path, until it is told to stop.

    With rollout.nodes it is one of so many nodes that serve a run, which finds it; told to stop while that run is under
    way, it goes on until the run ends, whose last step needs it.
    """
    from flowrl_mega.rollout.nodes import own_address
    from flowrl_mega.rollout.sglang import announced
    from flowrl_mega.rollout.sglang.flags import check_servers
    from flowrl_mega.rollout.sglang.fleet import Fleet, supervise

    rollout = config.rollout
    if not isinstance(rollout.servers, int):
        raise ConfigError(f"rollout.servers = {rollout.servers}: says where servers run; to start some, give how many")
    if is_megatron(config.model.path):
        raise ConfigError(
            f"model.path = {config.model.path!r}: a Megatron checkpoint, which servers cannot read; convert it first: "
            "python tools/convert_ckpt.py mcore2hf --ckpt ... --out ..."
        )
    read_architecture(config.model.path)
    print(check_servers(rollout), flush=True)
    model, run_dir = Path(config.model.path), Path(config.run_dir)
    folder, where, stop = run_dir / "servers", host or "127.0.0.1", stop_requested
    ports = list(range(port, port + rollout.servers)) if port else []
    if rollout.nodes:
        if host == "0.0.0.0" or not (host or os.environ.get("MASTER_ADDR")):
            raise ConfigError(
                f"--host = {host}: the run is told of one address of this node; name it, or set MASTER_ADDR to a host "
                "of the trainer's"
            )
        folder, where = folder / announced.node_name(), host or own_address()
        before = announced.ports_of(run_dir)
        ports = ports or (before if len(before) == rollout.servers else [])
        stop = lambda: stop_requested() and not is_locked(run_dir)  # noqa: E731
    fleet = Fleet(rollout, model, folder, config.model.dtype, 0, load_format="auto", host=where, ports=ports)
    try:
        fleet.start(stop)
        with announced.announced(run_dir, fleet.urls) if rollout.nodes else nullcontext():
            how = f"nodes={rollout.nodes}" if rollout.nodes else f"servers='[{', '.join(fleet.urls)}]'"
            print(f"ready; to train with them: --rollout.{how}", flush=True)
            supervise(fleet, stop)
    finally:
        fleet.close()
    return DONE


def _say(text: str, first_rank: bool) -> None:
    if first_rank:
        print(text)
