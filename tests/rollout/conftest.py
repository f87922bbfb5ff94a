"""Servers that speak SGLang's HTTP, and dispatchers that send to them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from driving import MADE, Driver
from stand_in import StandIn

from flowrl_mega.rollout import health


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    """Makes servers, which end with the test."""

    def make(**options: Any) -> StandIn:
        server = StandIn(**options)
        MADE[server.url] = server
        return server

    yield make
    for server in MADE.values():
        server.close()
    MADE.clear()


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Makes drivers whose servers have weights of version 0."""
    drivers: list[Driver] = []

    def make(*args: Any, **settings: Any) -> Driver:
        drivers.append(Driver(*args, **settings))
        drivers[-1].push()
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is asked whether it lives has 2 s, not 25: enough for one that lives on a busy machine."""
    monkeypatch.setattr(health, "PROBE_S", 2.0)
