"""tools/benchmarks/logprob.py on a few rows: what it writes, what it measures against, that wrong results are void."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.tools

TOOLS = Path(__file__).parents[2] / "tools" / "benchmarks"
TOKENS, VOCAB = 6, 40


@pytest.fixture
def tool(monkeypatch):
    """The benchmark's modules, importable by name as they are when a script in their folder runs."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import logprob

    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return logprob


@pytest.fixture
def case(tool):
    from measure import Case

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(TOKENS, VOCAB, generator=generator) * 3
    return Case((logits,), torch.arange(TOKENS), torch.linspace(-1, 1, TOKENS))


def options(tool, *arguments: str):
    return tool.parser().parse_args(["--tokens", str(TOKENS), "--vocab", str(VOCAB), "--rounds", "2", *arguments])


def compare(tool, monkeypatch, providers):
    """All of a comparison but torch.compile, other packages, and the processes that measure memory."""
    import logprob_logits

    monkeypatch.setattr(logprob_logits, "providers", lambda device: providers)
    monkeypatch.setattr(tool, "memory", lambda *_: 0)
    rows, extra = tool.compare(options(tool, "--dtype", "fp32"), [])
    return {(row["provider"], row["pass"]): row for row in rows}, extra["not_run"]


def right(logits, target):
    import logprob_logits

    return logprob_logits.statistics(logits, target)


def wrong_in_the_gradient_alone(logits, target):
    logp, entropy = right(logits, target)
    return logp + 1e-3 * (logits - logits.detach()).sum(1), entropy


def nan(logits, target):
    logp, entropy = right(logits, target)
    return logp, entropy * torch.nan


@pytest.mark.integration
def test_the_command_writes_rows_of_the_agreed_form(tool, tmp_path):
    """The command itself, once, with its processes for memory."""
    file = tmp_path / "rows.json"
    size = ["--tokens", "300", "--vocab", "3000", "--rounds", "2", "--threads", "1"]  # 3.6 MB: visible in the memory
    tool.main([*size, "--dtype", "fp32", "--providers", "torch.eager/log_softmax", "--json", str(file)])
    written = json.loads(file.read_text())
    assert {"cpu", "cores", "versions", "date", "command", "threads", "not_run"} <= written["machine"].keys()
    rows = [row for row in written["rows"] if row["provider"] == "torch.eager"]
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert (row["dtype"], row["tokens"], row["vocab"], row["logits_bytes"]) == ("fp32", 300, 3000, 3_600_000)
        assert row["seconds"] > 0
        assert row["void"] is None
        # log-softmax, its exp and their product; or log-softmax, the gradient of the gather, and the gradient.
        assert 2.5 < row["peak_extra_bytes"] / row["logits_bytes"] < 4.5
    assert any(row["provider"] == "floor" for row in written["rows"])


def test_a_wrong_provider_is_void_and_gets_no_ratio(tool, monkeypatch):
    functions = {"torch.eager": right, "wrong": wrong_in_the_gradient_alone, "nan": nan}
    rows, _ = compare(tool, monkeypatch, {name: lambda device, f=f: f for name, f in functions.items()})
    assert rows["torch.eager", "forward+backward"]["void"] is None
    assert rows["torch.eager", "forward+backward"]["faster_than_torch.eager"] == 1.0
    assert rows["wrong", "forward"]["void"] is None
    for name, pass_ in [("wrong", "forward+backward"), ("nan", "forward"), ("nan", "forward+backward")]:
        row = rows[name, pass_]
        assert ("gradient" if name == "wrong" else "entropy") in row["void"]
        assert not {"times_floor", "faster_than_torch.eager"} & row.keys()


def test_the_fastest_formulation_that_is_right_stands_for_its_provider(tool, monkeypatch):
    table = {"torch.eager/right": lambda device: right, "torch.eager/nan": lambda device: nan}
    rows, _ = compare(tool, monkeypatch, table)
    row = rows["torch.eager", "forward"]
    assert row["runs_as"] == "torch.eager/right"
    assert set(row["formulations"]) == set(table)


def test_who_cannot_run_is_listed_with_the_reason(tool, monkeypatch):
    import logprob_logits

    def broken(device):
        raise RuntimeError("no such\nkernel")

    def fails_later(logits, target):
        raise MemoryError("too much")

    table = {"liger": logprob_logits.liger_vocab_parallel, "broken": broken, "later": lambda device: fails_later}
    rows, not_run = compare(tool, monkeypatch, table | {"torch.eager": lambda device: right})
    assert not_run["liger"] == "needs CUDA"
    assert not_run["broken"] == "RuntimeError: no such kernel"
    assert "too much" in not_run["later"]
    assert {name for name, _ in rows} == {"floor", "torch.eager"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_oracle_is_float64_on_the_rounded_logits(case, dtype):
    """Errors of the exact values rounded to float32, in float32's own units: none above half a step."""
    import logprob_oracle
    from measure import Case, Result

    case = Case((case.leaves[0].to(dtype),), case.target, case.upstream)
    exact = logprob_oracle.exact(case.leaves[0], case.target, case.upstream)
    assert {tensor.dtype for tensor in exact} == {torch.float64}
    leaf = case.leaves[0].double().requires_grad_()
    logp = torch.log_softmax(leaf, -1)
    logp[torch.arange(TOKENS), case.target].backward(case.upstream.double())
    assert (exact.d_logits - leaf.grad).abs().max() < 1e-15
    assert (exact.entropy + (logp.exp() * logp).sum(-1)).abs().max() < 1e-14
    result = Result(exact.logp.float(), exact.entropy.float(), (exact.d_logits.to(dtype),))
    errors = logprob_oracle.logits_errors(case, result)
    assert 0 < errors["logp"].largest < 1e-6
    assert all(error.allowance <= 1 for error in errors.values())


def test_the_oracle_in_chunks_finds_the_worst_row(case, monkeypatch):
    import logprob_oracle
    from measure import Result

    monkeypatch.setattr(logprob_oracle, "CHUNK_BYTES", 8 * VOCAB * 4)
    exact = logprob_oracle.exact(case.leaves[0], case.target, case.upstream)
    for row in (0, TOKENS - 1):
        logp = exact.logp.clone()
        logp[row] += 1e-3
        errors = logprob_oracle.logits_errors(case, Result(logp, exact.entropy, (exact.d_logits,)))
        assert errors["logp"].largest == pytest.approx(1e-3)
        assert logprob_oracle.wrong("native", errors)


def test_providers_get_copies_and_take_turns(case):
    from measure import interleaved

    calls = []

    def overwrites(name):
        def work(given):
            calls.append(name)
            given.leaves[0].zero_()

        return work

    before = case.leaves[0].clone()
    seconds = interleaved({name: overwrites(name) for name in "ab"}, case, rounds=3)
    assert calls == list("abbaab")
    assert torch.equal(case.leaves[0], before)
    assert min(seconds.values()) > 0


def test_head(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "memory", lambda *_: 0)
    file = tmp_path / "head.json"
    size = ["--tokens", "24", "--hidden", "16", "--vocab", "64", "--rounds", "2"]
    tool.main(["--head", *size, "--providers", "native.torch", "torch.eager", "--json", str(file)])
    rows = [row for row in json.loads(file.read_text())["rows"] if row["provider"] == "native.torch"]
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    assert all(row["void"] is None and row["hidden"] == 16 and row["mode"] == "head" for row in rows)


def test_noise_of_bf16_logits_is_far_above_that_of_fp32(tool, tmp_path, monkeypatch):
    import logprob_noise

    monkeypatch.setattr(logprob_noise, "TRIALS", 2)
    file = tmp_path / "noise.json"
    tool.main(["--noise", "--tokens", "24", "--hidden", "16", "--vocab", "64", "--json", str(file)])
    found = {row["logits"]: row["rms_error_of_sum_d"] for row in json.loads(file.read_text())["rows"]}
    assert found["fp32"] < 1e-4 < 1e-3 < found["bf16"]
