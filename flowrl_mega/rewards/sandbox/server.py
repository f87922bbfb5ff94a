"""The fork server: a small warm interpreter that starts programs for one worker process. stdlib only, run by path.

    python -I -S -B server.py SOCKET_FD [file or folder of a module that programs may import] ..

It first says on the socket how memory is held. Each message on it asks for one program: limits as JSON, and five file
descriptors. The server forks a supervisor for it and goes on; it never reads a program or a test, so that no later
program finds them in its memory. It ends when the worker does (end of file) and its supervisors have; each of them ends
its program then.

    worker - server - supervisor - init (pid 1 of the program's namespaces) - program
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import select
import signal
import socket
import sys
from importlib import import_module

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
import cgroup  # type: ignore[import-not-found] # noqa: E402
import inside  # type: ignore[import-not-found] # noqa: E402
import jail  # type: ignore[import-not-found] # noqa: E402
import packages  # type: ignore[import-not-found] # noqa: E402
import supervisor  # type: ignore[import-not-found] # noqa: E402

sys.path.pop(0)

# What such programs import most: loaded once here instead of in every one of them.
WARM = """bisect calendar cmath collections copy dataclasses datetime decimal enum fractions functools heapq io
itertools json math operator os queue random re statistics string textwrap threading traceback types typing""".split()


class Server:
    def __init__(self, requests: socket.socket) -> None:
        self.requests = requests
        self.paths, self.modules = jail.interpreter_paths(), jail.real_paths(sys.argv[2:])
        self.place = cgroup.find()
        self.running: dict[int, tuple[int, str]] = {}  # supervisors: a copy of the control socket, and the way

    def serve(self) -> None:
        """Until the worker closes its end, and no supervisor is left."""
        self.requests.send(json.dumps({"memory": self.place.kind.name if self.place else ""}).encode())
        woken, waking = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(waking, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        poll = select.poll()
        poll.register(woken, select.POLLIN)
        poll.register(self.requests, select.POLLIN)
        open_ = True
        while open_ or self.running:
            ready = [fd for fd, _ in poll.poll()]
            if woken in ready:
                os.read(woken, 1 << 12)
            self.reap()
            if self.requests.fileno() in ready and not self.take():
                open_ = False
                poll.unregister(self.requests)

    def take(self) -> bool:
        """One request; False: there will be none any more."""
        message = b""
        with contextlib.suppress(ConnectionResetError):  # closed by a worker that has not read this server's first word
            message, fds, _, _ = socket.recv_fds(self.requests, 1 << 16, 8)
        if not message:
            return False
        try:
            process = jail.fork()
        except OSError as error:  # not this server's end
            with contextlib.suppress(OSError):
                os.write(fds[0], supervisor.word("refused", why=f"fork: {error}"))
        else:
            if process == 0:
                self.requests.close()
                for control, _ in self.running.values():
                    os.close(control)
                supervisor.run(message, fds, self.paths, self.modules, self.place)  # never returns
            self.running[process] = os.dup(fds[0]), json.loads(message)["way"]
        for fd in fds:
            os.close(fd)
        return True

    def reap(self) -> None:
        """Takes note of children that ended. A supervisor that its program could have stopped is ended."""
        while True:
            try:
                process, status = os.waitpid(-1, os.WNOHANG | os.WUNTRACED)
            except ChildProcessError:
                return
            if process == 0:
                return
            if process in self.running and os.WIFSTOPPED(status):
                if self.exposed(process):
                    os.kill(process, signal.SIGKILL)
            elif process in self.running:
                self.ended(process, os.WIFSIGNALED(status))

    def ended(self, process: int, killed: bool) -> None:
        """Says what a supervisor that was killed could not, and ends what that has left; then all of it is over."""
        by_it = killed and self.exposed(process)
        control, _ = self.running.pop(process)
        if killed:
            self.end_orphans()
            supervisor.remove_folder(process)
            word = supervisor.word("supervisor" if by_it else "refused", why="its supervisor was killed")
            with contextlib.suppress(OSError):  # the worker has gone
                os.write(control, word)
        if self.place:
            self.place.group(process).remove()
        os.close(control)

    def exposed(self, process: int) -> bool:
        """Whether a supervisor's program is of the same user, and sees it."""
        way = self.running[process][1]
        return way == "process" and not supervisor.has_own_user(way, self.paths)

    def end_orphans(self) -> None:
        """All that became this process's child when its parent died, and what such a one leaves behind in turn."""
        while orphans := supervisor.children(os.getpid()) - self.running.keys():
            for process in orphans:
                with contextlib.suppress(ProcessLookupError, ChildProcessError):
                    os.kill(process, signal.SIGKILL)
                    os.waitpid(process, 0)


def main() -> None:
    server = Server(socket.socket(fileno=int(sys.argv[1])))
    packages.allow(sys.argv[2:])
    jail.prctl(jail.PR_SET_SUBREAPER, 1)  # what a supervisor that was killed leaves
    # Once here instead of in every fork, whose first touch of each page costs a copy of it.
    os.environ.clear()
    os.environ.update(inside.ENVIRONMENT)
    supervisor.id_ranges()
    jail.seccomp.prepare()
    for name in WARM:
        import_module(name)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the trainer's Ctrl-C: it will close the socket
    gc.collect()
    gc.freeze()
    server.serve()


main()
