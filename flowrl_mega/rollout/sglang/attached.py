"""Servers that others run: found behind their URLs, and refused if the job cannot use them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any, Literal, cast

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.rollout.health import Gateway, ServerState
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.sglang.endpoints import SglangRouter, SglangServer

ASK_S = 20.0  # time-out of each request


def read_key(settings: RolloutSettings) -> str | None:
    """The servers' key from `rollout.api_key_file`, if it is set; ConfigError if the file cannot be used."""
    return read_key_file(settings.api_key_file, "rollout.api_key_file")


def read_key_file(file: str | None, setting: str) -> str | None:
    if file is None:
        return None
    try:
        key = Path(file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{setting} = {file!r}: cannot be read ({error})") from None
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(f"{setting} = {file!r}: must hold the key and nothing else")
    return key


def check_attached(settings: RolloutSettings, arch: Architecture, needed_context: int) -> str:
    """A description of the servers at `rollout.servers`; ConfigError if the job cannot use one of them.

    `needed_context`: tokens of the longest prompt and the longest answer together.
    """
    assert isinstance(settings.servers, list)
    return asyncio.run(_check(settings, arch, needed_context, read_key(settings)))


async def _check(settings: RolloutSettings, arch: Architecture, needed_context: int, key: str | None) -> str:
    assert isinstance(settings.servers, list)
    gateways = await connect(settings.servers, key)
    try:
        found = await check_servers(gateways, arch, needed_context, key)
    finally:
        await close_all(gateways)
    routers = [gateway.client.url for gateway in gateways if gateway.is_router]
    through = f", through {', '.join(routers)}" if routers else ""
    return f"{len(found)} running elsewhere: {'; '.join(found)}{through}"


async def check_servers(gateways: list[Gateway], arch: Architecture, needed_context: int, key: str | None) -> list[str]:
    """A description of each server; ConfigError if the job cannot use one of them."""
    return await asyncio.gather(*(_check_server(server, arch, needed_context, key) for server in _clients(gateways)))


async def connect(urls: list[str], key: str | None) -> list[Gateway]:
    """A gateway per URL; that of a sglang-router has the servers behind it. The key is sent to all of them.

    Raises ConfigError for a URL that does not answer, and for a server that is there twice.
    """
    gateways: list[Gateway] = []
    try:
        gateways = [await _gateway(url, key) for url in urls]
        servers = [server.url for gateway in gateways for server in gateway.servers]
        if twice := [url for url in servers if servers.count(url) > 1]:
            raise ConfigError(f"rollout.servers: {twice[0]} is there twice; give each server once")
    except ConfigError:
        await close_all(gateways)
        raise
    return gateways


async def close_all(gateways: list[Gateway]) -> None:
    """Close all connections."""
    for client in {c for gateway in gateways for c in (gateway.client, *(server.client for server in gateway.servers))}:
        await client.close()


async def _gateway(url: str, key: str | None) -> Gateway:
    """ConfigError if nothing useful answers; whether it is SGLang is not checked here."""
    router = SglangRouter(url, key)
    try:
        workers = await router.workers(ASK_S)
    except ServerError as error:
        await router.close()
        if error.status == 404:  # not a router
            server = SglangServer(url, key)
            return Gateway(server, [ServerState(server)])
        raise ConfigError(_no_answer(error, key)) from None
    listed = workers.get("workers") if isinstance(workers, dict) else None
    if not isinstance(listed, list) or not all(isinstance(worker, dict) and "url" in worker for worker in listed):
        await router.close()
        raise ConfigError(f"rollout.servers: {router.url} answers, but is neither an SGLang server nor a sglang-router")
    if not listed:
        await router.close()
        raise ConfigError(
            f"rollout.servers: {router.url} is a router without servers; start them first, or give their URLs"
        )
    return Gateway(router, [ServerState(SglangServer(worker["url"], key)) for worker in listed])


def _clients(gateways: list[Gateway]) -> list[SglangServer]:
    """The clients of all servers; `connect` has made them."""
    return [cast(SglangServer, server.client) for gateway in gateways for server in gateway.servers]


async def context_of(gateways: list[Gateway]) -> int:
    """The most tokens, prompt and answer together, that every server takes."""
    try:
        return min(await asyncio.gather(*(_context(server) for server in _clients(gateways))))
    except ServerError as error:
        raise ConfigError(_no_answer(error, None)) from None


async def _context(server: SglangServer) -> int:
    models = await server.models(ASK_S)
    try:
        return int(models["data"][0]["max_model_len"])
    except (TypeError, KeyError, IndexError, ValueError):
        raise ServerError(server.url, f"its /v1/models has no max_model_len: {models!r:.200}") from None


async def _check_server(server: SglangServer, arch: Architecture, needed_context: int, key: str | None) -> str:
    """A description; ConfigError unless it is SGLang, with this model, and its context is long enough."""
    url = server.url
    info = await _info(server, "model_info", key)
    if not isinstance(info, dict) or "weight_version" not in info:
        raise ConfigError(f"rollout.servers: {url} is no SGLang server: its /model_info has no weight_version")
    about = await _info(server, "server_info", key)
    # An update from disk changes model_path in /model_info, and that folder may be gone.
    path = about.get("model_path") if isinstance(about, dict) else None
    for name, theirs, ours in await _compared(server, info.get("model_type"), path, arch):
        if theirs != ours:
            raise ConfigError(
                f"rollout.servers: {url} serves another model, {path}: its {name} is {theirs}, "
                f"that of model.path is {ours}; start it with the config of model.path"
            )
    try:
        context = await _context(server)
    except ServerError as error:
        raise ConfigError(f"rollout.servers: {error}; is it an SGLang server?") from None
    if context < needed_context:
        raise ConfigError(
            f"rollout.servers: {url} takes {context} tokens, but a prompt and rollout.max_tokens are {needed_context}; "
            "start it with a longer --context-length, or lower rollout.max_tokens or data.max_prompt_tokens"
        )
    version = about.get("version", "of unknown version") if isinstance(about, dict) else "of unknown version"
    return f"{url} (SGLang {version}, context {context})"


async def _info(server: SglangServer, what: Literal["model_info", "server_info"], key: str | None) -> Any:
    try:
        return await (server.model_info(ASK_S) if what == "model_info" else server.server_info(ASK_S))
    except ServerError as error:
        if error.status == 404:
            raise ConfigError(f"rollout.servers: {server.url} is no SGLang server: it has no /{what}") from None
        raise ConfigError(_no_answer(error, key)) from None


async def _compared(server: SglangServer, model_type: Any, path: Any, arch: Architecture) -> list[tuple[str, Any, Any]]:
    """(name, the server's value, ours): from its config.json, or from its weights where that cannot be read here."""
    config = _config(path)
    if config:
        names = {"vocab_size": arch.vocab, "hidden_size": arch.hidden, "num_hidden_layers": arch.layers}
        names |= {"intermediate_size": arch.ffn, "num_key_value_heads": arch.kv_heads}
        return [(name, config[name], ours) for name, ours in names.items() if name in config]
    compared: list[tuple[str, Any, Any]] = [("model_type", model_type, arch.model_type)]
    row = await _weight(server, "model.embed_tokens.weight")
    if row and isinstance(row[0], list):
        compared.append(("hidden_size", len(row[0]), arch.hidden))
    last = await _weight(server, f"model.layers.{arch.layers - 1}.input_layernorm.weight")
    beyond = await _weight(server, f"model.layers.{arch.layers}.input_layernorm.weight")
    if row and (last is None or beyond is not None):
        compared.append(("num_hidden_layers", "less" if last is None else "more", arch.layers))
    return compared


def _config(path: Any) -> dict[str, Any]:
    """config.json of a model folder; {} where this machine cannot read it."""
    try:
        found = json.loads((Path(str(path)) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


async def _weight(server: SglangServer, name: str) -> Any:
    """The first row of a tensor; None if there is no such tensor, or the server does not give it."""
    try:
        return await server.get_weights_by_name(name, 1, ASK_S)
    except ServerError:
        return None


def _no_answer(error: ServerError, key: str | None) -> str:
    """The message about a server that gives no useful answer."""
    if error.status in (401, 403):
        given = "does not take the key in rollout.api_key_file" if key else "asks for a key; set rollout.api_key_file"
        return f"rollout.servers: {error.url} {given} ({error.message})"
    return f"rollout.servers: {error}; is the server up, and the URL right?"
