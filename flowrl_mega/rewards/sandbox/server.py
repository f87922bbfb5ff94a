"""The fork server: a small warm interpreter that starts programs for one worker process. stdlib only, run by path.

    python -I -S -B server.py SOCKET_FD [file or folder of a module that programs may import] ..

Each message on the socket asks for one program: limits as JSON, and five file descriptors. The server forks a
supervisor for it and goes on; it never reads a program or a test, so that no later program finds them in its memory.
The server ends when the worker does (end of file), and so does every supervisor with its program.

    worker - server - supervisor - init (pid 1 of the program's namespaces) - program
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
from importlib import import_module

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import jail  # type: ignore[import-not-found] # noqa: E402
import packages  # type: ignore[import-not-found] # noqa: E402
import supervisor  # type: ignore[import-not-found] # noqa: E402

sys.path.pop(0)

# What such programs import most: loaded once here instead of in every one of them.
WARM = """bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools heapq io
itertools json math operator os queue random re statistics string textwrap threading traceback types typing""".split()


def main() -> None:
    requests = socket.socket(fileno=int(sys.argv[1]))
    paths, modules = jail.interpreter_paths(), jail.real_paths(sys.argv[2:])
    packages.allow(sys.argv[2:])
    jail.seccomp.prepare()
    for name in WARM:
        import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # supervisors that ended are nobody's to wait for
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's Ctrl-C: it will close the socket
    gc.collect()
    gc.freeze()
    while True:
        message, fds, _, _ = socket.recv_fds(requests, 1 << 16, 8)
        if not message:
            return
        if os.fork() == 0:
            requests.close()
            supervisor.run(message, fds, paths, modules)  # never returns
        for fd in fds:
            os.close(fd)


main()
