"""Sampling with the policy's own weights: a batched decoder with a key-value cache on `whole` Megatron tensors.

Megatron's modules spend most of a small decode step in Python and, at tp > 1, in all-reduces of a few bytes.
This decoder reads the very same tensors (no copy at tp = 1) and is about 100 lines.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl_mega.config import Diverged
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.names import local_name


@dataclass(frozen=True)
class Sampling:
    """How answers are drawn. `temperature` 0 is greedy."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    stop_ids: tuple[int, ...] = ()


@dataclass
class Generated:
    """N answers: `tokens` and `logp` [N, max_tokens], valid up to `lengths` [N]; `stopped` [N]: by a stop id."""

    tokens: Tensor
    logp: Tensor
    lengths: Tensor
    stopped: Tensor


class _Cache:
    """Keys [layers, N, h_kv, d, capacity] and values [.., capacity, d], filled up to `length`; the first `pad` [N]
    positions are empty. Keys lie transposed: that is how a decode step multiplies them."""

    def __init__(self, arch: Architecture, rows: int, capacity: int, pad: Tensor, like: Tensor) -> None:
        heads = (arch.layers, rows, arch.kv_heads)
        self.keys = like.new_empty(*heads, arch.head_dim, capacity)
        self.values = like.new_empty(*heads, capacity, arch.head_dim)
        self.arch, self.length, self.pad, self.ragged = arch, 0, pad, bool(pad.any())

    def select(self, rows: Tensor, capacity: int) -> _Cache:
        """A cache of these rows, with room for `capacity` positions."""
        other = _Cache(self.arch, rows.numel(), capacity, self.pad[rows], self.keys)
        other.keys[..., : self.length] = self.keys[:, rows, :, :, : self.length]
        other.values[..., : self.length, :] = self.values[:, rows, :, : self.length]
        other.length, other.ragged = self.length, self.ragged
        return other

    def attend(self, i: int, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Layer i's attention of s new positions, which are added to the cache: q [N, h, s, d] -> [N, h, s, d]."""
        (n, heads, s, d), end = q.shape, self.length + q.shape[2]
        self.keys[i, ..., self.length : end] = k.transpose(2, 3)
        self.values[i, ..., self.length : end, :] = v
        if s > 1:
            assert self.length == 0, "a prompt is computed in one piece"
            grouped = heads != k.shape[1]
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
        # One position: two batched products over the heads that share a key are 1.5-1.9x faster on CPU than the fused
        # attention, which shares out its work by head and repeats keys for each.
        scores = (q.view(n, k.shape[1], -1, d) * d**-0.5) @ self.keys[i, ..., :end]
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return (scores.softmax(-1) @ self.values[i, ..., :end, :]).view(n, heads, 1, d)


class Decoder:
    """Runs `whole` weights (see model/weights.py) over [N, S] tokens, left-padded, with a key-value cache."""

    def __init__(self, arch: Architecture, weights: dict[str, Tensor]) -> None:
        self.arch, weights = arch, {local_name(name): tensor for name, tensor in weights.items()}
        self.embedding = weights["embedding.word_embeddings.weight"]
        self.head = weights.get("output_layer.weight", self.embedding)[: arch.vocab].t()
        if not self.head.is_cuda:  # on a GPU the product itself accumulates in fp32
            self.head = self.head.float()
        self.norm = weights["decoder.final_layernorm.weight"]
        self.layers = [_layer(weights, i) for i in range(arch.layers)]

    def logits(self, tokens: Tensor, cache: _Cache) -> Tensor:
        """[N, S] new tokens -> [N, V] fp32 logits after the last of them."""
        arch, s = self.arch, tokens.shape[1]
        positions = torch.arange(cache.length, cache.length + s, device=tokens.device) - cache.pad[:, None]
        angles = positions.clamp(min=0)[:, None, :, None].float() * self.arch.inv_freq.to(tokens.device)
        rotation = (angles.cos().to(self.embedding.dtype), angles.sin().to(self.embedding.dtype))
        mask = _mask(cache, s, tokens.device)
        x = F.embedding(tokens, self.embedding)
        for i, layer in enumerate(self.layers):
            normed = F.rms_norm(x, (arch.hidden,), layer["norm1"], arch.norm_eps)
            x = x + self._attention(i, layer, normed, rotation, mask, cache)
            normed = F.rms_norm(x, (arch.hidden,), layer["norm2"], arch.norm_eps)
            gate, up = F.linear(normed, layer["fc1"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["fc2"])
        cache.length += s
        last = F.rms_norm(x[:, -1], (arch.hidden,), self.norm, arch.norm_eps)
        if last.is_cuda and last.dtype != torch.float32:
            return torch.mm(last, self.head, out_dtype=torch.float32)
        return last.float() @ self.head

    def _attention(
        self,
        i: int,
        layer: dict[str, Tensor],
        x: Tensor,
        rotation: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: _Cache,
    ) -> Tensor:
        arch, (n, s, _) = self.arch, x.shape
        group = arch.heads // arch.kv_heads
        qkv = F.linear(x, layer["qkv"], layer.get("qkv_bias")).view(n, s, arch.kv_heads, group + 2, arch.head_dim)
        q, k, v = qkv.split([group, 1, 1], dim=3)
        q, k, v = (y.reshape(n, s, -1, arch.head_dim).transpose(1, 2) for y in (q, k, v))
        if arch.qk_norm:
            q = F.rms_norm(q, (arch.head_dim,), layer["q_norm"], arch.norm_eps)
            k = F.rms_norm(k, (arch.head_dim,), layer["k_norm"], arch.norm_eps)
        out = cache.attend(i, _rotate(q, *rotation), _rotate(k, *rotation), v, mask)
        return F.linear(out.transpose(1, 2).reshape(n, s, -1), layer["proj"])


def _layer(weights: dict[str, Tensor], i: int) -> dict[str, Tensor]:
    names = {
        "norm1": "input_layernorm.weight", "norm2": "pre_mlp_layernorm.weight",
        "qkv": "self_attention.linear_qkv.weight", "qkv_bias": "self_attention.linear_qkv.bias",
        "q_norm": "self_attention.q_layernorm.weight", "k_norm": "self_attention.k_layernorm.weight",
        "proj": "self_attention.linear_proj.weight", "fc1": "mlp.linear_fc1.weight", "fc2": "mlp.linear_fc2.weight",
    }  # fmt: skip
    return {short: weights[full] for short, name in names.items() if (full := f"decoder.layers.{i}.{name}") in weights}


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, half-rotation form. x [N, h, S, d], cos and sin [N, 1, S, d / 2]."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def _mask(cache: _Cache, s: int, device: torch.device) -> Tensor | None:
    """True where a query may look; None where nothing is left-padded."""
    if not cache.ragged:
        return None
    end = cache.length + s
    keys = torch.arange(end, device=device)
    causal = keys <= torch.arange(cache.length, end, device=device)[:, None]
    own = keys == torch.arange(cache.length, end, device=device)[:, None]  # padding rows need something to look at
    return ((keys >= cache.pad[:, None, None]) & causal | own)[:, None]


@torch.no_grad()
def generate(
    decoder: Decoder,
    prompts: list[list[int]],
    answers: int,
    sampling: Sampling,
    noise: Tensor,
    ended: Callable[[Generated, list[int]], None] | None = None,
) -> Generated:
    """`answers` answers to each prompt, prompt by prompt. `ended` is told, as soon as they are, which rows are done.

    noise [N, max_tokens] uniform in [0, 1): one number decides one token (inverse of the cumulative distribution),
    so an answer depends on its own row alone, not on its neighbours, the batch, or how ranks share the work.
    A prompt is computed once for all its answers; answers that ended leave the batch when half of it is done.
    """
    device = decoder.embedding.device
    longest, n = max(map(len, prompts)), len(prompts) * answers
    capacity = longest + sampling.max_tokens
    pad = torch.tensor([longest - len(p) for p in prompts], device=device)
    tokens = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=device)
    cache = _Cache(decoder.arch, len(prompts), longest, pad, decoder.embedding)
    logits = decoder.logits(tokens, cache).repeat_interleave(answers, 0)
    cache = cache.select(torch.arange(len(prompts), device=device).repeat_interleave(answers), capacity)
    out = Generated(
        tokens=torch.zeros(n, sampling.max_tokens, dtype=torch.long, device=device),
        logp=torch.zeros(n, sampling.max_tokens, device=device),
        lengths=torch.full((n,), sampling.max_tokens, device=device),
        stopped=torch.zeros(n, dtype=torch.bool, device=device),
    )
    stop_ids = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
    active = torch.arange(n, device=device)  # the answer of each row that is still in the batch
    done = torch.zeros(n, dtype=torch.bool, device=device)
    for step in range(sampling.max_tokens):
        token, logp = draw(logits, noise[active, step], sampling)
        out.tokens[active, step], out.logp[active, step] = token, logp
        stops = ~done & torch.isin(token, stop_ids)
        out.lengths[active[stops]], out.stopped[active[stops]] = step + 1, True
        is_last = step + 1 == sampling.max_tokens
        if ended and (rows := active[~done if is_last else stops].tolist()):
            ended(out, rows)
        done = done | stops
        if is_last or bool(done.all()):
            break
        if 2 * int(done.sum()) > done.numel():
            left = (~done).nonzero()[:, 0]
            active, token, done = active[left], token[left], done[left]
            cache = cache.select(left, capacity)
        logits = decoder.logits(token[:, None], cache)
    return out


def draw(logits: Tensor, noise: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """One token a row and its log-prob under the temperature-scaled distribution (before top_p and top_k).

    Raises Diverged where logits are NaN or infinite: no token can be drawn.
    """
    logp = torch.log_softmax(logits / (sampling.temperature or 1.0), -1)
    if bool(logp[:, 0].isnan().any()):  # one such logit makes all of its row NaN
        raise Diverged(
            "the policy's logits are NaN or infinite, so no answer can be drawn: its weights have diverged; go on from "
            "an earlier checkpoint with a lower optimizer.lr, or with other weights in model.path if this is step 1"
        )
    if sampling.temperature == 0:
        best, token = logp.max(-1)
        return token, best
    cumulative = _truncate(logp.exp(), sampling).cumsum(-1)
    total = cumulative[:, -1]
    point = torch.minimum(noise * total, torch.nextafter(total, torch.zeros_like(total)))  # never past the last id
    token = torch.searchsorted(cumulative, point[:, None], right=True)[:, 0]
    return token, logp.gather(1, token[:, None])[:, 0]


def _truncate(p: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities [N, V] with all but the `top_k` likeliest and the `top_p` nucleus set to 0 (not renormalised)."""
    if sampling.top_k == 0 and sampling.top_p == 1:
        return p
    ordered, order = p.sort(-1, descending=True)
    if sampling.top_k:
        ordered[:, sampling.top_k :] = 0
    ordered[ordered.cumsum(-1) - ordered >= sampling.top_p * ordered.sum(-1, keepdim=True)] = 0
    return torch.zeros_like(p).scatter(1, order, ordered)
