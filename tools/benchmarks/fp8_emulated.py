"""What FP8 does to the log-probs of a real model, emulated on a CPU: where the default of model.fp8_budget comes from.

    python tools/benchmarks/fp8_emulated.py --model path/to/SmolLM2 [--json FILE]

The model answers some questions by its own sampling in fp32. The same answers are then scored by transformers in bf16,
with what goes into each linear layer (but the head's), inputs and weights, rounded as a recipe rounds it. Products are
those of bf16: only the rounding is Transformer Engine's, none of its kernels.
"""

from __future__ import annotations

import argparse

from workload import machine, write


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Hugging Face model folder, with a chat template")
    parser.add_argument("--tokens", type=int, default=48, help="tokens an answer, at most")
    parser.add_argument("--json", help="results file")
    return parser


def main() -> None:
    options = parser().parse_args()
    from fp8_emulated_work import measure  # seconds, so only after the arguments have been looked at

    rows = measure(options.model, options.tokens)
    for row in rows:
        figures = f"{row['abs_logp']:.4f} a token, {row['fp8_delta_diff']:.4f} residual"
        print(f"{row['way']:<24} against {row['against']}: {figures}")
    write(options.json, machine("torch", "transformers"), rows)


if __name__ == "__main__":
    main()
