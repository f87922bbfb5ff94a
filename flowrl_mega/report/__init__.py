"""Runs as one HTML page that needs nothing beside it: `flowrl-mega report`."""
