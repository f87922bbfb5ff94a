"""The stand-in against recordings of the real SGLang: what is tested with the one holds for the other."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
from record import FOLDER, REQUESTS, ask
from stand_in import StandIn


@pytest.fixture(scope="module")
def found() -> Iterator[dict[str, dict]]:
    """What the stand-in answers to all requests, in the order in which they were recorded."""
    stand_in = StandIn()
    yield {name: ask(stand_in.url, request) for name, request in REQUESTS.items()}
    stand_in.close()


@pytest.mark.parametrize("name", REQUESTS)
def test_answers_as_the_real_one_did(name, found):
    """Same status, names, types, and the messages that we read: of success, and of each kind of refusal."""
    recorded = json.loads((FOLDER / f"{name}.json").read_text())
    request = REQUESTS[name]
    assert (recorded.pop("path"), recorded.pop("body")) == (request.path, request.body), "record again"
    assert found[name] == recorded


def test_every_recording_is_compared():
    """A file that no request belongs to would be compared with nothing."""
    assert {file.stem for file in FOLDER.iterdir()} == set(REQUESTS)
