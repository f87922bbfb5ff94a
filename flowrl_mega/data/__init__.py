"""Prompts: where they come from, how they become token ids, in which order they are served."""
