"""The system calls that a program is refused: what namespaces and limits do not hold. stdlib only.

Network families that no network namespace covers (vsock reaches a virtual machine's host), memory that belongs to no
process (memfd, System V), tracing, mounts, new namespaces, other processes' limits. They answer EPERM; nothing else is
filtered.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import struct

PR_SET_SECCOMP, FILTER_MODE = 22, 2
NEW_NAMESPACE = 0x7E020000  # the CLONE_NEW* bits of clone's flags
X32 = 0x40000000  # x86-64's second table of system calls
ALLOW, KILL, ERROR = 0x7FFF0000, 0x80000000, 0x00050000
LOAD, EQUAL, AT_LEAST, ANY_BIT, RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
NUMBER_AT, MACHINE_AT, ARGUMENT_AT = 0, 4, 16  # offsets in struct seccomp_data

NAMES = """socket ptrace process_vm_readv process_vm_writev kcmp mount umount2 pivot_root chroot unshare setns keyctl
add_key request_key bpf perf_event_open userfaultfd memfd_create shmget msgget semget mq_open name_to_handle_at
open_by_handle_at fanotify_init clone prlimit64""".split()
MACHINES = {
    "x86_64": (
        0xC000003E,
        "41 101 310 311 312 165 166 155 161 272 308 250 248 249 321 298 323 319 29 68 64 240 303 304 300 56 302",
    ),
    "aarch64": (
        0xC00000B7,
        "198 117 270 271 272 40 39 41 51 97 268 219 217 218 280 241 282 279 194 186 190 180 264 265 262 220 261",
    ),
}
# open_tree move_mount fsopen fsconfig fsmount pidfd_getfd mount_setattr memfd_secret io_uring_setup _enter _register:
# one number on every machine.
NEWER = (428, 429, 430, 431, 432, 438, 442, 447, 425, 426, 427)
CLONE3 = 435  # its flags lie in memory that a filter cannot read: "not there" makes libc take clone


def prepare() -> None:
    """Makes the filter, so that forks have it."""
    if platform.machine() in MACHINES:
        _filter(platform.machine())


def install(libc: ctypes.CDLL) -> None:
    """For this process and all that it starts. Needs no_new_privs. OSError: the machine has no such filter."""
    machine = platform.machine()
    if machine not in MACHINES:
        raise OSError(errno.ENOSYS, f"no list of system calls for {machine}")
    code = _filter(machine)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))
    if libc.prctl(PR_SET_SECCOMP, ctypes.c_ulong(FILTER_MODE), program, 0, 0):
        raise OSError(ctypes.get_errno(), "seccomp")


@functools.cache  # the server makes it once, for all programs
def _filter(name: str) -> bytes:
    """The filter as classic BPF: each step is (code, jump if true, jump if false, constant)."""
    machine, listed = MACHINES[name]
    numbers = dict(zip(NAMES, map(int, listed.split()), strict=True))
    clone, limits = numbers.pop("clone"), numbers.pop("prlimit64")
    steps = [
        (LOAD, 0, 0, MACHINE_AT),
        (EQUAL, 1, 0, machine),
        (RETURN, 0, 0, KILL),
        (LOAD, 0, 0, NUMBER_AT),
        (AT_LEAST, 0, 1, X32),
        (RETURN, 0, 0, KILL),
        (EQUAL, 0, 1, CLONE3),
        (RETURN, 0, 0, ERROR | errno.ENOSYS),
    ]
    for number in (*numbers.values(), *NEWER):
        steps += [(EQUAL, 0, 1, number), (RETURN, 0, 0, ERROR | errno.EPERM)]
    steps += [
        (EQUAL, 0, 3, limits),
        (LOAD, 0, 0, ARGUMENT_AT),
        (EQUAL, 1, 0, 0),  # its own
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (LOAD, 0, 0, NUMBER_AT),
        (EQUAL, 0, 3, clone),
        (LOAD, 0, 0, ARGUMENT_AT),
        (ANY_BIT, 0, 1, NEW_NAMESPACE),
        (RETURN, 0, 0, ERROR | errno.EPERM),
        (RETURN, 0, 0, ALLOW),
    ]
    return b"".join(struct.pack("HBBI", *step) for step in steps)
