"""Rank 0 has servers of other nodes watched and restarted by those nodes' first ranks, over real sockets."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from flowrl_mega.config import ConfigError, RunError
from flowrl_mega.rollout.nodes import Keeper, Node, ServersOfNodes, address_towards

KEY = b"k" * 32


class Servers:
    """What a node's first rank has; a restart waits until it may end."""

    def __init__(self, url: str) -> None:
        self.urls, self.dead, self.restarted = [url], False, 0
        self.may_end = threading.Event()
        self.may_end.set()
        self.fault: Exception | None = None

    def is_alive(self, url: str) -> bool:
        assert url in self.urls
        return not self.dead

    def restart(self, url: str) -> None:
        assert url in self.urls and self.may_end.wait(10)
        if self.fault:
            raise self.fault
        self.dead, self.restarted = False, self.restarted + 1


@pytest.fixture
def nodes() -> Iterator[list[tuple[Servers, Keeper]]]:
    made = [(servers, Keeper(servers, "127.0.0.1", KEY)) for servers in map(Servers, ("http://a:1", "http://b:1"))]
    yield made
    for servers, keeper in made:
        servers.may_end.set()
        keeper.close()


def of(nodes: list[tuple[Servers, Keeper]], key: bytes = KEY, timeout_s: float = 5.0) -> ServersOfNodes:
    return ServersOfNodes([Node(servers.urls, keeper.address) for servers, keeper in nodes], key, timeout_s)


def test_each_server_is_its_own_nodes(nodes):
    (first, _), (second, _) = nodes
    servers = of(nodes)
    second.dead = True
    assert (servers.is_alive("http://a:1"), servers.is_alive("http://b:1")) == (True, False)
    servers.restart("http://b:1")
    assert (first.restarted, second.restarted) == (0, 1) and servers.is_alive("http://b:1")


@pytest.mark.parametrize("fault", [ConfigError("its log ends with: no disk"), RunError("gone")])
def test_why_a_server_does_not_come_back_is_heard(fault, nodes):
    nodes[1][0].fault = fault
    with pytest.raises(type(fault), match=str(fault)):
        of(nodes).restart("http://b:1")


def test_a_long_restart_keeps_nobody_waiting(nodes):
    """A server takes minutes to load its model; meanwhile others of the node are asked for."""
    servers, slow = of(nodes), nodes[1][0]
    slow.may_end.clear()
    restart = threading.Thread(target=servers.restart, args=("http://b:1",))
    restart.start()
    assert servers.is_alive("http://b:1")
    slow.may_end.set()
    restart.join(5)
    assert slow.restarted == 1


def test_who_does_not_know_the_key_is_not_served(nodes):
    with pytest.raises(RunError, match="http://b:1 runs on a node whose first rank does not answer"):
        of(nodes, b"x" * 32).restart("http://b:1")
    assert nodes[1][0].restarted == 0
    assert of(nodes).is_alive("http://b:1")


def test_a_connection_that_says_nothing_does_no_harm(nodes):
    """A scan of ports, say."""
    with socket.create_connection(nodes[1][1].address):
        assert of(nodes).is_alive("http://b:1")
    socket.create_connection(nodes[1][1].address).close()
    assert of(nodes).is_alive("http://b:1")


def test_a_node_that_is_gone_is_named(nodes):
    servers = of(nodes)
    nodes[1][1].close()
    nodes[1][1].close()
    host, port = nodes[1][1].address
    with pytest.raises(RunError, match=f"does not answer at {host}:{port} .*see that rank's output"):
        servers.is_alive("http://b:1")
    assert servers.is_alive("http://a:1")


def test_a_node_that_hangs_is_named(nodes, monkeypatch):
    monkeypatch.setattr("flowrl_mega.rollout.nodes.ANSWER_S", 0.0)
    nodes[1][0].may_end.clear()
    with pytest.raises(RunError, match="no answer in 0.2 s"):
        of(nodes, timeout_s=0.2).restart("http://b:1")


def test_the_address_that_others_see():
    """As the kernel routes: of this host, and for itself the loopback device's."""
    assert address_towards("127.0.0.1") == "127.0.0.1"
    assert address_towards("127.0.0.2").startswith("127.")
