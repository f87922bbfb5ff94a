"""Servers on several nodes: each node's first rank starts its own, and rank 0 has them restarted through it."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import Any, NamedTuple

from flowrl_mega.config import ConfigError, RunError
from flowrl_mega.rollout.health import Restarter

ANSWER_S = 60.0  # beyond the time that a server may take to start


class Node(NamedTuple):
    """What rank 0 knows of a node: the servers there, and where its keeper listens, if it has one."""

    urls: list[str]
    address: tuple[str, int] | None


class Keeper:
    """Does for the servers of this node what rank 0 asks for, each request in a thread of its own, until closed.

    It listens at `host`, and does nothing for who does not know the `key`.
    """

    def __init__(self, servers: Restarter, host: str, key: bytes) -> None:
        self._servers, self._key = servers, key
        family = "AF_INET6" if ":" in host else "AF_INET"
        self._listener = Listener((host, 0), family=family)
        self.address: tuple[str, int] = self._listener.address[:2]
        self._closed = False
        self._thread = threading.Thread(target=self._listen, name="keeper", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """May be called again."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(OSError):
                socket.create_connection(self.address).close()  # or it would wait for one for ever
            self._thread.join()
            self._listener.close()

    def _listen(self) -> None:
        while not self._closed:
            with contextlib.suppress(OSError):  # one that is gone already
                connection = self._listener.accept()
                threading.Thread(target=self._answer, args=(connection,), daemon=True).start()

    def _answer(self, connection: Connection) -> None:
        with connection, contextlib.suppress(AuthenticationError, EOFError, OSError):  # whoever that was
            deliver_challenge(connection, self._key)
            answer_challenge(connection, self._key)
            what, url = connection.recv()
            answer: bool | None | Exception = None
            try:
                if what == "restart":
                    self._servers.restart(url)
                else:
                    answer = self._servers.is_alive(url)
            except (ConfigError, RunError) as error:
                answer = error
            connection.send(answer)


class ServersOfNodes:
    """The servers of all nodes, as rank 0 has them watched and restarted. A `Restarter`, for several threads."""

    def __init__(self, nodes: list[Node], key: bytes, start_timeout_s: float) -> None:
        self._address = {url: node.address for node in nodes for url in node.urls if node.address}
        self._key, self._timeout_s = key, start_timeout_s + ANSWER_S

    def is_alive(self, url: str) -> bool:
        return self._ask("is_alive", url)

    def restart(self, url: str) -> None:
        self._ask("restart", url)

    def _ask(self, what: str, url: str) -> Any:
        address = self._address[url]
        try:
            with Client(address, authkey=self._key) as connection:
                connection.send((what, url))
                if not connection.poll(self._timeout_s):
                    raise TimeoutError(f"no answer in {self._timeout_s:g} s")
                answer = connection.recv()
        except (OSError, EOFError, AuthenticationError) as error:
            raise RunError(
                f"rollout.servers: {url} runs on a node whose first rank does not answer at {address[0]}:{address[1]} "
                f"({error or type(error).__name__}); see that rank's output"
            ) from None
        if isinstance(answer, Exception):
            raise answer
        return answer


def address_towards(host: str) -> str:
    """This host's address as `host` sees it. Nothing is sent."""
    family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind) as probe:
        probe.connect(address)
        return probe.getsockname()[0]


def own_address() -> str:
    """This host's address for the job's other nodes."""
    return address_towards(os.environ.get("MASTER_ADDR") or "127.0.0.1")
