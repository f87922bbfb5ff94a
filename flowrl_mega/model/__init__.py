"""The policy on Megatron's GPTModel, the frozen reference, log Z, and generation with the policy's own weights."""

import flowrl_mega.parallel  # noqa: F401  ("cuda" must mean "cpu" before megatron is imported)
