"""Take away from this process what decoding an image never needs: opening files and sockets, starting programs, signalling
others.

It filters system calls (https://docs.kernel.org/userspace-api/seccomp_filter.html), needs no privileges and can't be lifted.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

# Numbers of system calls, from asm/unistd.h; those above 423 are the same on both.
_NEW = (424, 425, 428, 429, 430, 434, 437, 438)  # pidfd_send_signal, io_uring_setup, mounts, pidfd_open, openat2, pidfd_getfd
_X86 = {
    "files": (
        2,
        85,
        257,
        304,
        76,
        82,
        83,
        84,
        86,
        87,
        88,
        90,
        92,
        94,
        132,
        133,
        258,
        259,
        260,
        263,
        264,
        265,
        266,
        268,
        280,
        316,
    ),
    "sockets": (41, 42, 43, 49, 50, 53, 288),
    "programs": (57, 58, 59, 322),
    "others": (62, 101, 129, 200, 234, 297, 310, 311, 165, 166, 161, 155, 246, 248, 249, 250, 272, 298, 308, 321, 323),
}
_ARM = {
    "files": (56, 265, 45, 33, 34, 35, 36, 37, 38, 53, 54, 88, 276),
    "sockets": (198, 199, 200, 201, 202, 203, 242),
    "programs": (221, 281),
    "others": (117, 129, 130, 131, 138, 240, 270, 271, 39, 40, 41, 51, 104, 217, 218, 219, 97, 241, 268, 280, 282),
}
# AUDIT_ARCH, denied calls, number of clone
_MACHINES = {"x86_64": (0xC000003E, _X86, 56), "aarch64": (0xC00000B7, _ARM, 220)}
_CLONE3 = 435
_CLONE_THREAD = 0x10000
_X32 = 0x40000000

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _REFUSE = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVILEGES, _SET_SECCOMP, _FILTER = 38, 22, 2


def confine() -> bool:
    """Confine this process and its threads to come; False on machines whose system calls are not known here."""
    if platform.machine() not in _MACHINES:
        return False
    filters = program(*_MACHINES[platform.machine()])
    code = ctypes.create_string_buffer(filters, len(filters))
    pointer = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(filters) // 8, ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    libc.prctl.argtypes = [ctypes.c_int, *4 * [ctypes.c_ulong]]
    calls = ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SET_SECCOMP, _FILTER, ctypes.addressof(pointer), 0, 0))
    return all(libc.prctl(*call) == 0 for call in calls)


def program(architecture: int, denied: dict[str, tuple[int, ...]], clone: int) -> bytes:
    """The filter, as BPF instructions of 8 bytes each."""
    calls = [*(number for group in denied.values() for number in group), *_NEW]
    allow, refuse, missing = len(calls) + 9, len(calls) + 10, len(calls) + 11
    steps: list[tuple[int, int | None, int | None, int]] = [
        (_LOAD, None, None, 4),
        (_EQUAL, None, refuse, architecture),
        (_LOAD, None, None, 0),
        (_AT_LEAST, refuse, None, _X32),
        *((_EQUAL, refuse, None, number) for number in calls),
        (_EQUAL, missing, None, _CLONE3),  # its flags can't be seen; libc falls back to clone
        (_EQUAL, None, allow, clone),
        (_LOAD, None, None, 16),
        (_ANY_BIT, allow, None, _CLONE_THREAD),
        (_RETURN, None, None, _REFUSE | errno.EPERM),
        (_RETURN, None, None, _ALLOW),
        (_RETURN, None, None, _REFUSE | errno.EPERM),
        (_RETURN, None, None, _REFUSE | errno.ENOSYS),
    ]
    skips = [[0 if to is None else to - at - 1 for to in step[1:3]] for at, step in enumerate(steps)]
    return b"".join(struct.pack("HBBI", step[0], *skip, step[3]) for step, skip in zip(steps, skips, strict=True))
