"""From published data to prompt stores: recipes, checks, duplicates, contamination. Training imports none of it."""
