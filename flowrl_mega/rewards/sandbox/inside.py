"""What a program's own process does: take its streams, run the program, answer calls. stdlib only.

Nothing here is trusted: the program shares this interpreter and can rewrite all of it. So there is no verdict and no
expected output in it, only answers. The judge of a `check` test runs in a second process, with tests but no program.

Frames on CHANNEL, first byte: from a program R ready, M no such function, V a value, E an exception; from a judge
C a call, P all passed, F failed, B the tests themselves do not work.
"""

from __future__ import annotations

import atexit
import base64
import builtins
import contextlib
import fcntl
import json
import os
import random
import re
import sys
import threading
import traceback
import types
from collections.abc import Callable
from typing import Any, NoReturn

import codec  # type: ignore[import-not-found]
import prelude  # type: ignore[import-not-found]

CHANNEL = 3
# The server's, and so every program's, beside its folder. Libraries of linear algebra would start a thread for every
# core, more than a program may have.
ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"}
ENVIRONMENT |= dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")


def take_streams(streams: list[int]) -> None:
    """stdin, stdout, stderr and the channel become fds 0 to 3."""
    high = [fcntl.fcntl(fd, fcntl.F_DUPFD, 64) for fd in streams]
    for target, fd in enumerate(high):
        os.dup2(fd, target)


def _send(frame: bytes) -> None:
    codec.write_frame(CHANNEL, frame)


def _receive() -> bytes | None:
    return codec.read_frame(CHANNEL)


def by_lines(request: dict, mark: str) -> None:
    """Calls or judges where there is no channel, in a remote sandbox: frames come in the request, and leave as lines
    of stdout that begin with `mark`."""
    frames = [base64.b64decode(frame) for frame in request["frames"]]
    stdout = os.dup(1)

    def send(frame: bytes) -> None:
        os.write(stdout, b"\n" + mark.encode() + base64.b64encode(frame) + b"\n")

    globals().update(_send=send, _receive=lambda: frames.pop(0) if frames else None)
    (_calls if request["mode"] == "call" else _judge)(request)
    os._exit(0)


def _text(fd: int, mode: str, errors: str) -> Any:
    return open(fd, mode, buffering=1 if fd == 2 else -1, encoding="utf-8", errors=errors, closefd=False)  # noqa: SIM115


def run(folder: str) -> NoReturn:
    """Reads what to run from the channel, runs it and ends this process as an interpreter would end."""
    status = 1
    try:
        os.environ["HOME"] = os.environ["TMPDIR"] = folder
        sys.stdin = _text(0, "r", "surrogateescape")
        sys.stdout = _text(1, "w", "surrogateescape")
        sys.stderr = _text(2, "w", "backslashreplace")
        vars(sys).update(__stdin__=sys.stdin, __stdout__=sys.stdout, __stderr__=sys.stderr)
        sys.argv[:] = ["program.py"]
        builtins.quit = builtins.exit = _quit  # type: ignore[assignment]  # `site` makes them, which -S leaves out
        random.seed()  # or all programs would draw what the server was born with
        frame = _receive()
        if frame is not None:
            request = json.loads(frame)
            status = {"stdin": _main, "call": _calls, "judge": _judge}[request["mode"]](request)
    finally:
        os._exit(status)


def _quit(code: object = None) -> NoReturn:
    raise SystemExit(code)


def _main(request: dict) -> int:
    """The program as `__main__`; its exit status, where it is LiveCodeBench's 0 for every SystemExit."""
    os.close(CHANNEL)
    status = 0
    try:
        _execute(request, "__main__")
    except SystemExit as end:
        if not request["prelude"]:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        status = 1
        _tell_error()
    for last in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush):  # type: ignore[attr-defined]
        try:
            last()
        except BaseException:
            status = status or 1
    return status & 0xFF


def _execute(request: dict, name: str) -> types.ModuleType:
    """The program's module, executed; with LiveCodeBench's imports before it where asked for."""
    module = sys.modules[name] = types.ModuleType(name)
    exec(prelude.DIGITS)
    if request["prelude"]:
        exec(prelude.TEXT, module.__dict__)
        module.__dict__.pop(request.get("name", ""), None)  # a function under test must not be operator.add
    *stubs, program = request["parts"]
    for code in (*map(_stub, stubs), compile(program, "program.py", "exec", dont_inherit=True)):
        exec(code, module.__dict__)
    return module


def _stub(source: str) -> types.CodeType:
    """A stub's code. One that is a bare signature, as where the problem's text stands elsewhere, gets a body."""
    try:
        return compile(source, "stub.py", "exec", dont_inherit=True)
    except IndentationError:
        heads = re.findall(r"^([ \t]*)(?:async[ \t]+)?(?:def|class)\b", source, re.MULTILINE)
        body = f"{source}\n{heads[-1] if heads else ''} pass\n"
        return compile(body, "stub.py", "exec", dont_inherit=True)


def _tell_error() -> None:
    try:
        traceback.print_exc()
    except BaseException:  # out of memory, or replaced by the program
        os.write(2, repr(sys.exc_info()[0]).encode())


def _calls(request: dict) -> int:
    """Executes the program, then answers calls until the channel ends."""
    try:
        with contextlib.suppress(SystemExit):  # at a program's end, where its functions are there
            _execute(request, "program")
        function = _find(sys.modules["program"], request["name"])
    except BaseException as error:
        _tell_error()
        _send(b"M" + _described(error))
        return 1
    _send(b"R")
    while True:
        frame = _receive()
        if frame is None:
            return 0
        try:
            args, kwargs = codec.decode(frame)
            reply = b"V" + codec.encode(function(*args, **kwargs))
        except BaseException as error:
            reply = b"E" + _described(error)
        _send(reply)


def _find(module: types.ModuleType, name: str) -> Callable[..., Any]:
    """The function "f", or the method "Solution.f" of a new object; the one that is there, where only one is."""
    owner, _, method = name.rpartition(".")
    if owner and not hasattr(module, owner):
        function = getattr(module, method, None)
        if getattr(function, "__module__", None) == module.__name__:  # not operator.add of the prelude
            return function  # type: ignore[return-value]
    if not owner and not hasattr(module, name) and hasattr(module, "Solution"):
        owner = "Solution"
    return getattr(getattr(module, owner)() if owner else module, method)


def _described(error: BaseException) -> bytes:
    try:
        text = str(error)[:300]
    except BaseException:
        text = ""
    return json.dumps([type(error).__name__, text]).encode()


def _judge(request: dict) -> int:
    """Executes stub and tests, and calls their `check` with a stand-in for the program's function."""
    names: dict[str, Any] = {"__name__": "judge"}
    try:
        exec(_stub(request["stub"]), names)
        exec(compile(request["code"], "tests.py", "exec", dont_inherit=True), names)
        check = names["check"]
    except BaseException as error:
        _send(b"B" + _described(error))
        return 1
    names[request["name"]] = _ask  # tests may call it by its own name
    try:
        check(_ask)
    except BaseException as error:
        _send(b"F" + json.dumps(_failure(error, request["code"])).encode())
    else:
        _send(b"P")
    return 0


def _ask(*args: object, **kwargs: object) -> object:
    """The function under test: a call of it in the other process."""
    _send(b"C" + codec.encode([args, kwargs]))
    reply = _receive()
    if reply is None:
        os._exit(1)
    if reply[:1] == b"V":
        return codec.decode(reply[1:])
    kind, text = json.loads(reply[1:])
    raise _exception(kind, text)


def _exception(kind: str, text: str) -> Exception:
    """A built-in exception of that name. Not one that ends a loop without a word: a test would take it for its end."""
    found = getattr(builtins, kind, None)
    ends_loops = (StopIteration, StopAsyncIteration)
    if isinstance(found, type) and issubclass(found, Exception) and not issubclass(found, ends_loops):
        with contextlib.suppress(TypeError):  # some take more than a text
            return found(text)
    return RuntimeError(f"{kind}: {text}")


def _failure(error: BaseException, code: str) -> list[str]:
    """What failed: the exception's name, its text, and the line of the tests."""
    lines = code.splitlines()
    places = [place.lineno for place in traceback.extract_tb(error.__traceback__) if place.filename == "tests.py"]
    line = lines[places[-1] - 1].strip() if places and places[-1] and places[-1] <= len(lines) else ""
    return [type(error).__name__, str(error)[:300], line[:300]]
