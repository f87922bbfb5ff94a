"""How good and how varied the answers are: sampled on held-out prompts, or computed where answers can be enumerated."""
