"""The servers that a job starts, on every node: each node's first rank starts its own, and restarts them for rank 0."""

from __future__ import annotations

import secrets
from pathlib import Path

from flowrl_mega.config import Config
from flowrl_mega.parallel.layout import Layout, is_first_on_host, raise_on_all_ranks
from flowrl_mega.rollout.health import Restarter
from flowrl_mega.rollout.nodes import Keeper, Node, ServersOfNodes, own_address
from flowrl_mega.rollout.sglang.fleet import Fleet
from flowrl_mega.rollout.sglang.quantize import with_quantization


class StartedServers:
    """`fleet`: those of this node, on its first rank. `urls`: those of all nodes. Making it is collective.

    One node's servers can be reached from that node only; of several each listens at its node's address. Logs are in
    run_dir/servers, those of further nodes in node_1 and so on therein. ConfigError on all ranks.
    """

    def __init__(self, config: Config, layout: Layout, side_files: dict[str, bytes], trainer_gpus: int) -> None:
        self.config = config
        self.fleet: Fleet | None = None
        self.keeper: Keeper | None = None
        self._secret = layout.broadcast_from_rank0(secrets.token_bytes(32))
        addresses = layout.gather_objects(own_address() if is_first_on_host() else None)
        firsts = [rank for rank, address in enumerate(addresses) if address]
        self.is_alone = len(firsts) == 1
        host = "127.0.0.1" if self.is_alone else addresses[layout.rank]
        with raise_on_all_ranks():
            if layout.rank in firsts:
                self.fleet = self._fleet(firsts.index(layout.rank), side_files, trainer_gpus, host)
        if self.fleet and not self.is_alone:
            self.keeper = Keeper(self.fleet, host, self._secret)
        own = self.fleet and Node(self.fleet.urls, self.keeper.address if self.keeper else None)
        self.nodes = [node for node in layout.gather_objects(own) if node]
        self.urls = [url for node in self.nodes for url in node.urls]

    def restarter(self) -> Restarter:
        """Who knows all servers' processes, for rank 0."""
        if self.is_alone:
            assert self.fleet
            return self.fleet
        return ServersOfNodes(self.nodes, self._secret, self.config.rollout.start_timeout_s)

    def close(self) -> None:
        """Stop the servers of this node. May be called again."""
        if self.keeper:
            self.keeper.close()
        if self.fleet:
            self.fleet.close()

    def _fleet(self, node: int, side_files: dict[str, bytes], trainer_gpus: int, host: str) -> Fleet:
        settings, folder = self.config.rollout, Path(self.config.run_dir) / "servers"
        if node:
            folder = folder / f"node_{node}"
        write_model(folder / "model", with_quantization(side_files) if settings.sync.dtype == "fp8" else side_files)
        dtype = "bf16" if settings.sync.dtype else self.config.model.dtype
        return Fleet(settings, folder / "model", folder, dtype, trainer_gpus, host=host)


def write_model(folder: Path, files: dict[str, bytes]) -> None:
    """Write a model folder without weights, for servers that get them from us."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
