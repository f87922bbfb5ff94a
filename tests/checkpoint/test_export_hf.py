"""A run that exports its policy, and runs that start from a Megatron checkpoint: what is in step_N/hf, to the bit.

The oracles are the sharded policy itself, asked in the moment of saving, and transformers on the exported folder.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from conversion_models import tensors
from jobs import Job, records, write_config
from safetensors.torch import load_file
from tiny_models import in_float64, make, random_sequences, response_logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl_mega.checkpoint import hf_to_megatron, megatron_to_hf
from flowrl_mega.cli import main
from flowrl_mega.model.weights import named_tensors
from flowrl_mega.parallel.packing import pack
from flowrl_mega.run import Run

SEQUENCES = random_sequences([(3, 5), (6, 4)], vocab=15)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
pytestmark = pytest.mark.ranks


def record_policy() -> None:
    """In a rank, before it trains: whenever a checkpoint is saved, the policy's weights, log Z and log-probs go to
    RUN_DIR/policy.pt."""
    save = Run.save

    def recorded(self: Run) -> None:
        policy = self.models.policy
        assert policy.partition is not None
        logp = policy.score([pack(SEQUENCES)], 1.0)[0].logp
        found = {"weights": dict(named_tensors(policy)), "log_z": policy.partition.state_dict(), "logp": logp}
        if self.layout.rank == 0:
            torch.save(found, Path(self.config.run_dir) / "policy.pt")
        save(self)

    Run.save = recorded  # type: ignore[method-assign]


EXPORTING = ["--steps=4", "--checkpoint.every=4", "--checkpoint.export_hf=true"]


def train(folder: Path, model: Path, *settings: str, tp: int = 2) -> Path:
    """Four steps of two updates that end in a checkpoint and its export; gives the run's folder."""
    folder.mkdir(exist_ok=True)
    arguments = ["train", str(write_config(folder, model)), *EXPORTING, f"--parallel.tp={tp}", *settings]
    Job(arguments, folder / "log", world=tp, before="test_export_hf:record_policy").run()
    return folder / "run"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd vocabulary, so that tp = 2 pads it; and several files, so that two ranks have something to export."""
    folder = make("llama", tmp_path_factory.mktemp("model"), vocab=15)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    (folder / "model.safetensors").unlink()
    loaded.save_pretrained(folder, max_shard_size="30KB")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": config["dtype"]}))  # for old readers too
    return folder


@pytest.fixture(scope="module")
def runs(model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One at tp = 2 for each type of weights."""
    return {dtype: train(tmp_path_factory.mktemp(dtype), model, f"--model.dtype={dtype}") for dtype in DTYPES}


def export(run: Path) -> Path:
    return run / "checkpoints" / "step_4" / "hf"


def files(folder: Path) -> dict[str, bytes]:
    """All files, however deep."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_export_is_the_policy(dtype: str, runs: dict[str, Path], model: Path) -> None:
    """Every tensor of the model and no other, as trained; log Z beside them, not among them; and files to load it."""
    hf, policy = export(runs[dtype]), torch.load(runs[dtype] / "policy.pt")
    exported, original = tensors(hf), tensors(model)
    require_equal(exported, policy["weights"])
    assert exported.keys() == original.keys()
    assert {tensor.dtype for tensor in exported.values()} == {DTYPES[dtype]}
    assert all(not torch.equal(exported[name], original[name].to(DTYPES[dtype])) for name in original), "it was trained"
    require_equal(load_file(hf / "log_z" / "log_z.safetensors"), policy["log_z"])
    assert json.loads((hf / "log_z" / "log_z.json").read_text())["kind"] == "mlp"

    found, wanted = files(hf), files(model)
    assert found.keys() == wanted.keys() | {"log_z/log_z.safetensors", "log_z/log_z.json"}
    stored = str(DTYPES[dtype]).removeprefix("torch.")
    config = {**json.loads(wanted["config.json"]), "dtype": stored, "torch_dtype": stored}
    assert json.loads(found["config.json"]) == config
    for name in wanted.keys() - {"config.json", "model.safetensors.index.json"}:
        assert name.endswith(".safetensors") or found[name] == wanted[name], name


def require_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def test_transformers_computes_what_the_policy_computes(runs: dict[str, Path]) -> None:
    """The two sides share no code: names, layout and config.json of the export are right, or this is off."""
    hf = export(runs["fp32"])
    _, report = AutoModelForCausalLM.from_pretrained(hf, output_loading_info=True)
    assert not any(report.values()), report
    assert AutoTokenizer.from_pretrained(hf)("1+2")["input_ids"]
    theirs = in_float64(hf)
    with torch.no_grad():
        logits = [response_logits(theirs, s.prompt, s.response).log_softmax(-1) for s in SEQUENCES]
    wanted = torch.cat([x[range(len(s.response)), s.response] for x, s in zip(logits, SEQUENCES, strict=True)])
    batch, ours = pack(SEQUENCES), torch.load(runs["fp32"] / "policy.pt")["logp"]
    by_index = dict(zip(batch.index.tolist(), ours.split(batch.response_cu_seqlens.diff().tolist()), strict=True))
    assert (torch.cat([by_index[i] for i in range(len(SEQUENCES))]) - wanted).abs().max() < 2e-5


@pytest.mark.integration
@pytest.mark.parametrize("tp", [1, 2])
def test_the_same_run_from_a_converted_checkpoint(tp: int, runs: dict[str, Path], model: Path, tmp_path: Path) -> None:
    """Policy and reference start with the same weights, prompts with the same ids, answers end at the same tokens."""
    hf_to_megatron(model, tmp_path / "megatron", show=False)
    found = train(tmp_path / "from_megatron", tmp_path / "megatron", tp=tp)
    wanted = runs["fp32"] if tp == 2 else train(tmp_path / "from_hf", model, tp=tp)
    for name in ("metrics", "samples", "evaluation"):
        rows = records(wanted, name)
        assert rows and records(found, name) == rows, name
    assert len({row["loss/policy"] for row in records(found, "metrics")}) == 4, "the runs must change something"
    assert files(export(found)) == files(export(wanted))


def test_a_model_folder_that_goes_away_while_training(
    runs: dict[str, Path], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scratch disks are cleared. The checkpoint must stand on its own: exported, converted, taken as model.path."""
    copy = shutil.copytree(model, tmp_path / "model")
    reward = tmp_path / "reward.py"
    reward.write_text(
        "import shutil\nfrom flowrl_mega.rewards.sums import score as right\n"
        f"def score(row, response):\n    shutil.rmtree({str(copy)!r}, ignore_errors=True)\n"
        "    return right(row, response)\n"
    )
    run = train(tmp_path, copy, f"--reward={reward}:score")
    checkpoint = run / "checkpoints" / "step_4"
    assert not copy.exists()
    megatron_to_hf(checkpoint, tmp_path / "converted", show=False)
    assert files(checkpoint / "hf") == files(tmp_path / "converted") == files(export(runs["fp32"]))

    again = [str(tmp_path / "config.yaml"), f"--model.path={checkpoint}", f"--run_dir={tmp_path / 'again'}"]
    assert main(["train", *again, "--dry-run"]) == 0
    assert f"{checkpoint} (Megatron checkpoint): llama, 2 layers of 32" in capsys.readouterr().out
    assert main(["train", *again, f"--model.path={model}", "--dry-run"]) == 0
    assert f"{model} (Hugging Face folder): llama, 2 layers of 32" in capsys.readouterr().out
