"""Command lines, GPUs and checks of the servers that would be started, without starting one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import fake_server
import pytest
import torch
import yaml

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.rollout.sglang import flags
from flowrl_mega.rollout.sglang.flags import check_servers, command, placement
from flowrl_mega.rollout.sglang.fleet import Fleet

REPO = Path(__file__).parents[3]


def test_a_command_line_says_what_the_settings_say(tmp_path: Path):
    """Flags reach SGLang under its own names, in the forms that its parser reads; a user's flag beats ours."""
    given = {
        "mem_fraction_static": 0.8,
        "enable_x": True,
        "y": False,
        "z": [1, 2],
        "j": {"a": 1},
        "log_level_http": "info",
    }
    words = command(RolloutSettings(python="py", server_args=given), tmp_path, "bf16", 21000, "dummy")
    assert words[0] == "py"
    text = " ".join(words[1:])
    assert '--mem-fraction-static 0.8 --enable-x --z 1 2 --j {"a": 1}' in text
    assert f"--model-path {tmp_path} --host 127.0.0.1 --port 21000 --dtype bfloat16 --load-format dummy" in text
    assert "--y" not in words
    assert [words[at + 1] for at, word in enumerate(words) if word == "--log-level-http"] == ["info"]


def test_what_only_we_can_know_is_refused(tmp_path: Path):
    """Two servers on one port, or on another model than the trainer's, would fail late or not at all."""
    for name in ("host", "port", "model_path", "model-path", "--port", "nnodes", "base_gpu_id", "gpu-id-step"):
        settings = RolloutSettings(python=fake_server.make(tmp_path), server_args={name: 1})
        with pytest.raises(ConfigError, match=f"rollout.server_args.{name} = 1: set for each server.*rollout.servers"):
            check_servers(settings)


def test_an_interpreter_without_sglang_is_named(tmp_path: Path):
    """Before anything starts, with the way out."""
    for python, why in ((sys.executable, "has no sglang"), (str(tmp_path / "none"), "cannot be run")):
        with pytest.raises(ConfigError) as error:
            check_servers(RolloutSettings(python=python))
        assert f"rollout.python = {python!r}" in str(error.value) and why in str(error.value)
        assert "make setup-sglang" in str(error.value)


def test_words_for_a_dry_run(tmp_path: Path):
    """They name the version, and say so when it is not the one that was tested."""
    settings = RolloutSettings(python=fake_server.make(tmp_path), servers=2)
    assert check_servers(settings) == "2 servers of SGLang 0.5.23, on CPU"
    other = tmp_path / "other"
    other.write_text("#!/bin/sh\necho 0.6.0\n")
    other.chmod(0o755)
    assert "0.6.0 (tested with 0.5.23)" in check_servers(RolloutSettings(python=str(other)))


@pytest.fixture
def eight_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)


def test_gpus_are_shared_out(eight_gpus: None):
    """Servers take the GPUs after the trainer's, or the trainer's own."""

    def placed(trainer: int = 4, **settings: Any) -> list[int]:
        return placement(RolloutSettings(**settings), trainer)

    assert placed(servers=2, server_args={"tp_size": 2}) == [4, 6]
    assert placed(servers=4) == [4, 5, 6, 7]
    assert placed(servers=1, server_args={"tp": 2, "dp-size": 2}) == [4]
    assert placed(servers=2, server_args={"tp": 2, "dp-size": 2, "enable_dp_attention": True}) == [4, 6]
    assert placed(servers=2, colocated=True, server_args={"tp_size": 4}) == [0, 4]
    assert placed(servers=3, server_args={"device": "cpu"}) == []
    with pytest.raises(ConfigError, match="rollout.servers = 3: 6 GPUs .2 a server. beside the trainer's 4.*has 8"):
        placed(servers=3, server_args={"tp_size": 2})


@pytest.mark.parametrize("file", sorted((REPO / "examples").glob("qwen2.5_*.yaml")), ids=lambda file: file.stem)
def test_every_server_sees_the_gpu_whose_memory_it_is_handed(
    file: Path, eight_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """SGLang looks for the handle's GPU among those that it sees: the first rank's must be one of them for all servers,
    which lie on GPUs of their own by number."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2,3,4,5,6,7")
    settings = RolloutSettings(**{**yaml.safe_load(file.read_text())["rollout"], "python": fake_server.make(tmp_path)})
    assert settings.colocated and settings.sync.transfer in (None, "tensor")
    fleet = Fleet(settings, tmp_path, tmp_path, "bf16", trainer_gpus=8)
    try:
        firsts = [int(words[words.index("--base-gpu-id") + 1]) for words in fleet._commands]
        assert firsts == list(range(0, 8, 8 // len(firsts)))
        assert fleet._environment()["CUDA_VISIBLE_DEVICES"] == "0,1,2,3,4,5,6,7"
    finally:
        fleet.close()


def test_a_communicator_of_two_processes_on_one_gpu_is_refused(eight_gpus: None, tmp_path: Path):
    """NCCL would, after the models are loaded."""
    settings = {"servers": 2, "colocated": True, "python": fake_server.make(tmp_path)}
    with pytest.raises(ConfigError, match="rollout.sync.transfer = 'distributed': NCCL refuses two processes"):
        check_servers(RolloutSettings(**settings, sync={"transfer": "distributed"}), 2)
    check_servers(RolloutSettings(**settings, sync={"transfer": "disk"}), 2)
    check_servers(RolloutSettings(**{**settings, "colocated": False}, sync={"transfer": "distributed"}), 2)


@pytest.mark.parametrize(
    ("settings", "is_compared"),
    [({}, True), ({"sync": {"transfer": "distributed"}}, True), ({"sync": {"transfer": "disk"}}, False),
     ({"colocated": True}, False), ({"server_args": {"device": "cpu"}}, False)],
)  # fmt: skip
def test_servers_of_another_nccl_are_refused(
    settings: Any, is_compared: bool, eight_gpus: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Where it broadcasts, which ends in a time-out or in ncclInvalidUsage at the first sync."""
    python = fake_server.make(tmp_path)
    rollout = RolloutSettings(servers=2, python=python, **settings)
    for theirs, is_wrong in (("2.30.7", True), ("2.29.7", False), (None, False)):
        found = {sys.executable: "2.29.7", python: theirs}
        monkeypatch.setattr(flags, "nccl_version", found.__getitem__)
        if is_wrong and is_compared:
            with pytest.raises(ConfigError, match="its NCCL is 2.30.7 and the trainer's 2.29.7.*make setup-sglang"):
                check_servers(rollout, 2)
        else:
            check_servers(rollout, 2)


def test_the_version_of_nccl_is_read_of_its_wheel(tmp_path: Path):
    """And there is none where torch has no CUDA."""
    assert flags.nccl_version(sys.executable) is None
    python = tmp_path / "python"
    about = tmp_path / "site" / "nvidia_nccl_cu13-2.30.7.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: nvidia-nccl-cu13\nVersion: 2.30.7\n")
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path}/site exec {sys.executable} "$@"\n')
    python.chmod(0o755)
    assert flags.nccl_version(str(python)) == "2.30.7"
