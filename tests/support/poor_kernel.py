"""Environments that lack features of the kernel or of Python, for a process and all processes that it starts.

:func:`environment` puts a module ``sitecustomize`` on the path of a process, so that the process starts without them.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import os
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

#: Features that may be missing: names in Python's modules, and system calls that the kernel refuses.
LACKS = ("names", "memfd", "madvise", "pagemap", "holes", "locks")

_NUMBERS = {
    "x86_64": {"memfd_create": 319, "madvise": 28, "fcntl": 72, "fallocate": 285},
    "aarch64": {"memfd_create": 279, "madvise": 233, "fcntl": 25, "fallocate": 47},
}
_LOAD, _IF_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ANSWER, _ALLOW = 0x00050000, 0x7FFF0000
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2
_POPULATE_READ, _COLLAPSE, _DONTFORK = 22, 25, 10
_HOLE = 3


class _RefusedCall(NamedTuple):
    call: str
    argument: int
    value: int | None
    error: int


_REFUSED_CALLS = {
    "memfd": [_RefusedCall("memfd_create", 0, None, errno.ENOSYS)],
    "madvise": [_RefusedCall("madvise", 2, advice, errno.EINVAL) for advice in (_POPULATE_READ, _COLLAPSE, _DONTFORK)],
    "holes": [_RefusedCall("fallocate", 1, _HOLE, errno.EOPNOTSUPP)],
    "locks": [_RefusedCall("fcntl", 1, command, errno.EINVAL) for command in (36, 37, 38)],
}


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("yes", ctypes.c_uint8), ("no", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


def can_be_had() -> bool:
    """Return whether this module can refuse system calls on this machine."""
    return platform.machine() in _NUMBERS


def environment(folder: Path, lacks: Iterable[str]) -> dict[str, str]:
    """Return environment variables with which a process, and all that it starts, lacks some features."""
    (folder / "sitecustomize.py").write_text("import poor_kernel\npoor_kernel.begin()\n")
    path = os.pathsep.join([str(folder), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, "POOR_KERNEL": ",".join(lacks)}


def begin() -> None:
    """Remove the features that the environment names, in this process and in all that it starts from now on."""
    lacks = os.environ["POOR_KERNEL"].split(",")
    if "names" in lacks:
        _delete_names()
    if "pagemap" in lacks:
        _hide_pagemap()
    # A parent process may have installed the filter already. A second one does no harm.
    _install_filter([one for lack in lacks for one in _REFUSED_CALLS.get(lack, [])])


def _delete_names() -> None:
    for module, name in ((os, "memfd_create"), *((fcntl, f"F_OFD_{what}") for what in ("GETLK", "SETLK", "SETLKW"))):
        if hasattr(module, name):
            delattr(module, name)


def _hide_pagemap() -> None:
    def without(how: Any) -> Any:
        def open_(path: Any, *args: Any, **kwargs: Any) -> Any:
            if path == "/proc/self/pagemap":
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path)
            return how(path, *args, **kwargs)

        return open_

    os.open, builtins.open = without(os.open), without(open)


def _install_filter(calls: list[_RefusedCall]) -> None:
    if not calls:
        return
    numbers, program = _NUMBERS[platform.machine()], []
    for call, argument, value, error in calls:
        program += [(_LOAD, 0, 0, 0), (_IF_EQUAL, 0, 1 if value is None else 3, numbers[call])]
        if value is not None:
            program += [(_LOAD, 0, 0, 16 + 8 * argument), (_IF_EQUAL, 0, 1, value)]
        program.append((_RETURN, 0, 0, _ANSWER | error))
    program.append((_RETURN, 0, 0, _ALLOW))
    instructions = (_Instruction * len(program))(*program)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if libc.prctl(_SECCOMP, _FILTER, ctypes.byref(_Program(len(program), instructions)), 0, 0):
        raise OSError(ctypes.get_errno(), "this machine cannot filter system calls")
