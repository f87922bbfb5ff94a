"""What the real SGLang answers to requests that we make, as files that the stand-in is compared with.

    python tests/rollout/record.py URL [--out tests/rollout/recordings]

Only what does not change from call to call is kept, so that recording again gives the same files.
"""

from __future__ import annotations

import argparse
import json
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, NamedTuple

FOLDER = Path(__file__).with_name("recordings")
PARAMS = {"max_new_tokens": 3, "temperature": 0.7, "top_p": 1.0, "top_k": -1, "stop_token_ids": [1],
          "ignore_eos": False, "skip_special_tokens": False, "sampling_seed": 5}  # fmt: skip
ENDLESS = {**PARAMS, "stop_token_ids": [], "ignore_eos": True}
ANY_STOP = {**PARAMS, "stop_token_ids": list(range(101))}  # so the first token is one


def asking(*params: dict[str, Any], prompt: Any = (2, 3, 4)) -> dict[str, Any]:
    return {"input_ids": [list(prompt)] * len(params), "sampling_params": list(params), "return_logprob": True}


class Ask(NamedTuple):
    path: str
    body: Any = None  # None: GET
    read: tuple[str, ...] = ()  # of an answer with hundreds of entries: those that we read


REQUESTS = {
    "model_info": Ask("/model_info", read=("model_path", "weight_version", "model_type", "architectures")),
    "server_info": Ask("/server_info", read=("version", "model_path", "device", "dtype", "tp_size")),
    "models": Ask("/v1/models"),
    "health": Ask("/health"),
    "workers": Ask("/workers"),
    "no_such_path": Ask("/nonsense", {}),
    "weight": Ask("/get_weights_by_name", {"name": "model.embed_tokens.weight", "truncate_size": 1}),
    "weight_of_norm": Ask(
        "/get_weights_by_name", {"name": "model.layers.1.input_layernorm.weight", "truncate_size": 1}
    ),
    "no_such_weight": Ask(
        "/get_weights_by_name", {"name": "model.layers.2.input_layernorm.weight", "truncate_size": 1}
    ),
    "answer": Ask("/generate", asking(ENDLESS)),
    "answers": Ask("/generate", asking(ENDLESS, {**ENDLESS, "sampling_seed": 6})),
    "stopped": Ask("/generate", asking(ANY_STOP)),
    "one_of_a_router": Ask("/generate", {**asking(ENDLESS), "input_ids": [2, 3, 4], "sampling_params": ENDLESS}),
    "too_long": Ask("/generate", asking({**ENDLESS, "max_new_tokens": 126})),
    "unknown_field": Ask("/generate", asking({**ENDLESS, "nonsense": 1})),
    "no_ids": Ask("/generate", asking(ENDLESS, prompt=["a"])),
    "abort": Ask("/abort_request", {"abort_all": True}),
    "pause": Ask("/pause_generation", {"mode": "retract"}),
    "continue": Ask("/continue_generation", {}),
    "end_without_begin": Ask("/end_weight_update", {}),
    "update_without_begin": Ask("/update_weights_from_tensor", {"serialized_named_tensors": [""], "flush_cache": True}),
    "begin": Ask("/begin_weight_update", {}),
    "begin_twice": Ask("/begin_weight_update", {}),
    "end": Ask("/end_weight_update", {}),
    "flush": Ask("/flush_cache?timeout=5", {}),
    "release": Ask("/release_memory_occupation", {"tags": ["kv_cache", "weights"]}),
    "resume": Ask("/resume_memory_occupation", {"tags": ["weights", "kv_cache"]}),
}


def ask(url: str, request: Ask) -> dict[str, Any]:
    """The status and what the answer is like."""
    data = None if request.body is None else json.dumps(request.body).encode()
    call = urllib.request.Request(url + request.path, data, {"Content-Type": "application/json"})
    try:
        with urllib.request.urlopen(call, timeout=60) as answer:
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read()
    try:
        found = json.loads(text) if text.strip() else None
    except ValueError:
        found = "no JSON"
    if request.read:
        found = {name: found[name] for name in request.read}
    return {"status": status, "answer": likeness(found)}


UNREAD = {"cached_tokens_details"}  # there or not, as the cache has it
SHOWN = {"message", "type"}  # what we, or people, read; longer ones have paths and numbers in them


def likeness(value: Any, name: str = "") -> Any:
    """The types and names in a JSON value, without what is in it. Of a list the first item stands for all."""
    if isinstance(value, dict):
        return {name: likeness(part, name) for name, part in sorted(value.items()) if name not in UNREAD}
    if isinstance(value, list):
        return [likeness(value[0]), f"{len(value)} in all"] if value else []
    if isinstance(value, str) and name in SHOWN and len(value) < 100:
        return f"text: {value}"
    return {str: "text", bool: "bool", int: "integer", float: "number"}.get(type(value), value)


def main() -> None:
    parser = argparse.ArgumentParser(description="Record what a real SGLang server answers.")
    parser.add_argument("url", help="of a server with the model of tests/tiny_models.py (llama)")
    parser.add_argument("--out", type=Path, default=FOLDER)
    options = parser.parse_args()
    options.out.mkdir(exist_ok=True)
    for name, request in REQUESTS.items():
        record = {"path": request.path, "body": request.body, **ask(options.url, request)}
        (options.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
