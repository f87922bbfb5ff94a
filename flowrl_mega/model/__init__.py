"""The policy on Megatron's GPTModel, the frozen reference, the partition function, and generation with their weights."""

import flowrl_mega.parallel  # noqa: F401  ("cuda" must mean "cpu" before megatron is imported)
