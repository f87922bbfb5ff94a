"""The `ablate` command: a grid of settings x seeds, one `flowrl-mega train` for each, and a table of their results."""
