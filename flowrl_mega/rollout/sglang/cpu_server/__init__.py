"""What a machine without GPU needs to run SGLang's server: `launch.py`, run by the server's own interpreter."""
