"""Fused reductions over sequences: the language-model head and the log-probs of the tokens that were drawn."""

from flowrl_mega.ops.logprob import HeadOutput, lm_head_logprob

__all__ = ["HeadOutput", "lm_head_logprob"]
