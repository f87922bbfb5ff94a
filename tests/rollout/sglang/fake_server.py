"""A server process for tests of `Fleet`: its `python` and its server in one file, without SGLang.

Called as rollout.python is: `-c CODE` prints a version, anything else is a server's command line, whose flag --fake
says how it behaves.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


def make(folder: Path) -> str:
    """The path of an executable that runs this file; what rollout.python names in tests."""
    python = folder / "python"
    python.write_text(f"#!{sys.executable}\n{Path(__file__).read_text()}")
    python.chmod(0o755)
    return str(python)


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = json.dumps({"pid": os.getpid(), "environment": dict(os.environ), "child": child.pid}).encode()
        self.send_response(401 if mode == "locked" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None: ...


if __name__ == "__main__":
    if sys.argv[1] == "-c":
        print("0.5.23")
        sys.exit()
    words = sys.argv[1:]
    host, port = words[words.index("--host") + 1], int(words[words.index("--port") + 1])
    mode = words[words.index("--fake") + 1] if "--fake" in words else "serves"
    if mode == "dies" or (mode == "dies at odd ports" and port % 2):
        print("loading the model\nerror: the disk is on fire", file=sys.stderr)
        sys.exit(3)
    if mode == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen(["sleep", "600"])
    print("waiting", flush=True)
    if mode == "deaf":
        time.sleep(600)
    HTTPServer((host, port), Answer).serve_forever()
