"""Which isolation this machine gives: found by running a program in it, and said in words."""

from __future__ import annotations

import json
import os
import platform
from pathlib import Path

from flowrl_mega.config import CodeSettings, ConfigError
from flowrl_mega.rewards.sandbox.client import Sandbox, SandboxError, interpreter

PROBE = """
import json, os, sys
try:
    open("/probe", "w")
    outside = True
except OSError:
    outside = False
print(json.dumps({"pid": os.getpid(), "user": os.getuid(), "others": os.path.exists("/proc/1"), "outside": outside,
    "missing": [path for path in (sys.prefix, sys.base_prefix) if not os.path.isdir(path)]}))
"""
SYSCTLS = {  # a file beneath /proc/sys, the value that forbids user namespaces, and the one that allows them
    "kernel/unprivileged_userns_clone": ("0", "1"),
    "kernel/apparmor_restrict_unprivileged_userns": ("1", "0"),
    "user/max_user_namespaces": ("0", "10000"),
}
NAMESPACES = "own user, mount, pid, network, IPC and host name namespaces, a read-only root with one folder to write in"
PROCESS = "own process group and limits; NO network or file isolation beside a filter of system calls"


def choose(settings: CodeSettings) -> tuple[Sandbox, str]:
    """The strongest isolation that works here, and what it is in words.

    Raises ConfigError that names reward.code.isolation and what is wanting, if that is less than it asks for.
    """
    ways = [*(["root"] if os.geteuid() == 0 else []), "user"]
    faults = []
    for way in [*ways, "process"]:
        try:
            return accepted(settings, way)
        except SandboxError as error:
            faults.append(f"{way}: {str(error).splitlines()[-1]}")
        if way == ways[-1] and settings.isolation == "namespaces":
            raise ConfigError(
                f"reward.code.isolation = {settings.isolation!r}: this machine does not give it, only 'process' "
                f"({PROCESS}); found wanting: {wanting(faults)}; fix: as said, or set reward.code.url to a remote "
                "sandbox, or reward.code.isolation=process where programs may do all that this user may"
            )
    raise ConfigError(f"reward.code.isolation = 'process': no program runs here ({'; '.join(faults)})")


def accepted(settings: CodeSettings, way: str) -> tuple[Sandbox, str]:
    """A sandbox that ran a program and held it, and its description. SandboxError: it did not."""
    try:
        sandbox = Sandbox(settings, way)
    except OSError as error:
        raise ConfigError(
            f"reward.code.python = {settings.python!r}: cannot start {interpreter(settings)[0]} ({error}); "
            "give the path of a Python 3.10 or newer, or null for this one"
        ) from error
    try:
        outcome = sandbox.run(PROBE, "")
        if outcome.end != "exit" or outcome.code:
            said = outcome.stderr.strip()[-300:]
            raise SandboxError(f"a first program ended by {outcome.end} {outcome.code}: {said}")
        found = json.loads(outcome.stdout)
        if way != "process" and (found["pid"] > 2 or found["others"] or found["outside"]):
            raise SandboxError(f"a first program saw other processes or wrote outside its folder: {outcome.stdout}")
        if found["missing"]:
            raise ConfigError(
                f"reward.code.python = {settings.python!r}: programs would not find its packages in "
                f"{found['missing'][0]}, which the sandbox does not show; give an interpreter elsewhere"
            )
    except BaseException:
        sandbox.close()
        raise
    version = sandbox.memory()
    memory = f"memory held by a cgroup ({version}) a program" if version else "memory summed 20 times a second"
    if way == "process":
        as_user = "AS ROOT" if found["user"] == 0 else f"as user {found['user']}"
        return sandbox, f"process ({PROCESS}; {memory}; programs run {as_user})"
    maker = "by root" if way == "root" else "by this user"
    return sandbox, f"namespaces, made {maker} ({NAMESPACES}, no privileges, a filter of system calls; {memory})"


def wanting(faults: list[str]) -> str:
    """What forbids namespaces here, with the fix of each where it is known."""
    found = []
    for name, (forbids, allows) in SYSCTLS.items():
        file = Path("/proc/sys") / name
        if file.exists() and file.read_text().strip() == forbids:
            dotted = name.replace("/", ".")
            found.append(f"{dotted} is {forbids} (as root: sysctl -w {dotted}={allows})")
    release = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in platform.release().split(".")[:2])
    if release < (5, 12):
        found.append(f"Linux {platform.release()} (5.12 or newer)")
    if "Seccomp:\t2" in Path("/proc/self/status").read_text():
        found.append("a container's filter of system calls (docker run --security-opt seccomp=unconfined)")
    return ", ".join([*found, *faults])
