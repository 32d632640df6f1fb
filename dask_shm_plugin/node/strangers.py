"""Processes of this user and cluster on this machine that cannot share with this one: why, and what would help.

Processes in other namespaces of pids, time or users have a rendezvous of their own. If they share ``/dev/shm`` with this
process, its name tells them apart. Other processes meet at the same rendezvous, and the kernel refuses the memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable

from dask_shm_plugin.linux.segment import SHM_DIRECTORY, Whereabouts
from dask_shm_plugin.node import rendezvous

_CAP_SYS_PTRACE = 19


class Strangers:
    """The arenas that processes of one cluster have in other namespaces of this machine, as far as they can be seen.

    Parameters
    ----------
    name
        The name of the rendezvous of this process.

    Notes
    -----
    Not thread-safe.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._others: list[str] = []
        self._changed: int | None = None

    def look(self) -> list[str]:
        """Return for each of these arenas why this process cannot use it, and the remedy, as a sentence.

        The directory is listed only if it has changed.
        """
        with contextlib.suppress(OSError):
            changed = os.stat(SHM_DIRECTORY).st_mtime_ns
            if changed != self._changed:
                self._others = [name for name in _names() if rendezvous.counterpart(name) == self._name != name]
                self._changed = changed
        return [_why_apart(self._name, name) for name in self._others if rendezvous.is_attended(name)]


def reasons() -> list[str]:
    """Return why this process could not share with processes of this user on this machine, as sentences.

    Raises
    ------
    OSError, ArenaUnavailable
        ``/dev/shm`` or ``/proc`` cannot be read.
    """
    found = set()
    for name in _names():
        ours = rendezvous.counterpart(name)
        if ours == name:
            said = rendezvous.look(name)
            found |= {why_refused(at.pid) for at in (said.whereabouts() if said else ()) if _is_refused(at)}
        elif ours is not None and rendezvous.is_attended(name):
            found.add(_why_apart(ours, name))
    return sorted(found)


def why_refused(pid: int) -> str:
    """Return why the kernel lets this process not open what another process of this user has open, and the remedy."""
    why = "they are not dumpable, or /proc hides them; start them as ordinary programs, and mount /proc without hidepid"
    with contextlib.suppress(OSError, KeyError, ValueError, IndexError):
        why = next((one for differs, one in _REFUSALS if differs(pid)), why)
    return f"the memory of other processes of this user on this machine cannot be opened: {why}"


def _why_apart(ours: str, theirs: str) -> str:
    (our_pids, our_times), (their_pids, their_times) = rendezvous.spaces_of(ours), rendezvous.spaces_of(theirs)
    if our_pids != their_pids:
        space, remedy = "process (pid)", "let them share one, as docker run --pid and shareProcessNamespace do"
    elif our_times != their_times:
        space, remedy = "time", "start them in the same one (unshare --time makes another)"
    else:
        space, remedy = "user", "start them in one container"
    return (
        f"values are sent to other processes of this user on this machine, which are in another {space} namespace; "
        f"{remedy}"
    )


def _names() -> list[str]:
    return [f"/{entry}" for entry in sorted(os.listdir(SHM_DIRECTORY))]


def _is_refused(at: Whereabouts) -> bool:
    try:
        os.stat(f"/proc/{at.pid}/fd/{at.fd}")
    except OSError as error:
        return isinstance(error, PermissionError)  # otherwise it has ended
    return False


def _has_other_group(pid: int) -> bool:
    return not set(_status(pid, "Gid").split()[:3]) <= {_status("self", "Gid").split()[3]}


def _has_other_user_namespace(pid: int) -> bool:
    return _read(pid, "uid_map") != _read("self", "uid_map")


def _has_more_capabilities(pid: int) -> bool:
    ours, theirs = int(_status("self", "CapEff"), 16), int(_status(pid, "CapPrm"), 16)
    return bool(theirs & ~ours) and not ours >> _CAP_SYS_PTRACE & 1


_REFUSALS: tuple[tuple[Callable[[int], bool], str], ...] = (
    (_has_other_user_namespace, "they are in another user namespace; start all in one container"),
    (_has_other_group, "their primary group differs; start all with the same one (newgrp, setpriv --regid)"),
    (
        _has_more_capabilities,
        "they have capabilities that this process lacks; start all with the same ones (docker run --cap-add, setpriv)",
    ),
)


def _status(pid: int | str, field: str) -> str:
    fields = dict(line.split(":", 1) for line in _read(pid, "status").splitlines() if ":" in line)
    return fields[field].strip()


def _read(pid: int | str, file: str) -> str:
    with open(f"/proc/{pid}/{file}", errors="replace") as opened:
        return opened.read()
