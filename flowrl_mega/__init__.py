"""FlowRL on Megatron-core: match the reward distribution instead of maximising the reward (arXiv 2509.15207)."""

__version__ = "0.1.0"
