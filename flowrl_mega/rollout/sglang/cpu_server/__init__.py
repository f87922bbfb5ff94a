"""Runs SGLang's server on a machine without GPU: `launch.py`, for the server's own interpreter."""
