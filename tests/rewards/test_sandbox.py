"""The sandbox itself: what it says, what it refuses, and what is left when those who started it die."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from pathlib import Path

import psutil
import pytest
from sandbox_watch import SYSTEM_PYTHON, adopting_orphans, as_nobody, changed, left_over, opened, programs, state

from flowrl_mega.config import CodeSettings, ConfigError, RewardSettings
from flowrl_mega.rewards import code
from flowrl_mega.rewards.sandbox import choose as choosing
from flowrl_mega.rewards.sandbox import client
from flowrl_mega.rewards.sandbox.client import Sandbox, SandboxError, advance

pytestmark = pytest.mark.slow

# Wall time is that of a busy machine: only the tests of that limit have less.
LIMITS = CodeSettings(wall_s=60.0, cpu_s=2, memory_mb=128, disk_mb=8, processes=12, open_files=32, output_kb=256)
PATIENT = {"cpu_s": 10}  # for programs that pass another limit
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module", autouse=True)
def orphans():
    with adopting_orphans():
        yield


@pytest.fixture(scope="module", params=["root", "user", "process"])
def sandbox(request):
    with opened(LIMITS, request.param) as sandbox:
        yield sandbox


def python(source):
    return textwrap.dedent(source)


# What a program has


def test_input_output_and_status(sandbox):
    """More than a pipe holds, both ways, and the exit status."""
    text = "line\n" * 40_000
    outcome = sandbox.run(
        "import sys\nsys.stdout.write(sys.stdin.read())\nprint('é', file=sys.stderr)\nsys.exit(3)", text
    )
    assert (outcome.end, outcome.code, outcome.stdout, outcome.stderr) == ("exit", 3, text, "é\n")


def test_what_a_program_has(sandbox):
    """Its descriptors, environment, folder; nothing of ours."""
    outcome = sandbox.run(
        python("""
        import json, os, sys
        fds = []
        for fd in range(1024):
            try:
                os.fstat(fd)
                fds.append(fd)
            except OSError:
                pass
        open("mine", "w").write("x")
        print(json.dumps([fds, sorted(os.environ), os.listdir("."), os.getcwd() == os.environ["HOME"], sys.argv]))
        """),
        "",
    )
    one_thread = ["MKL_NUM_THREADS", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
    names = sorted(["HOME", "LANG", "PATH", "TMPDIR", *one_thread])
    assert json.loads(outcome.stdout) == [[0, 1, 2], names, ["mine"], True, ["program.py"]]


def test_each_program_has_a_folder_of_its_own(sandbox):
    """What one writes the next does not see, and nobody keeps."""
    where = sandbox.run("import os\nopen('left', 'w').write('x')\nprint(os.getcwd())", "").stdout.strip()
    assert sandbox.run("import os\nprint(os.listdir('.'))", "").stdout == "[]\n"
    assert not (Path(where) / "left").exists()


def test_the_end_of_an_interpreter(sandbox):
    """Threads are joined, exit functions run, buffers are flushed, as in a plain interpreter."""
    source = python("""
        import atexit, threading, time
        printed = threading.Event()
        def late():
            printed.wait()
            time.sleep(0.1)
            print("thread", end=" ")
        atexit.register(lambda: print("exit"))
        threading.Thread(target=late).start()
        print("main", end=" ")
        printed.set()
        raise SystemExit("a text")
    """)
    plain = subprocess.run([sys.executable, "-I", "-c", source], capture_output=True, text=True, check=False)
    outcome = sandbox.run(source, "")
    assert (outcome.stdout, outcome.code) == (plain.stdout, plain.returncode)
    assert outcome.stdout == "main thread exit\n"


@pytest.mark.parametrize(
    "source, limits, end",
    [
        ("while True: pass", {"cpu_s": 1}, "cpu"),
        ("import os\nfor _ in range(20):\n    if os.fork() == 0: break\nwhile True: pass", {}, "cpu processes exit"),
        ("import time\ntime.sleep(99)", {"wall_s": 1.0}, "wall"),
        (
            "import mmap, time\nx = [mmap.mmap(-1, 10**7) for _ in range(100)]\nfor b in x: b[:] = bytes(len(b))\n"
            "time.sleep(20)",  # shared memory is counted by the supervisor, which looks at it now and then
            {"cpu_s": 20},
            "memory exit",
        ),
        ("while True: print('x' * 1000)", {}, "flood"),
        ("open('big', 'wb').write(bytes(9 << 20))", {}, "exit"),
        ("import os\nos.abort()", {}, "signal"),
    ],
)
def test_limits(sandbox, source, limits, end, monkeypatch):
    """At every level; "exit" is a refusal by the kernel, an exception in the program. No other limit is near: which of
    two is reached first would depend on the load of the machine."""
    monkeypatch.setattr(sandbox, "settings", LIMITS.model_copy(update=PATIENT | limits))
    running = programs()
    outcome = sandbox.run(source, "")
    assert outcome.end in end.split()
    assert outcome.end != "exit" or outcome.code
    assert left_over(running) == set()


@pytest.mark.parametrize(
    "news, limits, end", [(b"status 0", {}, "itself"), (b"", {"cpu_s": 0}, "cpu"), (b"", {}, "wall")]
)
def test_a_supervisor_that_wakes_late_tells_what_came_first(news, limits, end, monkeypatch):
    """On a busy machine it may be woken after the wall time, here 0 s: what ended before that was not too slow."""
    monkeypatch.syspath_prepend(Path(client.__file__).parent)
    supervisor = importlib.import_module("supervisor")
    most = {"wall_s": 0.0, "cpu_s": 10**6, "memory_mb": 10**6, "processes": 10**6} | limits
    reading, writing = os.pipe()
    worker, control = socket.socketpair()
    with worker, control, open(reading, "rb"), open(writing, "wb", buffering=0) as tell:
        tell.write(news)
        watching = supervisor.Supervisor({"limits": most, "way": "process"}, [], [])
        assert watching.watch(os.getpid(), control.fileno(), reading) == end


@pytest.mark.parametrize("waited, left", [(0.0, -1.0), (1.5, 0.5), (99.0, 2.0)])
def test_wall_time_does_not_count_the_wait_for_a_processor(waited, left, monkeypatch):
    """A verdict would depend on the machine's other work. A program can wait on purpose, with many threads that want to
    run: so at most four times the limit."""
    monkeypatch.syspath_prepend(Path(client.__file__).parent)
    supervisor = importlib.import_module("supervisor")
    monkeypatch.setattr(supervisor, "waited", lambda name: waited)
    monkeypatch.setattr(supervisor.time, "monotonic", lambda: 12.0)
    watching = supervisor.Supervisor({"limits": {"wall_s": 1.0}, "way": "process"}, [], [])
    monkeypatch.setattr(watching, "family", lambda first: ({str(first)}, {}))
    assert watching.left(10.0, 4) == left and watching.left(11.5, 4) == 0.5
    assert client.WALLS == supervisor.WALLS


def test_what_a_process_waits_for_a_processor(monkeypatch):
    """Of two that share one, each waits about half of the time; one that sleeps does not wait."""
    monkeypatch.syspath_prepend(Path(client.__file__).parent)
    supervisor = importlib.import_module("supervisor")
    sources = ("while True: pass", "while True: pass", "import time\ntime.sleep(600)")
    processes = [subprocess.Popen([sys.executable, "-S", "-c", source]) for source in sources]
    try:
        names = [str(process.pid) for process in processes]
        for process in processes:
            os.sched_setaffinity(process.pid, {min(os.sched_getaffinity(0))})
        time.sleep(0.5)
        before = [supervisor.waited(name) for name in names]
        time.sleep(2.0)
        busy, other, sleeping = (supervisor.waited(name) - was for name, was in zip(names, before, strict=True))
        assert busy + other > 0.5 and min(busy, other) > 0.1 > sleeping, (busy, other, sleeping)
        assert supervisor.waited("nobody") == 0
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_the_kernels_limit_of_cpu_time_has_a_signal_of_its_own(sandbox):
    """Not SIGKILL, whose reason would have to be guessed from CPU seconds: the kernel counts ticks of its clock, which
    on a busy machine are more than the seconds that a program has had."""
    source = "import os, resource, signal\nprint(resource.getrlimit(resource.RLIMIT_CPU), flush=True)\n"
    outcome = sandbox.run(source + "os.kill(os.getpid(), signal.SIGXCPU)", "")
    assert (outcome.end, outcome.stdout) == ("cpu", f"({LIMITS.cpu_s}, {LIMITS.cpu_s + 1})\n")


def appear(look):
    """What `look` gives as soon as it gives something."""
    deadline = time.monotonic() + 60
    while not (found := look()):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def test_processes_that_leave_the_group_are_ended(sandbox):
    """Also where there is no pid namespace: the supervisor is the reaper of all that its program left."""
    running = programs()
    source = (
        "import os, time\nfor _ in range(3):\n    if os.fork() == 0:\n        os.setsid()\n        if os.fork() == 0:\n"
    )
    outcome = sandbox.run(source + "            time.sleep(60)\n        os._exit(0)\nprint('done')", "")
    assert outcome.stdout == "done\n"
    assert left_over(running) == set()


def test_a_hundred_programs_leave_nothing(sandbox):
    """No descriptor, no process, no mount: a leak of one each would show."""
    before, running = state(), programs()
    for number in range(100):
        assert sandbox.run("print(input())", str(number)).stdout == f"{number}\n"
    assert changed(before) == {}
    assert left_over(running) == set()
    assert len(os.listdir(f"/proc/{sandbox._server.pid}/fd")) < 8


# Who dies with whom


def test_a_killed_worker_takes_its_programs_along(sandbox, tmp_path):
    """SIGKILL, while a program with a daemon of its own sleeps: all of it ends at once, not at its time limit."""
    running = programs()
    worker = tmp_path / "worker.py"
    worker.write_text(
        python(f"""
        from flowrl_mega.config import CodeSettings
        from flowrl_mega.rewards.sandbox.client import Sandbox
        sandbox = Sandbox(CodeSettings(wall_s=600.0, cpu_s=600), {sandbox.way!r})
        print("ready", flush=True)
        sandbox.run("import os, time\\nos.fork() or os.setsid()\\ntime.sleep(600)", "")
        """)
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, str(worker)], stdout=subprocess.PIPE, env=environment)
    try:
        assert process.stdout.readline() == b"ready\n"
        appear(lambda: len(programs() - running) >= 6)  # worker, server, supervisor, init and two
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    assert left_over(running) == set()


def test_a_dead_server_is_an_error_and_is_replaced(monkeypatch):
    """Of the sandbox, never a verdict on the program; the next call starts another."""
    monkeypatch.setattr(code, "_sandboxes", {})
    settings = RewardSettings(function="-", code=LIMITS.model_copy(update={"isolation": "process"}))
    tests = {"type": "stdin", "inputs": ["1"], "outputs": ["1"]}
    right = "```python\nprint(input())\n```"
    assert code.score({"tests": tests}, right, settings)[0] == 1.0
    (server,) = code._sandboxes.values()
    os.kill(server._server.pid, signal.SIGKILL)
    with pytest.raises(SandboxError):
        server.run("print(1)", "")
    server._server.wait()
    assert code.score({"tests": tests}, right, settings)[0] == 1.0
    (server,) = code._sandboxes.values()
    server.close()


def test_the_server_holds_nothing_of_the_trainer(sandbox):
    """Three descriptors, its socket, a pipe to itself, and no variable but two."""
    server = psutil.Process(sandbox._server.pid)
    targets = [os.readlink(f"/proc/{server.pid}/fd/{fd}") for fd in os.listdir(f"/proc/{server.pid}/fd")]
    assert sum(target.startswith("socket:") for target in targets) == 1
    assert all(target == "/dev/null" or target.startswith(("socket:", "pipe:", "/tmp/")) for target in targets)
    assert set(server.environ()) <= {"PATH", "LANG", "LC_CTYPE"}
    assert "flowrl_mega.config" not in " ".join(server.cmdline())


# What is said and refused


def test_says_which_isolation_is_active():
    """As this machine has it; the words name the level."""
    assert code.describe(code.DEFAULT).startswith("sandbox: namespaces, made by ")


def failing(way):
    """A Sandbox that cannot make namespaces, as in a container that forbids them."""

    def make(settings, asked):
        return Sandbox(settings, asked if asked == "process" else way)

    return make


def test_refuses_less_than_asked_for(monkeypatch):
    """The message names the setting, what there is, what was found wanting, and the fix."""
    monkeypatch.setattr(choosing, "Sandbox", failing("no such way"))
    monkeypatch.setattr(choosing, "wanting", lambda faults: "kernel.unprivileged_userns_clone is 0")
    with pytest.raises(ConfigError) as caught:
        code.describe(code.DEFAULT)
    for words in ("reward.code.isolation = 'namespaces'", "only 'process'", "userns_clone is 0", "reward.code.url"):
        assert words in str(caught.value)


def test_a_first_program_that_is_not_held_is_no_isolation(monkeypatch):
    """What counts is what a program finds, not that a system call was accepted."""
    real = Sandbox
    monkeypatch.setattr(choosing, "Sandbox", lambda settings, way: real(settings, "process"))
    with pytest.raises(ConfigError, match="saw other processes or wrote outside"):
        code.describe(code.DEFAULT)


def test_takes_less_where_that_is_asked_for(monkeypatch):
    """isolation: process is the least, so a machine that has more gives more."""
    asked = RewardSettings(function="-", code=CodeSettings(isolation="process"))
    assert code.describe(asked).startswith("sandbox: namespaces")
    monkeypatch.setattr(choosing, "Sandbox", failing("no such way"))
    assert "NO network or file isolation" in code.describe(asked)


def test_names_the_sysctl_that_forbids(monkeypatch, tmp_path):
    """Of a machine where user namespaces are off; the file is a stand-in for the one in /proc/sys."""
    monkeypatch.setattr(choosing, "SYSCTLS", {str(tmp_path / "userns"): ("0", "1")})
    (tmp_path / "userns").write_text("0\n")
    assert "userns is 0 (as root: sysctl -w" in choosing.wanting([])


@pytest.mark.parametrize("path, words", [("/no/such/python", "/no/such/python"), ("/bin/true", "isolation")])
def test_an_interpreter_that_is_none(path, words, monkeypatch):
    """Named, with its fix, and without waiting for what has ended already."""
    monkeypatch.setattr(client, "GRACE", 1e9)
    with pytest.raises(ConfigError, match=words):
        code.describe(RewardSettings(function="-", code=CodeSettings(python=path)))


def test_another_interpreter(monkeypatch):
    """reward.code.python; its own packages can be imported."""
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"no {SYSTEM_PYTHON}")
    settings = CodeSettings(python=str(SYSTEM_PYTHON), isolation="process")
    sandbox, _ = choosing.choose(settings)
    try:
        assert (
            sandbox.run("import sys\nprint(sys.executable, 'site' in sys.modules)", "").stdout
            == f"{SYSTEM_PYTHON} True\n"
        )
    finally:
        sandbox.close()


def test_an_interpreter_beneath_tmp(sandbox):
    """Where a program's own folder is: it has its packages, read-only, and the folder is still a program's."""
    if not SYSTEM_PYTHON.exists():
        pytest.skip(f"no {SYSTEM_PYTHON}")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", folder], check=True)
        (package,) = Path(folder).glob("lib/python*/site-packages")
        (package / "only_there.py").write_text("six = 6")
        settings = LIMITS.model_copy(update={"python": f"{folder}/bin/python", "isolation": "process"})
        own, _ = choosing.accepted(settings, sandbox.way)
        try:
            source = (
                "import only_there as o\nopen('mine', 'w').write('x')\nprint(o.six, flush=True)\nopen(o.__file__, 'w')"
            )
            outcome = own.run(source, "")
        finally:
            own.close()
        assert outcome.stdout == "6\n", outcome
        if sandbox.way != "process":
            assert outcome.code and (package / "only_there.py").read_text() == "six = 6"


def test_an_interpreter_that_the_sandbox_hides(monkeypatch):
    """Is refused: its packages would be missing without a word."""
    monkeypatch.setattr(choosing, "PROBE", choosing.PROBE.replace("sys.base_prefix", "'/nowhere'"))
    with pytest.raises(ConfigError, match="would not find its packages in /nowhere"):
        choosing.choose(LIMITS)


def test_the_trainers_packages_are_not_there(sandbox):
    """But for numpy; nor its repository: no site-packages, no current folder on the path."""
    for name in ("flowrl_mega", "torch", "yaml"):
        assert "ModuleNotFoundError" in sandbox.run(f"import {name}", "").stderr


def test_as_a_user_without_rights(tmp_path, monkeypatch):
    """A child that really is another user, with the machine's own interpreter: root's tests cannot show this."""

    def work(settings):
        sandbox, words = choosing.choose(LIMITS.model_copy(update=settings))
        assert words.startswith("namespaces, made by this user")
        outcome = sandbox.run("import os\nprint(os.getuid(), os.path.exists('/etc/passwd'))", "")
        assert outcome.stdout == "1000 False\n", outcome

    as_nobody(work, tmp_path, monkeypatch)


FORBIDDING = """
echo 0 > /proc/sys/user/max_user_namespaces
exec setpriv --bounding-set -sys_admin --inh-caps -sys_admin "$@"
"""


def test_a_machine_that_forbids_namespaces():
    """Really: a user namespace whose own sysctl allows no more of them, and no right to make the others."""
    if not (shutil.which("unshare") and shutil.which("setpriv")):
        pytest.skip("needs unshare and setpriv")
    source = python("""
        from flowrl_mega.config import CodeSettings, ConfigError, RewardSettings
        from flowrl_mega.rewards import code
        try:
            code.describe(code.DEFAULT)
        except ConfigError as error:
            print(error)
        print(code.describe(RewardSettings(function='-', code=CodeSettings(isolation="process"))))
    """)
    command = ["unshare", "-Ur", "sh", "-c", FORBIDDING, "sh", sys.executable, "-c", source]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if "unshare failed" in done.stderr:
        pytest.skip(done.stderr)
    refusal, taken = done.stdout.splitlines()
    assert refusal.startswith("reward.code.isolation = 'namespaces': this machine does not give it")
    assert "user.max_user_namespaces is 0 (as root: sysctl -w user.max_user_namespaces=10000)" in refusal
    assert taken.startswith("sandbox: process (") and "NO network or file isolation" in taken


def test_a_supervisor_that_hangs_is_an_error(sandbox, monkeypatch):
    """The worker does not wait for ever on its own machinery."""
    monkeypatch.setattr(client, "GRACE", 0.1 - client.WALLS * LIMITS.wall_s)
    with (
        pytest.raises(SandboxError, match="did not answer in time"),
        sandbox.start(mode="stdin", parts=["import time\ntime.sleep(9)"], prelude=False) as program,
    ):
        monkeypatch.setattr(client, "GRACE", 10.0)
        advance([program], lambda: False)
