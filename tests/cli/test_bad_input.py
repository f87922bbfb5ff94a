"""Wrong input: exit code 2, one message on stderr that names field, value and fix, no traceback, nothing written."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import write_config
from tiny_models import make

from flowrl_mega import cli, faults
from flowrl_mega.config import ConfigError
from flowrl_mega.ops import build, kernels
from flowrl_mega.parallel import backends

Capture = pytest.CaptureFixture[str]


def refused(capsys: Capture, folder: Path, *arguments: str) -> str:
    """The message, after a look at how it was given."""
    before = sorted(folder.rglob("*"))
    assert cli.main(["train", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("flowrl-mega: ")
    assert "Traceback" not in said.err and said.err.endswith("\n")
    assert sorted(folder.rglob("*")) == before, "nothing may be written"
    return said.err


# overrides -> what the message must contain: the field and its value, and the fix
TABLE: dict[str, tuple[list[str], list[str]]] = {
    "unknown section": (["--optimiser.lr=1"], ["optimiser: no such setting", "did you mean 'optimizer'?"]),
    "unknown field": (["--rollout.groupsize=4"], ["rollout.groupsize: no such setting", "'group_size'"]),
    "unknown and far": (["--rollout.zzz=4"], ["rollout.zzz: no such setting", "known: ", "temperature"]),
    "wrong type": (["--steps=ten"], ["steps = 'ten'", "integer"]),
    "fraction of a step": (["--steps=2.5"], ["steps = 2.5", "integer"]),
    "no section": (["--model=3"], ["model = 3", "dictionary"]),
    "value as section": (["--steps.of=3"], ["steps.of = '3'", "set steps itself"]),
    "not a setting": (["steps"], ["'steps': not a setting", "--section.field=value"]),
    "with a space": (["--steps", "3"], ["'--steps': not a setting", "--section.field=value"]),
    "too small": (["--rollout.group_size=0"], ["rollout.group_size = 0", "greater than or equal to 1"]),
    "negative rate": (["--optimizer.lr=-1e-3"], ["optimizer.lr = -0.001", "greater than 0"]),
    "infinite rate": (["--optimizer.lr=.inf"], ["optimizer.lr = inf", "finite"]),
    "bad decay": (["--optimizer.betas=[0.9, 1.5]"], ["optimizer.betas.1 = 1.5", "less than 1"]),
    "one decay": (["--optimizer.betas=[0.9]"], ["optimizer.betas.1", "required"]),
    "no such decay": (["--optimizer.decay=exponential"], ["optimizer.decay = 'exponential'", "'linear' or 'cosine'"]),
    "warm-up to the end": (
        ["--steps=5", "--optimizer.warmup_steps=5", "--optimizer.decay=linear", "--batch.mini_batch=null"],
        ["optimizer.warmup_steps = 5", "none of the 5 updates", "optimizer.decay = linear", "take fewer"],
    ),
    "too far ahead": (
        ["--rollout.ahead=3", "--rollout.max_staleness=2"],
        ["rollout.ahead = 3", "rollout.max_staleness = 2", "take fewer, or allow more"],
    ),
    "replay of nothing": (
        ["--rollout.replay={size: 8, share: 0.1}"],
        ["rollout.replay.share = 0.1", "less than one of rollout.prompts_per_step", "take more"],
    ),
    "replay beyond the run": (
        ["--rollout.replay={size: 80000, share: 0.5}"],
        ["rollout.replay.size = 80000", "the run has", "take fewer"],
    ),
    "replay of the young": (
        ["--rollout.replay={size: 8, share: 0.5}", "--rollout.max_staleness=0"],
        ["rollout.replay", "rollout.max_staleness = 0", "allow more"],
    ),
    "ahead in parts": (
        ["--rollout.engine=sglang", "--rollout.ahead=2", "--rollout.partial_tokens=4"],
        ["rollout.ahead = 2", "rollout.partial_tokens", "take ahead=1"],
    ),
    "partial alone": (["--rollout.partial_tokens=4"], ["rollout.partial_tokens = 4", "rollout.engine=sglang"]),
    "partial of nothing": (
        ["--rollout.engine=sglang", "--rollout.partial_tokens=8"],
        ["rollout.partial_tokens = 8", "rollout.max_tokens = 8", "take fewer"],
    ),
    "no servers": (["--rollout.engine=sglang", "--rollout.servers=[]"], ["rollout.servers = []", "at least one URL"]),
    "less than one": (["--rollout.servers=0"], ["rollout.servers = 0", "greater than or equal to 1"]),
    "no URL": (
        ["--rollout.engine=sglang", "--rollout.servers=[gpu7:30000]"],
        ["rollout.servers: 'gpu7:30000' is no URL", "http://HOST:PORT"],
    ),
    "colocated and ahead": (
        ["--rollout.engine=sglang", "--rollout.colocated=true", "--rollout.ahead=1"],
        ["rollout.ahead = 1", "share the trainer's GPUs", "ahead=0"],
    ),
    "nodes and URLs": (
        ["--rollout.engine=sglang", "--rollout.nodes=2", "--rollout.servers=[http://gpu7:30000]"],
        ["rollout.nodes = 2", "rollout.servers=1"],
    ),
    "nodes and colocated": (
        ["--rollout.engine=sglang", "--rollout.nodes=2", "--rollout.colocated=true"],
        ["rollout.nodes = 2", "set rollout.colocated=false"],
    ),
    "nodes that share no memory": (
        ["--rollout.engine=sglang", "--rollout.nodes=2", "--rollout.sync.transfer=tensor"],
        ["rollout.sync.transfer = tensor", "rollout.nodes", "take distributed or disk"],
    ),
    "colocated elsewhere": (
        ["--rollout.engine=sglang", "--rollout.colocated=true", "--rollout.servers=[http://gpu7:30000]"],
        ["rollout.colocated = True", "rollout.servers=1"],
    ),
    "tensors to another host": (
        ["--rollout.engine=sglang", "--rollout.sync.transfer=tensor", "--rollout.servers=[http://gpu7:30000]"],
        ["rollout.sync.transfer = tensor", "http://gpu7:30000", "distributed"],
    ),
    "no key file": (
        ["--rollout.engine=sglang", "--rollout.api_key_file=no.key"],
        ["rollout.api_key_file = 'no.key'", "no such file"],
    ),
    "no such transfer": (["--rollout.sync.transfer=ftp"], ["rollout.sync.transfer = 'ftp'", "'disk', 'tensor'"]),
    "no such kernels": (["--ops.backend=triton"], ["ops.backend = 'triton'", "'torch' or 'liger'"]),
    "no such choice": (["--model.dtype=fp16"], ["model.dtype = 'fp16'", "'fp32' or 'bf16'"]),
    "no such recipe": (["--model.fp8=mxfp8"], ["model.fp8 = 'mxfp8'", "'tensorwise'", "'blockwise'"]),
    "FP8 beside fp32": (["--model.fp8=tensorwise"], ["model.fp8 = tensorwise", "bf16 weights", "model.dtype=bf16"]),
    "FP8 reference beside fp32": (["--model.reference_fp8=blockwise"], ["reference_fp8 = blockwise", "dtype=bf16"]),
    "a reference never trains": (["--model.reference_fp8=delayed"], ["reference_fp8 = 'delayed'", "'tensorwise'"]),
    "FP8 and the local spec": (
        ["--model.fp8=tensorwise", "--model.dtype=bf16", "--model.spec=local"],
        ["model.fp8 = tensorwise", "Transformer Engine's layers", "model.spec=te"],
    ),
    "delayed, but not all layers": (
        ["--model.fp8=delayed", "--model.dtype=bf16", "--model.fp8_first_last_bf16=true"],
        ["model.fp8_first_last_bf16 = True", "delayed", "model.fp8=tensorwise"],
    ),
    "no budget": (["--model.fp8_budget=0"], ["model.fp8_budget = 0", "greater than 0"]),
    "settings that a function does not take": (
        ["--reward.code.wall_s=5"],
        ["reward.code.wall_s = 5.0", "flowrl_mega.rewards.sums:score takes (row, response)", "leave this out"],
    ),
    "two faults": (["--steps=0", "--seed=-1"], ["steps = 0", "seed = -1"]),
    "tp and the model": (["--parallel.tp=3"], ["parallel.tp = 3", "4 attention heads", "use one of 1, 2"]),
    "pp and the model": (["--parallel.pp=5"], ["parallel.pp = 5", "layers", "use "]),
    "vpp alone": (["--parallel.vpp=2"], ["parallel.vpp = 2", "parallel.pp of at least 2"]),
    "cp here": (["--parallel.cp=2"], ["parallel.cp = 2", "Transformer Engine", "parallel.cp=1"]),
    "sequence parallel": (
        ["--parallel.tp=1", "--parallel.sequence_parallel=true"],
        ["parallel.sequence_parallel = True", "parallel.tp of at least 2"],
    ),
    "more ranks than sequences": (
        ["--parallel.tp=1", "--parallel.dp=32", "--batch.mini_batch=null"],
        ["batch.mini_batch = 16", "32 data-parallel ranks", "fewer ranks"],
    ),
    "mini-batch": (["--batch.mini_batch=5"], ["batch.mini_batch = 5", "does not divide the 16", "a divisor of 16"]),
    "no data file": (["--data.task=null", "--data.path=no.jsonl"], ["data.path = 'no.jsonl'", "no such file"]),
    "no data": (["--data.task=null"], ["data.path = None, data.task = None", "exactly one"]),
    "two data": (["--data.path=x.jsonl"], ["data.path = 'x.jsonl', data.task = 'sums'", "exactly one"]),
    "unknown task": (["--data.task=sum"], ["data.task = 'sum'", "'sums'"]),
    "task's argument": (["--data.task_args={low: 1}"], ["data.task_args = {'low': 1}", "'low'"]),
    "task's range": (["--data.task_args={lo: 10, hi: 300}"], ["10..300", "within 0..99"]),
    "held-out file": (["--data.held_out=no.jsonl"], ["data.held_out = 'no.jsonl'", "a share (0.1), a JSON lines file"]),
    "held-out share": (["--data.held_out=5"], ["data.held_out = 5.0", "between 0 and 1"]),
    "nothing left to train on": (["--data.held_out=0.99"], ["data.held_out = 0.99", "lower it"]),
    "nothing to evaluate on": (["--data.held_out=null"], ["evaluation.every = 2", "set data.held_out"]),
    "long prompts": (["--data.max_prompt_tokens=1"], ["data.max_prompt_tokens = 1", "raise it to 3"]),
    "more tokens than positions": (
        ["--rollout.max_tokens=126"],
        ["rollout.max_tokens = 126: 129", "max_position_embeddings is 128", "lower rollout.max_tokens to 125"],
    ),
    "no chat template": (["--data.chat_template=true"], ["data.chat_template = true", "data.chat_template=false"]),
    "no model": (["--model.path=no/model"], ["model.path = 'no/model'", "give a Hugging Face model folder"]),
    "engine's form": (["--rollout.engine=vllm"], ["rollout.engine = 'vllm'", "embedded, sglang", "module:Class"]),
    "engine's module": (["--rollout.engine=no_such:Mine"], ["rollout.engine = 'no_such:Mine'", "No module named"]),
    "engine's class": (
        ["--rollout.engine=flowrl_mega.rollout:EmbeddedEngin"],
        ["rollout.engine = 'flowrl_mega.rollout:EmbeddedEngin'", "did you mean 'EmbeddedEngine'?"],
    ),
    "engine that is a function": (
        ["--rollout.engine=flowrl_mega.rollout:generate"],
        ["rollout.engine = 'flowrl_mega.rollout:generate'", "is no class", "rollout/engine.py"],
    ),
    "engine without methods": (
        ["--rollout.engine=flowrl_mega.rollout:Request"],
        ["rollout.engine = 'flowrl_mega.rollout:Request'", "lacks sync, start, finish, release, metrics, close"],
    ),
    "reward's form": (["--reward=score"], ["reward.function = 'score'", "module:name"]),
    "reward's module": (
        ["--reward=no_such:score"],
        ["reward.function = 'no_such:score'", "No module named", ".py file"],
    ),
    "reward's function": (
        ["--reward=flowrl_mega.rewards.sums:scor"],
        ["flowrl_mega.rewards.sums:scor", "did you mean 'score'?"],
    ),
    "objective's name": (["--objective.name=flowlr"], ["objective.name = 'flowlr'", "did you mean 'flowrl'?"]),
    "objective's field": (["--objective.betta=1"], ["objective.betta: no such setting", "'beta'"]),
    "objective's value": (["--objective.beta=x"], ["objective.beta = 'x'", "number"]),
    "objective's range": (["--objective.eps=-1"], ["objective.eps = -1", "greater than"]),
    "unknown to Megatron": (
        ["--megatron.recompute_granularty=full"],
        ["megatron.recompute_granularty", "did you mean 'recompute_granularity'?"],
    ),
    "FP8's, not Megatron's": (["--megatron.fp8=hybrid"], ["megatron.fp8 = 'hybrid'", "from model.spec and model.fp8"]),
    "frozen log Z of a cut distribution": (
        ["--objective={name: flowrl, z: frozen, reward_norm: none}", "--rollout.top_p=0.9"]
        + ["--rollout.allow_truncated_sampling=true"],
        ["objective.z = frozen", "rollout.top_p = 0.9", "rollout.top_k = 0", "use 1.0 and 0"],
    ),
    "frozen log Z of the likeliest tokens": (
        ["--objective={name: flowrl, z: frozen, reward_norm: none}", "--rollout.top_k=5"]
        + ["--rollout.allow_truncated_sampling=true"],
        ["objective.z = frozen", "rollout.top_k = 5"],
    ),
    "ppo without critic": (
        ["--objective={name: ppo}"],
        ["critic = None", "objective ppo", "critic={}", "critic={trunk: shared}", "reinforce_pp"],
    ),
    "critic without ppo": (["--critic={}"], ["critic: objective flowrl has none", "leave the section out"]),
    "shared and warmed up": (
        ["--objective={name: ppo}", "--critic={trunk: shared, warmup_steps: 2}"],
        ["critic.warmup_steps = 2", "critic.trunk=own"],
    ),
    "shared and from elsewhere": (
        ["--objective={name: ppo}", "--critic={trunk: shared, path: elsewhere}"],
        ["critic.path = 'elsewhere'", "critic.trunk=own"],
    ),
    "critic warms up to the end": (
        ["--objective={name: ppo}", "--critic.warmup_steps=6"],
        ["critic.warmup_steps = 6", "none of steps = 6", "take fewer"],
    ),
    "critic from nowhere": (
        ["--objective={name: ppo}", "--critic.path=nowhere"],
        ["critic.path = 'nowhere'", "no config.json"],
    ),
    "critic's rate": (["--objective={name: ppo}", "--critic.optimizer.lr=0"], ["critic.optimizer.lr = 0", "greater"]),
    "critic's decay": (
        ["--objective={name: ppo}", "--critic.optimizer={decay: linear, warmup_steps: 12}"],
        ["critic.optimizer.warmup_steps = 12", "none of the 12 updates", "take fewer"],
    ),
    "KL that pulls at nothing": (
        ["--objective={name: ppo, kl_coef: 0.1, kl_in: loss}", "--critic={}"],
        ["objective.kl_in = 'loss'", "kl_estimator = k1", "k2 or k3"],
    ),
    "dropout of nothing": (
        ["--objective={name: flowrl, z: zero, z_dropout: 0.1}"],
        ["objective.z_dropout = 0.1", "objective.z = mlp", "leave this out"],
    ),
    "tokens' weights": (["--objective={name: flowrl, tis: token}"], ["objective.tis = 'token'", "'sum' or 'mean'"]),
    "weights in FP8": (["--model.fp8_params=true"], ["model.fp8_params = True", "optimizer.distributed=true"]),
    "Megatron's name for it": (["--megatron.fp8_param=true"], ["megatron.fp8_param = True", "model.fp8"]),
    "ours, not Megatron's": (["--megatron.hidden_size=8"], ["megatron.hidden_size = 8", "follows from model.path"]),
    "dropout": (["--megatron.hidden_dropout=0.1"], ["megatron.hidden_dropout = 0.1", "must be 0.0", "leave it out"]),
    "experts": (["--megatron.num_moe_experts=4"], ["num_moe_experts = 4", "another model", "recompute_method"]),
    "no method": (["--megatron.recompute_granularity=full"], ["refused by TransformerConfig", "recompute_method"]),
    "method of nothing": (
        ["--megatron.recompute_method=uniform"],
        ["megatron.recompute_method = 'uniform'", "only with megatron.recompute_granularity=full"],
    ),
    "cut distribution": (
        ["--rollout.top_p=0.9"],
        ["rollout.top_p = 0.9", "another distribution", "rollout.allow_truncated_sampling=true"],
    ),
    "resume from nothing": (["--resume=elsewhere"], ["--resume elsewhere", "auto or never"]),
    "run folder": (["--run_dir=/dev/null/run"], ["run_dir = '/dev/null/run'", "choose another"]),
}  # fmt: skip


@pytest.mark.parametrize("case", TABLE)
def test_refused(case: str, model: Path, tmp_path: Path, capsys: Capture) -> None:
    overrides, parts = TABLE[case]
    message = refused(capsys, tmp_path, str(write_config(tmp_path, model)), *overrides)
    for part in parts:
        assert part in message, message
    assert message.count("\n") == (2 if case == "two faults" else 1), message


FILES: dict[str, tuple[bytes | None, list[str]]] = {
    "missing": (None, ["no such file", "give the path of a YAML file"]),
    "not YAML": (b"a: [1", ["not valid YAML"]),
    "not text": (b"\xff\xfe\x00", ["cannot be read"]),
    "a list": (b"- 1\n", ["holds list, not a mapping of settings"]),
    "empty": (b"", ["holds NoneType, not a mapping"]),
    "a number as name": (b"1: 2\n", ["1 = 1: keys should be strings"]),
    "most of it missing": (b"steps: 3\n", ["run_dir: missing", "--run_dir=VALUE", "model: missing", "reward: missing"]),
}


@pytest.mark.parametrize("case", FILES)
def test_settings_file(case: str, tmp_path: Path, capsys: Capture) -> None:
    content, parts = FILES[case]
    path = tmp_path / "settings.yaml"
    if content is not None:
        path.write_bytes(content)
    message = refused(capsys, tmp_path, str(path))
    for part in parts:
        assert part in message, message


def test_native_kernels_that_cannot_be_built(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said before any rank is started."""

    def refuse(kind: str) -> Path:
        raise build.BuildError("no C++ compiler found")

    kernels.load.cache_clear()
    monkeypatch.setattr(build, "library", refuse)
    message = refused(capsys, tmp_path, str(write_config(tmp_path, model)), "--ops.backend=native")
    assert message == "flowrl-mega: ops.backend = native: no C++ compiler found\n"


def test_liger_where_it_is_not_installed(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    message = refused(capsys, tmp_path, str(write_config(tmp_path, model)), "--ops.backend=liger")
    assert message.startswith("flowrl-mega: ops.backend = liger: ") and "liger_kernel" in message
    assert "pip install 'liger-kernel[cutedsl]" in message and message.endswith("or use ops.backend=auto\n")


def test_yaml_says_off(model: Path, tmp_path: Path) -> None:
    """YAML 1.1 reads off as false; the setting is meant."""
    off = ["monitor.wandb=off", "model.fp8=off", "model.reference_fp8=off"]
    config = cli.load_config(write_config(tmp_path, model), off)
    assert (config.monitor.wandb, config.model.fp8, config.model.reference_fp8) == ("off", "off", "off")


def test_layers_that_this_machine_does_not_have(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "transformer_engine", lambda: backends.Found(False, "no NVIDIA GPU"))
    config = str(write_config(tmp_path, model))
    message = refused(capsys, tmp_path, config, "--model.spec=te")
    assert message.startswith("flowrl-mega: model.spec = te: no NVIDIA GPU; set model.spec=auto")
    message = refused(capsys, tmp_path, config, "--model.fp8=blockwise", "--model.dtype=bf16")
    assert message == "flowrl-mega: model.fp8 = blockwise: no NVIDIA GPU; set model.fp8=off\n"


def _no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def _cut_weights(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 100)


def _no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def _unknown_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "mamba"}))


def _ends_nowhere(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [1, 15]}')


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (_no_weights, "holds no *.safetensors"),
        (_cut_weights, "model.safetensors: broken or cut off"),
        (_no_tokenizer, "its tokenizer cannot be loaded"),
        (_unknown_type, "model_type = 'mamba' is not supported; one of llama"),
        (lambda folder: (folder / "config.json").write_text("{"), "not valid JSON"),
        (lambda folder: (folder / "generation_config.json").write_text("{"), "generation_config.json: not valid JSON"),
        (_ends_nowhere, "answers are to end at token 15 (eos_token_id), outside the model's vocabulary of 15"),
    ],
)
def test_broken_model_folder(change: Callable[[Path], None], part: str, tmp_path: Path, capsys: Capture) -> None:
    folder = make("llama", tmp_path / "model", vocab=15)
    change(folder)
    message = refused(capsys, tmp_path, str(write_config(tmp_path, folder)))
    assert part in message and str(folder) in message


def test_broken_rows(model: Path, tmp_path: Path, capsys: Capture) -> None:
    rows = tmp_path / "rows.jsonl"
    config = str(write_config(tmp_path, model, data={"path": str(rows), "held_out": 0.5}))
    for text, part in [('{"prompt": "1:"}\n{"text": 1}\n', 'line 2: has no "prompt"'), ("", "holds no rows")]:
        rows.write_text(text)
        assert part in refused(capsys, tmp_path, config)


def test_reward_with_a_fault_of_its_own(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    reward = tmp_path / "bad_reward.py"
    reward.write_text("import no_such_module\n")
    message = refused(capsys, tmp_path, str(write_config(tmp_path, model)), f"--reward={reward}:score")
    assert "No module named 'no_such_module'" in message and str(reward) in message


def test_wandb_is_not_installed(model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = refused(capsys, tmp_path, str(write_config(tmp_path, model)), "--monitor.wandb=offline")
    assert "monitor.wandb = offline" in message and "pip install wandb" in message


def test_a_rank_that_nobody_can_meet(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    message = refused(capsys, tmp_path, str(write_config(tmp_path, model)))
    assert "MASTER_ADDR" in message and "torchrun or srun" in message
    monkeypatch.setenv("RANK", "2")  # and nobody else will say it
    assert "RANK = 2, WORLD_SIZE = 2" in refused(capsys, tmp_path, str(write_config(tmp_path, model)))


@pytest.mark.parametrize("hosts", [True, False])
def test_a_place_to_meet_that_is_none(hosts: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program has the port; or the host is nobody's name, and the others have been waited for long enough."""

    def store(*args: object, **kwargs: object) -> None:
        raise torch.distributed.DistNetworkError("timed out")

    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1" if hosts else "no-such-host.invalid")
        monkeypatch.setenv("MASTER_PORT", str(port))
        if not hosts:
            monkeypatch.setattr(torch.distributed, "TCPStore", store)
        words = "rank 0 cannot listen there .*address already in use.*another port" if hosts else "no such host"
        with pytest.raises(ConfigError, match=f"MASTER_ADDR = .*, MASTER_PORT = {port}: {words}"):
            faults._store(hosts)
    if not hosts:
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        with pytest.raises(torch.distributed.DistNetworkError):  # a host that is there may be late
            faults._store(hosts)


@pytest.mark.parametrize("name", ["RANK", "WORLD_SIZE", "SLURM_PROCID"])
def test_a_place_that_is_left_over(
    name: str, model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It breaks no run, and silences no message."""
    monkeypatch.setenv(name, "3")
    config = str(write_config(tmp_path, model))
    assert "stepps: no such setting" in refused(capsys, tmp_path, config, "--stepps=3")
    monkeypatch.setenv(name, "3")
    assert cli.main(["train", config, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert "2 = tp 2 x dp 1" in said.out and said.err.count("left over") == (name != "SLURM_PROCID")


def test_a_process_of_its_own_answers_before_it_imports_torch(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from flowrl_mega import cli; code = cli.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    config = str(write_config(tmp_path, model))
    job = subprocess.run(
        [sys.executable, "-c", code, "train", config, "--rollout.groupsize=4"],
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert job.returncode == 2 and job.stdout == ""
    assert job.stderr == "flowrl-mega: rollout.groupsize: no such setting; did you mean 'group_size'?\n"


@pytest.mark.parametrize(("rank", "messages"), [("0", 1), ("1", 0)])
def test_under_srun_the_first_rank_alone_speaks(
    rank: str, messages: int, model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Settings are refused before srun's names are translated to torchrun's: each of 32 ranks said so."""
    monkeypatch.setenv("SLURM_PROCID", rank)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert cli.main(["train", str(write_config(tmp_path, model)), "--stepps=3"]) == 2
    assert capsys.readouterr().err.count("stepps: no such setting") == messages


def test_no_command_and_no_such_command(capsys: Capture) -> None:
    for arguments in ([], ["trian", "x.yaml"], ["train"]):
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        assert stopped.value.code == 2
        assert "usage: flowrl-mega" in capsys.readouterr().err


def test_nothing_was_started() -> None:
    """All of the above ran in this process, and none of it joined a job."""
    assert not torch.distributed.is_initialized()
