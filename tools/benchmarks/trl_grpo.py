"""Time and memory of one GRPO step by TRL's GRPOTrainer on CPU: the yardstick for the same work by flowrl-mega.

    python tools/benchmarks/trl_grpo.py --model DIR [--prompts 16 --answers 16 --tokens 64 --threads 2 ...]

A step is: generate prompts x answers x tokens (no answer ends early), reward, advantage, one update. Prints one line
of JSON. Needs trl, accelerate and datasets, which `make setup-integration` installs.

How TRL is set up, and why, so that it is as fast as it can be here:
- float32 and no gradient checkpointing: the defaults (bf16, recomputation) save GPU memory and cost time on a CPU.
- beta 0: no reference model, no KL. One iteration and one update a batch: TRL then leaves out the forward pass of the
  old policy.
- all answers in one micro-batch; `--microbatch` splits the update (gradient accumulation) when a large vocabulary needs
  the memory; generation stays one batch.
- generation by transformers' generate(). The end token is suppressed (min_new_tokens), so that every answer has exactly
  --tokens tokens and the work is the same for both trainers.
- no logging, saving, evaluation or progress bar; a reward that costs nothing.
"""

import argparse
import importlib.util
import json
import os
import sys
from pathlib import Path

from workload import WARM_UP_STEPS

NEEDS = {"trl": "trl", "accelerate": "example", "datasets": "data"}  # packages, and the lists that pin them


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time and memory of one GRPO step by TRL's GRPOTrainer on CPU.")
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=16, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an answer")
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps, after {WARM_UP_STEPS} of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--microbatch", type=int, help="sequences a forward-backward (default: all)")
    parser.add_argument("--json", type=Path, help="also write the line to this file")
    return parser


def main() -> int:
    options = parser().parse_args()
    if missing := [name for name in NEEDS if not importlib.util.find_spec(name)]:
        lists = " ".join(f"-r requirements/{NEEDS[name]}.txt" for name in missing)
        print(
            f"trl_grpo: {sys.executable} has no {', '.join(missing)}. Install with make setup-integration, or with\n"
            f"  {sys.executable} -m pip install --no-deps {lists}",
            file=sys.stderr,
        )
        return 2
    sequences = options.prompts * options.answers
    if options.microbatch and sequences % options.microbatch:
        print(
            f"trl_grpo: --microbatch {options.microbatch} must divide --prompts x --answers = {sequences}",
            file=sys.stderr,
        )
        return 2
    from trl_grpo_work import measure  # seconds, so only after the arguments have been looked at

    line = json.dumps(measure(options))
    print(line)
    if options.json:
        options.json.write_text(line + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
