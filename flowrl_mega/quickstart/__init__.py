"""`flowrl-mega quickstart`: GRPO, GRPO with KL and FlowRL from one warm start, at equal samples and equal updates."""
