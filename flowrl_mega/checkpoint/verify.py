"""Is this Megatron checkpoint that Hugging Face model? Every tensor, bit for bit, and the logits of both."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.initialization import no_init_weights

from flowrl_mega.checkpoint.policy_tensors import MegatronTensors, checkpoint_architecture
from flowrl_mega.checkpoint.state import load_megatron
from flowrl_mega.config import Config, ConfigError
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.checks import check_layout
from flowrl_mega.model.hf_folder import INDEX, HfFolder
from flowrl_mega.model.layers import PackedRows
from flowrl_mega.model.names import hf_shapes
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.packing import PackedBatch, Sequence, pack
from flowrl_mega.settings import validated

TOLERANCE = 1e-5  # of the largest logit: fp32 rounding through 30 layers is a tenth of it, one weight off by 1e-2 more
LENGTHS = (1, 7, 32, 128)  # tokens of the fixed prompts


@dataclass
class Difference:
    """The largest one found, as a share of the largest logit, or in the tensor's own units; and where, in words."""

    size: float
    where: str


def check_inputs(hf: Path, ckpt: Path, tp: int) -> None:
    """Refuse what cannot be compared, before any rank starts."""
    arch = read_architecture(hf, "--hf")
    HfFolder(hf).check(arch)
    stored = checkpoint_architecture(ckpt)
    MegatronTensors(ckpt, stored)
    ours, theirs = hf_shapes(stored), hf_shapes(arch)
    if ours != theirs:
        name = next(n for n in (*theirs, *ours) if theirs.get(n) != ours.get(n))
        raise ConfigError(
            f"--ckpt = {str(ckpt)!r}: is of another model than --hf = {str(hf)!r}: {name!r} is {ours.get(name)} in it, "
            f"not {theirs.get(name)}; give the two of one model"
        )
    if tp < 1:
        raise ConfigError(f"--tp = {tp}: no number of ranks; use 1 or more")
    check_layout(arch, tp, "--tp")


def compare_tensors(hf: Path, ckpt: Path) -> tuple[int, Difference]:
    """(how many tensors, the largest difference), in the checkpoint's precision; the ranks share them. Collective.

    After `check_inputs`, so that both hold the same tensors.
    """
    found = MegatronTensors(ckpt, read_architecture(ckpt, "--ckpt"))
    folder = HfFolder(hf)
    folder.tell_left_alone()
    stored = as_stored(folder)
    names = [name for name in found.slots if name in folder.tensors]  # not a tied head that is stored once
    worst, share = Difference(0.0, ""), -(-len(names) // dist.get_world_size())
    for name in names[dist.get_rank() * share :][:share]:
        ours, theirs = found.read(name), stored(name).to(found.dtype(name))
        if not torch.equal(ours, theirs):
            gap = (ours.double() - theirs.double()).abs().nan_to_num(nan=float("inf"))
            at = torch.unravel_index(gap.argmax(), gap.shape)
            values = f"{ours[at].item():.6g} in the checkpoint, {theirs[at].item():.6g} in the folder"
            found_here = Difference(gap[at].item(), f"{name}{[int(i) for i in at]}: {values}")
            worst = max(worst, found_here, key=lambda d: d.size)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, worst)
    return len(names), max(everyone, key=lambda d: d.size)


def as_stored(folder: HfFolder) -> Callable[[str], Tensor]:
    """Reads a tensor from the file that the folder's index names for it, with none of the code that conversion reads
    with: it must not agree with a mistake of that. transformers honours no index: the last file that has it wins."""
    index = folder.path / INDEX
    named = json.loads(index.read_text())["weight_map"] if index.is_file() else folder.weight_map

    def read(name: str) -> Tensor:
        with safe_open(folder.path / named[name], framework="pt") as file:
            return file.get_tensor(name)

    return read


def compare_logits(hf: Path, ckpt: Path, tp: int) -> Difference:
    """Logits of the fixed prompts in fp32, ours at `tp` against transformers'; only rank 0 compares. Collective.

    Both compute with weights of the checkpoint's precision: transformers gets the folder's tensors rounded to it.
    """
    config = validated(Config, {
        "run_dir": "none", "steps": 1, "model": {"path": str(ckpt)}, "parallel": {"tp": tp, "timeout_s": 7200},
        "data": {"task": "sums"}, "reward": "none:none",
    }, "")  # fmt: skip
    layout = layouts.init(config.parallel, config.seed)
    ours = _our_logits(ckpt, config, layout)
    difference = Difference(0.0, "")
    if layout.rank == 0:
        difference = _largest(ours, _their_logits(hf, ckpt))
    dist.barrier()
    return difference


def prompts(vocab: int) -> list[Sequence]:
    """The fixed ones: spread over the vocabulary, from one token to long enough for all rotary frequencies to count."""
    generator = torch.Generator().manual_seed(0)
    draw = [torch.randint(vocab, (length,), generator=generator).tolist() for length in LENGTHS]
    return [Sequence(i, ids, [0]) for i, ids in enumerate(draw)]  # the one-token answer makes a row of its prompt's end


def _our_logits(ckpt: Path, config: Config, layout: layouts.Layout) -> list[Tensor]:
    arch = read_architecture(ckpt, "--ckpt")
    policy = Policy(arch, config, layout, log_z=None)
    load_megatron(policy, ckpt)
    policy.train(False)
    return whole_logits(policy, pack(prompts(arch.vocab), device=layout.device))


@torch.no_grad()
def whole_logits(policy: Policy, batch: PackedBatch) -> list[Tensor]:
    """[rows, V] of each sequence by its index, on the CPU, gathered over the vocabulary's shards. Collective."""
    mine = (
        policy.stages[0]
        .gpt(
            input_ids=batch.tokens[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            packed_seq_params=PackedRows.of(batch),
        )[0]
        .contiguous()
    )
    shards = [torch.empty_like(mine) for _ in range(policy.layout.tp)]
    dist.all_gather(shards, mine, group=policy.layout.tp_group)
    logits = torch.cat([shard.cpu() for shard in shards], -1)[:, : policy.arch.vocab]
    by_sequence = logits.split(batch.cu_seqlens.diff().tolist())[: batch.size]  # the rest is tail padding
    return [by_sequence[i].clone() for i in batch.index.argsort().tolist()]


def _their_logits(hf: Path, ckpt: Path) -> list[Tensor]:
    """transformers' in fp32, from the folder's tensors in the checkpoint's precision."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(hf), dtype=torch.float32).eval()
    model.tie_weights()
    found, stored = MegatronTensors(ckpt, read_architecture(ckpt, "--ckpt")), as_stored(HfFolder(hf))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(stored(name).to(found.dtype(name)))
        model.to(device)
        return [model(torch.tensor([p.prompt], device=device)).logits[0].cpu() for p in prompts(found.arch.vocab)]


def _largest(ours: list[Tensor], theirs: list[Tensor]) -> Difference:
    """The largest difference of two sets of logits, relative to the largest logit."""
    scale, worst = max(logits.abs().max().item() for logits in theirs), Difference(-1.0, "")
    for prompt, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        gap = (a.double() - b.double()).abs().nan_to_num(nan=float("inf"))
        row, token = (int(i) for i in torch.unravel_index(gap.argmax(), gap.shape))
        where = f"prompt {prompt}, position {row}, token {token}: {a[row, token]:.6g}, transformers {b[row, token]:.6g}"
        worst = max(worst, Difference(gap[row, token].item() / scale, where), key=lambda d: d.size)
    return worst
