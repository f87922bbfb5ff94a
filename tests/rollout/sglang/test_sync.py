"""Weights to servers over real gloo groups, shared memory and files; what becomes of all when one server fails.

The servers are processes that take what they are sent and keep it (weight_taker.py): what the real one makes of it is
in tests/integration.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from sync_ranks import push
from tiny_models import make
from weight_taker import Taker

pytestmark = pytest.mark.ranks
TRANSFERS = ["disk", "tensor", "distributed"]
UPDATE = {name: f"/update_weights_from_{name}" for name in TRANSFERS}
# Three buckets of 1 MiB; Megatron pads the odd vocabulary at tp = 2.
SIZE = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama-untied-rope", tmp_path_factory.mktemp("model"), **SIZE)


@pytest.fixture
def takers() -> Iterator[Callable[..., Taker]]:
    running: list[Taker] = []

    def start(*args: Any, **about: Any) -> Taker:
        running.append(Taker(*args, **about))
        return running[-1]

    yield start
    for taker in running:
        taker.close()


def run(ranks: RankPool, *args: Any, **kwargs: Any) -> tuple[dict[str, str], dict[str, torch.Tensor], dict[str, float]]:
    """`push` on all ranks; what rank 0 got."""
    first, *others = ranks.run(push, *args, **kwargs)
    assert all(failures == {} for failures, *_ in others)
    return first


def assert_same(held: dict[str, Any], wanted: dict[str, torch.Tensor]) -> None:
    held.pop("config", None)
    assert held.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert held[name].dtype == tensor.dtype and torch.equal(held[name], tensor), name


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)], ids=["tp1", "tp2", "pp2"])
@pytest.mark.parametrize("transfer", TRANSFERS)
def test_every_server_holds_the_policy_to_the_bit(transfer, tp, pp, model, takers, ranks1, ranks2, tmp_path):
    """Under Hugging Face's names, with the version, in several buckets; and it is paused while they come."""
    servers = [takers(), takers()]
    ranks, urls = ranks1 if tp == pp == 1 else ranks2, [s.url for s in servers]
    failures, wanted, metrics = run(ranks, model, urls, 7, tmp_path, 0.01, tp, transfer=transfer, pp=pp)
    assert failures == {}
    for server in servers:
        assert_same(server.held(), wanted)
        assert server.get("/model_info")["weight_version"] == "7"
        asked = server.paths()
        updates = [place for place, path in enumerate(asked) if path == UPDATE[transfer]]
        assert len(updates) == 1 if transfer == "disk" else len(updates) > 2
        assert asked.index("/pause_generation retract") < updates[0]
        assert updates[-1] < asked.index("/continue_generation")
    assert metrics["perf/push_gb"] == pytest.approx(sum(tensor.nbytes for tensor in wanted.values()) / 1e9)


@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (1, 1)], ids=["tp2", "pp2", "dp2"])
@pytest.mark.parametrize("transfer", ["tensor", "distributed"])
def test_each_node_gives_weights_to_its_own_servers(transfer, tp, pp, model, takers, ranks2, tmp_path):
    """Memory and GPUs of another node cannot be reached. Whether a node holds a part of the model or a whole one, its
    first rank has all of the weights to give, and says what became of its own servers alone."""
    servers = [takers(), takers((UPDATE[transfer], 2, "refuse")), takers()]
    for version, (first, second) in enumerate([(0, 1), (0, 2)]):
        results = ranks2.run(
            push, model, [servers[first].url, servers[second].url], version, tmp_path, 0.01 * (1 + version), tp,
            check=False, pp=pp, by_rank=True, transfer=transfer, keep=version == 0,
        )  # fmt: skip
        (failures, wanted, metrics), (others, _, other_metrics) = results
        assert failures == {} and list(others) == ([servers[1].url] if second == 1 else [])
        assert metrics["perf/push_gb"] == pytest.approx(sum(tensor.nbytes for tensor in wanted.values()) / 1e9)
        assert_same(servers[first].held(), wanted)
    assert_same(servers[2].held(), wanted)


@pytest.mark.parametrize("pause", ["retract", "in_place", "wait"])
def test_how_answers_under_way_are_paused(pause, model, takers, ranks1, tmp_path):
    """Where nothing runs, nothing is paused."""
    server = takers()
    assert run(ranks1, model, [server.url], 1, tmp_path, transfer="tensor", pause=pause)[0] == {}
    paused = [path for path in server.paths() if path.startswith("/pause")]
    assert paused == ([] if pause == "wait" else [f"/pause_generation {pause}"])


FAULTS = [
    *((transfer, fault, 1) for transfer in TRANSFERS for fault in ("die", "refuse", "refuse_after", "odd")),
    *((transfer, fault, 2) for transfer in ("tensor", "distributed") for fault in ("die", "refuse", "refuse_after")),
]


@pytest.mark.parametrize(("transfer", "fault", "bucket"), FAULTS)
def test_a_server_that_fails_is_named_and_the_others_get_their_weights(
    transfer, fault, bucket, model, takers, ranks2, tmp_path
):
    """In the middle of a sync from two ranks. What it holds may be half new, so it must not answer any more."""
    good, bad, other = takers(), takers((UPDATE[transfer], bucket, fault)), takers()
    urls = [good.url, bad.url, other.url]
    failures, wanted, _ = run(ranks2, model, urls, 3, tmp_path, 0.02, 2, transfer=transfer)
    assert list(failures) == [bad.url]
    said = {"die": "lost while it loaded" if transfer != "distributed" else UPDATE[transfer], "odd": "JSON"}
    assert said.get(fault, "told to refuse") in failures[bad.url]
    for server in (good, other):
        assert_same(server.held(), wanted)
        assert server.paths()[-1] == "/continue_generation"
    if fault != "die":
        assert bad.paths()[-1] == "/pause_generation abort" and "/continue_generation" not in bad.paths()


@pytest.mark.parametrize(
    "path", ["/pause_generation", "/begin_weight_update", "/end_weight_update", "/init_weights_update_group"]
)
@pytest.mark.parametrize("fault", ["die", "refuse"])
def test_a_server_may_fail_at_any_point(path, fault, model, takers, ranks1, tmp_path):
    """Not only while it loads; a group that one does not join is made anew without it."""
    bad, good = takers((path, 1, fault)), takers()
    failures, wanted, _ = run(ranks1, model, [bad.url, good.url], 3, tmp_path, 0.02, transfer="distributed")
    assert list(failures) == [bad.url]
    assert_same(good.held(), wanted)


@pytest.mark.integration
@pytest.mark.parametrize("transfer", ["tensor", "distributed"])
def test_a_server_that_hangs_costs_the_time_out_and_no_more(transfer, model, takers, ranks1, tmp_path):
    """Stopped, it neither answers nor closes its connections."""
    good, bad = takers(), takers((UPDATE[transfer], 1, "hang"))
    urls = [good.url, bad.url]
    failures, _, _ = run(ranks1, model, urls, 3, tmp_path, 0.02, transfer=transfer, timeout_s=3, timeout=60)
    assert bad.url in failures and "no answer in" in failures[bad.url]
    assert transfer == "distributed" or list(failures) == [bad.url]


def test_a_server_that_failed_is_served_again(model, takers, ranks1, tmp_path):
    """Its session is still open, and the group was dropped."""
    good, bad = takers(), takers((UPDATE["distributed"], 2, "refuse"))
    given = dict(transfer="distributed", keep=True)
    assert list(run(ranks1, model, [good.url, bad.url], 1, tmp_path, 0.01, **given)[0]) == [bad.url]
    failures, wanted, _ = run(ranks1, model, [good.url, bad.url], 2, tmp_path, 0.02, transfer="distributed")
    assert failures == {}
    for server in (good, bad):
        assert_same(server.held(), wanted)
        assert server.paths()[-1] == "/continue_generation"


def test_the_group_stays_while_its_servers_do(model, takers, ranks1, tmp_path):
    """Making it takes seconds on GPUs. A server that has started anew knows nothing of it, under the same URL."""
    stays, dies = takers(), takers()
    urls, joined = [stays.url, dies.url], lambda taker: taker.paths().count("/init_weights_update_group")
    for version in (1, 2):
        assert run(ranks1, model, urls, version, tmp_path, 0.01 * version, transfer="distributed", keep=True)[0] == {}
    assert joined(stays) == joined(dies) == 1
    dies.die()
    again = takers(None, dies.port)
    failures, wanted, _ = run(ranks1, model, urls, 3, tmp_path, 0.03, transfer="distributed")
    assert failures == {} and (joined(stays), joined(again)) == (2, 1)
    assert_same(stays.held(), wanted)
    assert_same(again.held(), wanted)


def test_a_server_that_does_not_say_the_new_version_has_not_taken_the_weights(model, takers, ranks1, tmp_path):
    server = takers((UPDATE["disk"], 1, "forget"))
    failures, *_ = run(ranks1, model, [server.url], 5, tmp_path, transfer="disk")
    assert failures == {server.url: "says weight_version = 'default' after it was given 5"}
    assert "/continue_generation" not in server.paths()


def test_nobody_listens(model, takers, ranks2, tmp_path):
    """All ranks come back, and the message is the operating system's."""
    gone = takers()
    gone.close()
    failures, *_ = run(ranks2, model, [gone.url], 1, tmp_path, 0.0, 2, transfer="distributed")
    assert list(failures) == [gone.url] and "/server_info" in failures[gone.url]


def test_pipeline_parallel_servers_cannot_join_the_group(model, takers, ranks1, tmp_path):
    """SGLang counts only their tensor-parallel ranks: two would come under one number."""
    server = takers(pp_size=2)
    failures, *_ = run(ranks1, model, [server.url], 1, tmp_path, transfer="distributed")
    assert "pp_size = 2" in failures[server.url] and "take disk" in failures[server.url]


def test_each_rank_of_a_server_has_its_own_handles(model, takers, ranks1, tmp_path):
    """On CUDA a handle may be opened once."""
    server = takers(tp_size=2)
    failures, wanted, _ = run(ranks1, model, [server.url], 1, tmp_path, 0.01, transfer="tensor")
    assert failures == {}
    assert_same(server.held(), wanted)


@pytest.mark.parametrize("transfer", TRANSFERS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_what_is_sent_can_be_of_another_type(dtype, transfer, model, takers, ranks2, tmp_path):
    server = takers()
    given = dict(transfer=transfer, dtype=dtype, keep=True)  # the files must still be there
    failures, wanted, _ = run(ranks2, model, [server.url], 1, tmp_path, 0.01, 2, **given)
    held = server.held()
    assert failures == {}
    config = held.pop("config", {})
    if dtype == "bf16":
        assert_same(held, {name: tensor.bfloat16() for name, tensor in wanted.items()})
        assert "quantization_config" not in config
        return
    linear = {name for name in wanted if name.endswith("_proj.weight")}
    assert held.keys() == wanted.keys() | {f"{name}_scale_inv" for name in linear}
    assert all(held[name].dtype == torch.float8_e4m3fn for name in linear)
    assert all(torch.equal(held[name], wanted[name].bfloat16()) for name in wanted.keys() - linear)
    assert transfer != "disk" or config["quantization_config"]["weight_block_size"] == [128, 128]


def test_only_the_newest_version_stays_on_disk(model, takers, ranks1, tmp_path):
    """A model a step would fill any disk; at the end none stays. Nothing else in that folder is touched."""
    (tmp_path / "mine").mkdir()
    server, names = takers(), lambda: sorted(path.name for path in tmp_path.iterdir())
    for version in (1, 2):
        run(ranks1, model, [server.url], version, tmp_path, transfer="disk", keep=True)
        assert names() == ["mine", f"version_{version}"]
    run(ranks1, model, [server.url], 3, tmp_path, transfer="disk")
    assert names() == ["mine"]


def test_a_folder_that_cannot_be_written_is_named(model, takers, ranks2, tmp_path):
    """And both ranks come back."""
    (tmp_path / "file").write_text("")
    server = takers()
    failures, *_ = run(ranks2, model, [server.url], 1, tmp_path / "file" / "weights", 0.0, 2, transfer="disk")
    assert "rollout.sync.folder" in failures[server.url] and "Not a directory" in failures[server.url]


def test_replicas_have_nothing_to_do(model, takers, ranks2, tmp_path):
    """Two data-parallel ranks: the first one's weights, once."""
    server = takers()
    failures, wanted, _ = run(ranks2, model, [server.url], 1, tmp_path, 0.01, transfer="tensor")
    assert failures == {}
    assert_same(server.held(), wanted)
    assert server.paths().count("/begin_weight_update") == 1
