"""A process that takes weights over HTTP as an SGLang server does, and keeps them; it can be told to fail.

It joins the trainer's process group and its broadcasts for real, maps its shared memory and reads its files. The real
server is in tests/integration; this one starts at once and breaks where it is told to.
"""

from __future__ import annotations

import base64
import io
import json
import os
import pickle
import signal
import urllib.request
from pathlib import Path
from typing import Any

from rank_pool import FORKSERVER

from flowrl_mega.parallel.launch import reserve_port


class Taker:
    """One such process. `fault`: (path, which call of it, what then): die, hang, refuse, refuse_after or odd."""

    def __init__(self, fault: tuple[str, int, str] | None = None, port: int | None = None, **about: Any) -> None:
        self.reserved = reserve_port()
        self.port = port or self.reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.process = FORKSERVER.Process(target=_serve, args=(self.port, fault, about), daemon=True)
        self.process.start()
        self.wait()

    def wait(self) -> None:
        for _ in range(600):
            try:
                return self.get("/model_info") and None
            except OSError:
                self.process.join(0.05)
        raise AssertionError("the taker did not start")

    def get(self, path: str) -> Any:
        with urllib.request.urlopen(self.url + path, timeout=20) as answer:
            return json.loads(answer.read())

    def held(self) -> dict[str, Any]:
        """The tensors that it was given, by name."""
        import torch

        return torch.load(io.BytesIO(base64.b64decode(self.get("/held"))), weights_only=False)

    def paths(self) -> list[str]:
        """What it was asked to change, in order, groups aside."""
        return [path for path in self.get("/calls") if not path.startswith("/destroy")]

    def die(self) -> None:
        """Its port is kept for another one."""
        self.process.kill()
        self.process.join()

    def close(self) -> None:
        self.die()
        self.reserved.close()


def _serve(port: int, fault: tuple[str, int, str] | None, about: dict[str, Any]) -> None:
    from aiohttp import web

    state = _State(fault, about)
    app = web.Application(client_max_size=1 << 30)
    app.router.add_route("*", "/{path:.*}", state.answer)
    web.run_app(app, host="127.0.0.1", port=port, print=None, handle_signals=False)


class _State:
    def __init__(self, fault: tuple[str, int, str] | None, about: dict[str, Any]) -> None:
        self.fault, self.about = fault, {"tp_size": 1, "dtype": "float32", "device": "cpu", **about}
        self.calls: list[str] = []
        self.version, self.tensors = "default", dict[str, Any]()
        self.in_session = bool(about.get("in_session"))
        self.groups: dict[str, Any] = {}

    async def answer(self, request: Any) -> Any:
        import asyncio

        import torch
        from aiohttp import web

        path = request.path
        if request.method == "GET":
            torch.save(self.tensors, stream := io.BytesIO())
            held = base64.b64encode(stream.getvalue()).decode()
            found = {"/model_info": {"weight_version": self.version}, "/server_info": self.about}
            return web.json_response({**found, "/calls": self.calls, "/held": held}[path])
        body = await request.json()
        self.calls.append(path + (f" {body['mode']}" if "mode" in body else ""))
        number = sum(call.split()[0] == path for call in self.calls)
        fault = self.fault[2] if self.fault and self.fault[:2] == (path, number) else None
        if fault == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        if fault == "hang":
            os.kill(os.getpid(), signal.SIGSTOP)
        if fault == "odd":
            return web.Response(text="[1, 2", content_type="application/json")
        if fault == "refuse":
            return web.json_response({"success": False, "message": "told to refuse"}, status=400)
        try:
            await asyncio.to_thread(getattr(self, path.strip("/")), body)
        except Exception as error:
            return web.json_response({"success": False, "message": f"{error}"}, status=400)
        if fault == "refuse_after":
            return web.json_response({"success": False, "message": "told to refuse"}, status=400)
        if body.get("weight_version") and fault != "forget":
            self.version = body["weight_version"]
        return web.json_response({"success": True})

    def pause_generation(self, body: Any) -> None: ...

    def continue_generation(self, body: Any) -> None: ...

    def begin_weight_update(self, body: Any) -> None:
        assert not self.in_session, "a weight-update session is already open; call end_weight_update() first"
        self.in_session = True

    def end_weight_update(self, body: Any) -> None:
        assert self.in_session, "no weight-update session is open"
        self.in_session = False

    def init_weights_update_group(self, body: Any) -> None:
        """As SGLang's init_custom_process_group does."""
        import torch.distributed as dist
        from torch.distributed import distributed_c10d as c10d

        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        address, name = f"tcp://{body['master_address']}:{body['master_port']}", body["group_name"]
        rank, world = body["rank_offset"], body["world_size"]
        try:
            store, _, _ = next(dist.rendezvous(address, rank, world, timeout=c10d.default_pg_timeout))
            prefixed = dist.PrefixStore(name, store)
            group, _ = c10d._new_process_group_helper(
                world,
                rank,
                [],
                c10d.Backend(body["backend"]),
                prefixed,
                group_name=name,
                timeout=c10d.default_pg_timeout,
            )
            c10d._world.pg_group_ranks[group] = {i: i for i in range(world)}
        except Exception as error:
            raise AssertionError(f"Failed to initialize custom process group: {error}.") from None
        self.groups[name] = group

    def destroy_weights_update_group(self, body: Any) -> None:
        import torch.distributed as dist

        dist.destroy_process_group(self.groups.pop(body["group_name"]))

    def update_weights_from_distributed(self, body: Any) -> None:
        import torch
        import torch.distributed as dist

        assert self.in_session and body["load_format"] == "flattened_bucket"
        meta = [
            (n, getattr(torch, d), s) for n, d, s in zip(body["names"], body["dtypes"], body["shapes"], strict=True)
        ]
        sizes = [dtype.itemsize * torch.Size(shape).numel() for _, dtype, shape in meta]
        flat = torch.empty(sum(sizes), dtype=torch.uint8)
        try:
            dist.broadcast(flat, 0, group=self.groups[body["group_name"]])
        except Exception as error:
            raise AssertionError(f"Failed to receive weights: {error!r}") from None
        for (name, dtype, shape), part in zip(meta, flat.split(sizes), strict=True):
            self.tensors[name] = part.clone().view(dtype).reshape(shape)

    def update_weights_from_tensor(self, body: Any) -> None:
        assert self.in_session and len(body["serialized_named_tensors"]) == self.about["tp_size"]
        for payload in body["serialized_named_tensors"]:
            self.tensors |= {name: tensor.clone() for name, tensor in pickle.loads(base64.b64decode(payload))}

    def update_weights_from_disk(self, body: Any) -> None:
        from safetensors.torch import load_file

        assert body["load_format"] == "auto"
        folder = Path(body["model_path"])
        index = json.loads((folder / "model.safetensors.index.json").read_text())
        found = {name: load_file(folder / file)[name].clone() for name, file in index["weight_map"].items()}
        self.tensors |= {**found, "config": json.loads((folder / "config.json").read_text())}
