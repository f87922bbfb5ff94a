"""Memory of a published run, counted from the model's sizes and the run's settings: GiB of the fullest GPU, not
measured. What is a guess: `FRAGMENTS`, `CONTEXT`, `ASLEEP`, and which tensors a layer that is made again has at once.
"""

from __future__ import annotations

from typing import NamedTuple

from flowrl_mega.config import Config

GPU = 79.6  # an H100 or A100 of 80 GB
GIB = 2**30
BF16, FP32 = 2, 4
FRAGMENTS = 1.3  # activations, by what the allocator cannot use
CONTEXT = 2.0  # CUDA and NCCL
ASLEEP = 3.0  # a colocated server without weights and cache: its context, CUDA graphs, workspaces
PROMPT = 500  # tokens, beside a full answer in the servers' cache


class Model(NamedTuple):
    """From the model's config.json."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool

    @property
    def kv(self) -> int:
        return self.hidden // self.heads * self.kv_heads

    def layer(self, tp: int) -> int:
        """Parameters of a rank: queries, keys and values with their biases, their projection, the MLP; two norms."""
        columns = self.hidden + 2 * self.kv
        return ((self.hidden + 1) * columns + self.hidden**2 + 3 * self.hidden * self.ffn) // tp + 2 * self.hidden

    def fullest_rank(self, tp: int, pp: int) -> int:
        """Parameters without log Z; of the last of several stages."""
        ends = 2 if pp == 1 and not self.tied else 1
        return self.layers // pp * self.layer(tp) + ends * self.vocab // tp * self.hidden + self.hidden

    @property
    def log_z(self) -> int:
        """The paper's three-layer MLP, on every rank of the last stage."""
        return 2 * self.hidden**2 + 7 * self.hidden + 1


class Memory(NamedTuple):
    """GiB a GPU, but for `parameters` (10^9 a rank) and `answers`, full ones that a server's cache holds."""

    parameters: float
    weights: float
    gradients: float
    master: float
    moments: float
    reference: float
    layer_inputs: float
    layer_again: float
    head: float
    pool: float
    server_weights: float
    answers: float
    sent: float  # buckets of weights on their way to the servers, and what they are gathered from
    saved_by_shares: float  # of master weights and moments, with the distributed optimizer

    @property
    def constant(self) -> float:
        return self.weights + self.gradients + self.master + self.moments + self.reference

    @property
    def before_servers(self) -> float:
        """The moments are made by the first update."""
        return self.constant - self.moments + CONTEXT

    def update(self, fused_adam: bool) -> float:
        """At its fullest; torch's AdamW makes one fp32 copy of the parameters on the way."""
        activations = FRAGMENTS * (self.layer_inputs + max(self.layer_again, self.head))
        return self.constant + activations + CONTEXT + ASLEEP + (0 if fused_adam else self.master)

    @property
    def awake(self) -> float:
        """While servers generate: the trainer has given back what it had cached."""
        return self.constant + CONTEXT + ASLEEP + self.sent + self.pool


def counted(model: Model, config: Config, gpus: int) -> Memory:
    tp, pp, rows = config.parallel.tp, config.parallel.pp, config.batch.tokens_per_microbatch
    dp, shards = gpus // config.parallel.model_ranks, tp if config.parallel.sequence_parallel else 1
    frozen = model.fullest_rank(tp, pp)
    trained, budget = frozen + model.log_z, config.model.first_logits_budget_mb << 20
    parts = dict(
        weights=BF16 * trained,
        gradients=FP32 * trained,
        master=FP32 * trained,
        moments=2 * FP32 * trained,
        reference=BF16 * frozen,
        # 1F1B: the first of pp stages has pp micro-batches under way.
        layer_inputs=BF16 * model.layers // pp * rows * model.hidden // shards * pp,
        # Gate, up and their product with the gradients of the two; nine tensors of the hidden size; whole, under
        # sequence parallelism, what is gathered and its gradient.
        layer_again=rows * (5 * BF16 * model.ffn // tp + 9 * BF16 * model.hidden // shards + 2 * BF16 * model.hidden),
        # Logits kept, made and their gradient; hidden states in bf16, their gradient in both, a product to add to it.
        head=3 * budget + rows * model.hidden * (2 * BF16 + 2 * FP32),
    )
    found = {name: size / GIB for name, size in parts.items()}
    before = sum(found[name] for name in ("weights", "gradients", "master", "reference")) + CONTEXT
    ranks = config.rollout.server_args.get("tp_size", 1)
    pool = config.rollout.server_args["mem_fraction_static"] * (GPU - before)
    server_weights = BF16 * model.fullest_rank(1, 1) / ranks / GIB
    token = 2 * BF16 * model.layers * model.kv / ranks
    return Memory(
        **found,
        parameters=trained / 1e9,
        pool=pool,
        server_weights=server_weights,
        answers=(pool - server_weights) * GIB / token / (PROMPT + config.rollout.max_tokens),
        sent=4 * config.rollout.sync.bucket_mb / 1024,
        saved_by_shares=(found["master"] + found["moments"]) * (1 - 1 / dp),
    )
