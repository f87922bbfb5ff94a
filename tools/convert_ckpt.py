"""Hugging Face folder <-> Megatron distributed checkpoint, and the proof that they are the same model.

    python tools/convert_ckpt.py hf2mcore --hf DIR --out DIR [--dtype bf16|fp32]
    python tools/convert_ckpt.py mcore2hf --ckpt DIR --out DIR
    python tools/convert_ckpt.py verify   --hf DIR --ckpt DIR [--tp N]

Under torchrun the ranks share the work (verify starts its own). Exit codes: 0 done, or the same; 1 verify found a
difference; 2 the input is wrong (one message, and nothing is left behind); anything else is a fault.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from flowrl_mega.config import ConfigError
from flowrl_mega.launched import speaks, started_by_launcher

DONE, DIFFERENT, BAD_INPUT, FAULT, INTERRUPTED = 0, 1, 2, 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _leave)  # as an exception, so that what is half written goes
    try:
        return verify(options, arguments) if options.command == "verify" else convert(options)
    except (ConfigError, PermissionError) as error:
        if speaks():
            print(f"convert_ckpt: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    except SystemExit:
        raise
    except BaseException:  # Python's own exit code would be 1; and torch's CheckpointException is no Exception
        traceback.print_exc()
        return FAULT
    finally:
        signal.signal(signal.SIGTERM, previous)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = parser.add_subparsers(dest="command", required=True)
    to_megatron = commands.add_parser("hf2mcore", help="Hugging Face folder to Megatron checkpoint", allow_abbrev=False)
    to_megatron.add_argument("--hf", type=Path, required=True, help="folder with config.json and *.safetensors")
    to_megatron.add_argument("--out", type=Path, required=True, help="checkpoint folder to be made")
    to_megatron.add_argument("--dtype", choices=("bf16", "fp32"), help="of the weights; default: as they are")
    to_hf = commands.add_parser("mcore2hf", help="Megatron checkpoint to Hugging Face folder", allow_abbrev=False)
    to_hf.add_argument("--ckpt", type=Path, required=True, help="converted checkpoint, or a run's checkpoints/step_N")
    to_hf.add_argument("--out", type=Path, required=True, help="model folder to be made")
    same = commands.add_parser("verify", help="are they the same model?", allow_abbrev=False)
    same.add_argument("--hf", type=Path, required=True)
    same.add_argument("--ckpt", type=Path, required=True)
    same.add_argument("--tp", type=int, default=1, help="tensor-parallel ranks that the checkpoint is loaded on")
    return parser


def convert(options: argparse.Namespace) -> int:
    import torch
    import torch.distributed as dist

    from flowrl_mega import checkpoint  # seconds, so only after the arguments have been looked at

    if started_by_launcher():
        dist.init_process_group("gloo", timeout=timedelta(days=1))  # the first to be done waits for the last
    if options.command == "hf2mcore":
        dtype = {None: None, "bf16": torch.bfloat16, "fp32": torch.float32}[options.dtype]
        checkpoint.hf_to_megatron(options.hf, options.out, dtype)
    else:
        checkpoint.megatron_to_hf(options.ckpt, options.out)
    if dist.is_initialized():
        dist.destroy_process_group()
    return DONE


def verify(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    import flowrl_mega.checkpoint  # noqa: F401  before torch is asked about devices
    from flowrl_mega.checkpoint import verify as check
    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.parallel.launch import launch

    check.check_inputs(options.hf, options.ckpt, options.tp)
    if not started_by_launcher():
        return launch([sys.executable, __file__, *arguments], options.tp, agreed=(DIFFERENT, BAD_INPUT))
    logits = check.compare_logits(options.hf, options.ckpt, options.tp)
    count, tensor = check.compare_tensors(options.hf, options.ckpt)
    same = logits.size < check.TOLERANCE and not tensor.size
    if os.environ["RANK"] == "0":
        equal = "all equal" if not tensor.size else f"largest difference {tensor.size:.3g} at {tensor.where}"
        print(f"tensors  {count} compared: {equal}")
        print(
            f"logits   largest difference {logits.size:.2g} of the largest logit (allowed: {check.TOLERANCE:.0e}) "
            f"at {logits.where}"
        )
        print("the same model" if same else "NOT the same model")
    layouts.shutdown()
    return DONE if same else DIFFERENT


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
