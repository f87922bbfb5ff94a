"""Python face of csrc: log-probs of drawn tokens and their sums over sequences, from logits or from hidden states."""

import flowrl_mega.ops.compiled  # noqa: F401  its ops exist once it is imported
from flowrl_mega.ops.build import BuildError
from flowrl_mega.ops.checks import raise_if_flagged
from flowrl_mega.ops.kernels import UnlikeRanks, check_ranks, describe
from flowrl_mega.ops.lm_head import HeadOutput, Shard, lm_head_logprob
from flowrl_mega.ops.logprob import LogProb, logprob
from flowrl_mega.ops.scale_grad import scale_grad

__all__ = [
    "BuildError",
    "HeadOutput",
    "LogProb",
    "Shard",
    "UnlikeRanks",
    "check_ranks",
    "describe",
    "lm_head_logprob",
    "logprob",
    "raise_if_flagged",
    "scale_grad",
]
