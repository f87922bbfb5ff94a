"""What a program is locked into: namespaces, a small read-only root, limits, no privileges. stdlib only.

Everything here runs in forks of the fork server, on Linux 5.12 or newer; any failure is an OSError and the program is
then not run.
"""

from __future__ import annotations

import ctypes
import os
import resource
import struct
import sys
import time

import seccomp  # type: ignore[import-not-found]

libc = ctypes.CDLL(None, use_errno=True)
NEWNS, NEWCGROUP, NEWUTS, NEWIPC, NEWUSER, NEWPID, NEWNET = (
    0x20000,
    0x2000000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
BIND, RECURSIVE, PRIVATE, NOSUID, NODEV, DETACH = 4096, 16384, 1 << 18, 2, 4, 2
ATTR_RDONLY, ATTR_NOSUID, AT_RECURSIVE = 1, 2, 0x8000
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_CAPBSET_DROP, PR_SET_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 24, 36, 38
KILL = 9
INSIDE_ID = 1000  # user and group of a program, as it sees itself
MODULES = "/modules"  # where programs find what reward.code.packages names
DEVICES = ("null", "zero", "random", "urandom")
STACK = 64 << 20  # deep recursion is ordinary in such programs
RESERVED = 4 << 30  # address space beyond the memory: arenas and thread stacks reserve, and do not use
INODES_PER_MB = 64


def check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def unshare(flags: int) -> None:
    check(libc.unshare(flags), "unshare")


def prctl(option: int, value: int) -> None:
    check(libc.prctl(option, ctypes.c_ulong(value), 0, 0, 0), f"prctl({option})")


def fork() -> int:
    """os.fork, which waits a while where the machine has no process left: a program that takes them all is ended."""
    for _ in range(100):
        try:
            return os.fork()
        except BlockingIOError:
            time.sleep(0.02)
    return os.fork()


def mount(source: str, target: str, kind: str = "", flags: int = 0, data: str = "") -> None:
    words = [word.encode() for word in (source, target, kind, data)]
    result = libc.mount(words[0], words[1], words[2], ctypes.c_ulong(flags), words[3])
    check(result, f"mount {kind or source} at {target}")


def map_ids(process: int | str, inside: int, user: int, group: int) -> None:
    """Writes the maps of a process in a new user namespace: its id `inside` is `user` and `group` outside."""
    with open(f"/proc/{process}/setgroups", "w") as file:
        file.write("deny")
    for name, outside in (("uid_map", user), ("gid_map", group)):
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(f"{inside} {outside} 1")


def interpreter_paths() -> list[tuple[str, str]]:
    """What this interpreter reads while it runs, (path, path without links): the system's libraries, its own folders.

    Not all of sys.path: a package installed for editing would show its repository.
    """
    own = [sys.prefix, sys.exec_prefix, sys.base_prefix, sys.base_exec_prefix]
    system = ["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/libx32", "/etc/ld.so.cache"]
    paths = [path for path in dict.fromkeys([*system, *sorted(own, key=len)]) if path != "/" and os.path.exists(path)]
    return real_paths(paths)


def real_paths(paths: list[str]) -> list[tuple[str, str]]:
    return [(path, os.path.realpath(path)) for path in paths]


def build_root(paths: list[tuple[str, str]], modules: list[tuple[str, str]], disk_mb: int, stdin: int) -> None:
    """Makes a small tree the root of this mount namespace: `paths` read-only, four devices, and /tmp to write in.

    `modules` lie side by side in MODULES, not where they are outside, which is nobody's to see. The program's folder
    may hold an interpreter, read-only: one that lies beneath /tmp.
    """
    size = os.fstat(stdin).st_size
    mount("none", "/", flags=RECURSIVE | PRIVATE)
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={(size >> 20) + 2}m,mode=755")
    os.mkdir("/tmp/old")
    check(libc.syscall(PIVOT_ROOT[os.uname().machine], b"/tmp", b"/tmp/old"), "pivot_root")
    os.chdir("/")
    os.mkdir("/tmp")
    # Before the interpreter: it may lie beneath /tmp.
    mount("tmpfs", "/tmp", "tmpfs", NOSUID | NODEV, f"size={disk_mb}m,nr_inodes={disk_mb * INODES_PER_MB},mode=1777")
    for path, real in paths:
        if not os.path.exists(real):  # else an earlier folder holds it
            _bind(real)
        if not os.path.lexists(path):
            os.makedirs(os.path.dirname(path), exist_ok=True)
            os.symlink(real, path)
    for path, real in modules:
        _bind(real, f"{MODULES}/{os.path.basename(path)}")
    os.makedirs("/dev", exist_ok=True)
    _copy(stdin, size, "/dev/stdin")  # there is no /proc/self/fd to find it in
    for device in DEVICES:
        _bind(f"/dev/{device}")
    check(libc.umount2(b"/old", DETACH), "umount of the old root")
    os.rmdir("/old")
    _set_attributes("/", AT_RECURSIVE, put=ATTR_RDONLY | ATTR_NOSUID)
    _set_attributes("/tmp", 0, take=ATTR_RDONLY)


def _set_attributes(path: str, flags: int, put: int = 0, take: int = 0) -> None:
    attributes = struct.pack("QQQQ", put, take, 0, 0)
    changed = libc.syscall(MOUNT_SETATTR, -1, path.encode(), flags, attributes, len(attributes))
    check(changed, "mount_setattr (Linux 5.12)")


def _copy(fd: int, size: int, path: str) -> None:
    with open(path, "wb") as file:
        at = 0
        while at < size:
            at += os.sendfile(file.fileno(), fd, at, size - at)
    os.chmod(path, 0o444)


def _bind(path: str, place: str | None = None) -> None:
    """What the old root has at `path`, at that place of the new one; None: at the same."""
    place = place or path
    if os.path.isdir("/old" + path):
        os.makedirs(place, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(place), exist_ok=True)
        os.close(os.open(place, os.O_CREAT | os.O_WRONLY, 0o644))
    mount("/old" + path, place, flags=BIND | RECURSIVE)


def limit(limits: dict) -> None:
    """The kernel's own limits on each process; what they leave open, the supervisor counts."""
    megabyte = 1 << 20
    values = {
        resource.RLIMIT_CPU: limits["cpu_s"],
        resource.RLIMIT_DATA: limits["memory_mb"] * megabyte,
        resource.RLIMIT_AS: limits["memory_mb"] * megabyte + RESERVED,
        resource.RLIMIT_STACK: STACK,
        resource.RLIMIT_FSIZE: limits["disk_mb"] * megabyte,
        resource.RLIMIT_NOFILE: limits["open_files"],
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_MEMLOCK: 0,
        resource.RLIMIT_MSGQUEUE: 0,
    }
    if limits["count_processes"]:
        values[resource.RLIMIT_NPROC] = limits["processes"] + 2  # two of them are ours
    for kind, value in values.items():
        hard = resource.getrlimit(kind)[1]
        # At the soft limit of CPU time the kernel sends SIGXCPU, which says what it is for. A program can ignore that:
        # SIGKILL follows a second later, at the hard limit, if the supervisor's own count has not ended it by then.
        last = value + 1 if kind == resource.RLIMIT_CPU else value
        value, last = (n if hard == resource.RLIM_INFINITY else min(n, hard) for n in (value, last))
        resource.setrlimit(kind, (value, last))


def drop_privileges() -> None:
    """No capabilities, none to be had, and the filter of system calls."""
    for capability in range(64):
        if libc.prctl(PR_CAPBSET_DROP, ctypes.c_ulong(capability), 0, 0, 0):
            break  # beyond the kernel's last one, or not ours to drop: then no exec can raise them either
    header, none = struct.pack("Ii", 0x20080522, 0), struct.pack("IIIIII", 0, 0, 0, 0, 0, 0)
    check(libc.capset(header, none), "capset")
    prctl(PR_SET_NO_NEW_PRIVS, 1)
    seccomp.install(libc)
