"""A real SGLang server for tests, with the settings that a small machine without GPU wants."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowrl_mega.config import RolloutSettings
from flowrl_mega.rollout.sglang.fleet import Fleet

SERVER_PYTHON = Path(__file__).resolve().parents[2] / ".venv-sglang" / "bin" / "python"
# Keys and values of all requests under way must fit into max_total_tokens; by itself SGLang takes all memory.
SMALL = {"max_total_tokens": 16384, "mem_fraction_static": 0.3, "max_running_requests": 64, "skip_server_warmup": True}


def server_python() -> str:
    """The interpreter that has sglang; a test that needs it fails where it is missing."""
    assert SERVER_PYTHON.exists(), "no .venv-sglang; `make setup-sglang` makes it"
    return str(SERVER_PYTHON)


def server_settings(servers: int = 1, **server_args: Any) -> RolloutSettings:
    return RolloutSettings(
        engine="sglang",
        servers=servers,
        python=server_python(),
        server_args={**SMALL, **server_args},
        start_timeout_s=600,
    )


def start_server(
    folder: Path, model: Path, dtype: str = "fp32", load_format: str = "auto", **server_args: Any
) -> Fleet:
    """A fleet of one, ready; the caller closes it. `load_format` auto: with the weights of `model`."""
    fleet = Fleet(server_settings(**server_args), model, folder, dtype, trainer_gpus=0, load_format=load_format)
    fleet.start()
    return fleet
