"""Servers that others run: found behind their URLs, and refused when they are not what the job needs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.rollout.api import Api, ServerError
from flowrl_mega.rollout.health import Entry, Server

ASK_S = 20.0


def read_key(settings: RolloutSettings) -> str | None:
    """The key that servers ask for, if any."""
    if settings.api_key_file is None:
        return None
    try:
        key = Path(settings.api_key_file).read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"rollout.api_key_file = {settings.api_key_file!r}: cannot be read ({error})") from None
    if not key or not key.isprintable() or " " in key:
        raise ConfigError(f"rollout.api_key_file = {settings.api_key_file!r}: must hold the key and nothing else")
    return key


def check_attached(settings: RolloutSettings, arch: Architecture, needed_context: int) -> str:
    """Words about the servers at `rollout.servers`; ConfigError for one that the job cannot use. `needed_context`:
    tokens of the longest prompt and answer."""
    assert isinstance(settings.servers, list)
    return asyncio.run(_check(settings, arch, needed_context, read_key(settings)))


async def _check(settings: RolloutSettings, arch: Architecture, needed_context: int, key: str | None) -> str:
    assert isinstance(settings.servers, list)
    entries = await connect(settings.servers, key)
    try:
        found = await check_entries(entries, arch, needed_context, key)
    finally:
        await close_all(entries)
    routers = [entry.api.url for entry in entries if entry.is_router]
    through = f", through {', '.join(routers)}" if routers else ""
    return f"{len(found)} running elsewhere: {'; '.join(found)}{through}"


async def check_entries(entries: list[Entry], arch: Architecture, needed_context: int, key: str | None) -> list[str]:
    """What each server is; ConfigError for one that the job cannot use."""
    servers = [server for entry in entries for server in entry.servers]
    return await asyncio.gather(*(_check_server(server, arch, needed_context, key) for server in servers))


async def connect(urls: list[str], key: str | None) -> list[Entry]:
    """An entry for each URL; that of a sglang-router has the servers behind it. A key is sent to all of them."""
    entries: list[Entry] = []
    try:
        entries = [await _entry(Api(url, key), key) for url in urls]
        servers = [server.url for entry in entries for server in entry.servers]
        if twice := [url for url in servers if servers.count(url) > 1]:
            raise ConfigError(f"rollout.servers: {twice[0]} is there twice; give each server once")
    except ConfigError:
        await close_all(entries)
        raise
    return entries


async def close_all(entries: list[Entry]) -> None:
    for api in {api for entry in entries for api in (entry.api, *(server.api for server in entry.servers))}:
        await api.close()


async def _entry(api: Api, key: str | None) -> Entry:
    """ConfigError for one that does not answer; whether it is SGLang is not looked at."""
    try:
        workers = await api.get("/workers", ASK_S)
    except ServerError as error:
        if error.status == 404:
            return Entry(api, [Server(api)])
        await api.close()
        raise ConfigError(_no_answer(error, key)) from None
    listed = workers.get("workers") if isinstance(workers, dict) else None
    if not isinstance(listed, list) or not all(isinstance(worker, dict) and "url" in worker for worker in listed):
        await api.close()
        raise ConfigError(f"rollout.servers: {api.url} answers, but is neither an SGLang server nor a sglang-router")
    if not listed:
        await api.close()
        raise ConfigError(
            f"rollout.servers: {api.url} is a router without servers; start them first, or give their URLs"
        )
    return Entry(api, [Server(Api(worker["url"], key)) for worker in listed])


async def context_of(entries: list[Entry]) -> int:
    """The most tokens, prompt and answer together, that every server takes."""
    servers = [server for entry in entries for server in entry.servers]
    try:
        return min(await asyncio.gather(*(_context(server.api) for server in servers)))
    except ServerError as error:
        raise ConfigError(_no_answer(error, None)) from None


async def _context(api: Api) -> int:
    models = await api.get("/v1/models", ASK_S)
    try:
        return int(models["data"][0]["max_model_len"])
    except (TypeError, KeyError, IndexError, ValueError):
        raise ServerError(api.url, f"/v1/models has no max_model_len: {models!r:.200}") from None


async def _check_server(server: Server, arch: Architecture, needed_context: int, key: str | None) -> str:
    """Refuse a server that is not SGLang, of another model, or too short; what it is."""
    api, url = server.api, server.url
    info = await _info(api, "/model_info", key)
    if not isinstance(info, dict) or "weight_version" not in info:
        raise ConfigError(f"rollout.servers: {url} is no SGLang server: its /model_info has no weight_version")
    about = await _info(api, "/server_info", key)
    # An update from disk changes model_path in /model_info, and that folder may be gone.
    path = about.get("model_path") if isinstance(about, dict) else None
    for name, theirs, ours in await _compared(api, info.get("model_type"), path, arch):
        if theirs != ours:
            raise ConfigError(
                f"rollout.servers: {url} serves another model, {path}: its {name} is {theirs}, "
                f"that of model.path is {ours}; start it with the config of model.path"
            )
    try:
        context = await _context(api)
    except ServerError as error:
        raise ConfigError(f"rollout.servers: {error}; is it an SGLang server?") from None
    if context < needed_context:
        raise ConfigError(
            f"rollout.servers: {url} takes {context} tokens, but a prompt and rollout.max_tokens are {needed_context}; "
            "start it with a longer --context-length, or lower rollout.max_tokens or data.max_prompt_tokens"
        )
    version = about.get("version", "of unknown version") if isinstance(about, dict) else "of unknown version"
    return f"{url} (SGLang {version}, context {context})"


async def _info(api: Api, path: str, key: str | None) -> Any:
    try:
        return await api.get(path, ASK_S)
    except ServerError as error:
        if error.status == 404:
            raise ConfigError(f"rollout.servers: {api.url} is no SGLang server: it has no {path}") from None
        raise ConfigError(_no_answer(error, key)) from None


async def _compared(api: Api, model_type: Any, path: Any, arch: Architecture) -> list[tuple[str, Any, Any]]:
    """(what, the server's, ours). Its own config.json says most; where it cannot be read the weights say less."""
    config = _config(path)
    if config:
        names = {"vocab_size": arch.vocab, "hidden_size": arch.hidden, "num_hidden_layers": arch.layers}
        names |= {"intermediate_size": arch.ffn, "num_key_value_heads": arch.kv_heads}
        return [(name, config[name], ours) for name, ours in names.items() if name in config]
    compared: list[tuple[str, Any, Any]] = [("model_type", model_type, arch.model_type)]
    row = await _weight(api, "model.embed_tokens.weight")
    if row and isinstance(row[0], list):
        compared.append(("hidden_size", len(row[0]), arch.hidden))
    last = await _weight(api, f"model.layers.{arch.layers - 1}.input_layernorm.weight")
    beyond = await _weight(api, f"model.layers.{arch.layers}.input_layernorm.weight")
    if row and (last is None or beyond is not None):
        compared.append(("num_hidden_layers", "less" if last is None else "more", arch.layers))
    return compared


def _config(path: Any) -> dict[str, Any]:
    """config.json of a model folder, where this machine can read it."""
    try:
        found = json.loads((Path(str(path)) / "config.json").read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


async def _weight(api: Api, name: str) -> Any:
    """The beginning of a tensor; None: there is none of this name, or it cannot be asked for."""
    try:
        return await api.post("/get_weights_by_name", {"name": name, "truncate_size": 1}, ASK_S)
    except ServerError:
        return None


def _no_answer(error: ServerError, key: str | None) -> str:
    """What to do about a server that gives no useful answer."""
    if error.status in (401, 403):
        given = "does not take the key in rollout.api_key_file" if key else "asks for a key; set rollout.api_key_file"
        return f"rollout.servers: {error.url} {given} ({error.message})"
    return f"rollout.servers: {error}; is the server up, and the URL right?"
