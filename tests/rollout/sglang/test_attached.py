"""Servers that others run are refused before the first step when the job cannot use them, each with what to do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from stand_in import StandIn

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.model.architecture import Architecture, read_architecture
from flowrl_mega.parallel.launch import reserve_port
from flowrl_mega.rollout.sglang.attached import check_attached


@pytest.fixture(scope="module")
def arch(tiny_llama: Path) -> Architecture:
    return read_architecture(tiny_llama)


def check(arch: Architecture, *urls: str, context: int = 100, **settings: Any) -> str:
    return check_attached(RolloutSettings(engine="sglang", servers=list(urls), **settings), arch, context)


def test_says_what_it_found(stand_in, arch):
    """For the dry run: where, which version, how long a context; a router and what is behind it."""
    first, second, router = stand_in(), stand_in(), stand_in()
    router.workers = [second.url]
    words = check(arch, first.url, router.url, context=128)
    assert words == (
        f"2 running elsewhere: {first.url} (SGLang 0.5.23, context 128); {second.url} (SGLang 0.5.23, context 128), "
        f"through {router.url}"
    )


def test_nobody_there(arch):
    """The URL, and what to look at."""
    with reserve_port() as reserved:
        url = f"http://127.0.0.1:{reserved.getsockname()[1]}"
        with pytest.raises(ConfigError, match=rf"rollout.servers: {url}: .*is the server up"):
            check(arch, url)


def test_the_key_is_asked_for(stand_in, arch, tmp_path):
    """None where one is needed, another one, and the right one; it is sent as a bearer token."""
    server = stand_in(key="secret")
    with pytest.raises(ConfigError, match=rf"{server.url} asks for a key; set rollout.api_key_file"):
        check(arch, server.url)
    file = tmp_path / "key"
    file.write_text("other\n")
    with pytest.raises(ConfigError, match=rf"{server.url} does not take the key in rollout.api_key_file"):
        check(arch, server.url, api_key_file=str(file))
    file.write_text("secret\n")
    assert server.url in check(arch, server.url, api_key_file=str(file))
    file.write_text("two words")
    with pytest.raises(ConfigError, match="must hold the key and nothing else"):
        check(arch, server.url, api_key_file=str(file))


@pytest.mark.parametrize("path", ["do_model_info", "do_server_info"])
def test_something_else_than_sglang(path, stand_in, arch, monkeypatch):
    """Another program at this URL has other paths."""
    monkeypatch.delattr(StandIn, path)
    server = stand_in()
    with pytest.raises(ConfigError, match=rf"{server.url} is no SGLang server: it has no /{path[3:]}"):
        check(arch, server.url)


def test_a_context_that_is_too_short(stand_in, arch):
    """Exactly enough is enough."""
    server = stand_in(context=60)
    assert "context 60" in check(arch, server.url, context=60)
    with pytest.raises(ConfigError, match=rf"{server.url} takes 60 tokens, but .* are 61; .*data.max_prompt_tokens"):
        check(arch, server.url, context=61)


@pytest.mark.parametrize("name, value", [("vocab_size", 102), ("hidden_size", 64), ("num_hidden_layers", 3)])
def test_another_model_by_its_config(name, value, stand_in, arch, tiny_llama, tmp_path):
    """Where the folder that it was started from can be read here, its config.json tells all; the folder of its last
    update from disk, which /model_info gives, may be gone."""
    config = json.loads((tiny_llama / "config.json").read_text())
    server = stand_in(model_path=str(tiny_llama))
    assert check(arch, server.url)
    (tmp_path / "config.json").write_text(json.dumps(config | {name: value}))
    server.started_with, server.model_path = str(tmp_path), "gone"
    ours = config[name]
    with pytest.raises(ConfigError, match=rf"{server.url} serves another model.*its {name} is {value}, .* is {ours};"):
        check(arch, server.url)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"hidden": 64}, "its hidden_size is 64, that of model.path is 32"),
        ({"layers": 1}, "its num_hidden_layers is less, that of model.path is 2"),
        ({"layers": 3}, "its num_hidden_layers is more, that of model.path is 2"),
        ({"model_type": "qwen2"}, "its model_type is qwen2, that of model.path is llama"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_another_model_by_its_weights(options, message, stand_in, arch):
    """On another host, its weights tell the width and the depth."""
    server = stand_in(**options)
    with pytest.raises(ConfigError, match=message):
        check(arch, server.url)


def test_a_server_twice(stand_in, arch):
    """It would get twice its share, and its weights twice; by itself and behind a router, too."""
    server, router = stand_in(), stand_in()
    router.workers = [server.url]
    for urls in ([server.url, server.url + "/"], [server.url, router.url]):
        with pytest.raises(ConfigError, match=rf"{server.url} is there twice"):
            check(arch, *urls)


def test_a_router_without_servers(stand_in, arch):
    """It answers, but nobody would answer the prompts."""
    router = stand_in()
    router.workers = []
    with pytest.raises(ConfigError, match=rf"{router.url} is a router without servers"):
        check(arch, router.url)
