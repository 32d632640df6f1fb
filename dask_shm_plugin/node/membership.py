"""The arenas to which this process belongs: one membership per cluster, shared by all roles in the process.

In a ``LocalCluster``, the scheduler, all nannies and the client are one process, and so one member. The process joins
with its first role and leaves with its last.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import itertools
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import NamedTuple

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births import switch as births
from dask_shm_plugin.exceptions import ArenaUnavailable, SharedMemoryError, TableCorrupt
from dask_shm_plugin.linux import processes
from dask_shm_plugin.mapping.atlas import ATLAS
from dask_shm_plugin.node import rendezvous
from dask_shm_plugin.node.rendezvous import Listed, Meeting, Rendezvous
from dask_shm_plugin.node.strangers import Strangers, why_refused
from dask_shm_plugin.notices import warn_once

logger = logging.getLogger(__name__)


class _Role(NamedTuple):
    kind: str
    address: str
    owner: Callable[[], object]
    """Returns the object that will end the role, or None if it was garbage-collected without doing so."""


class _Joined(NamedTuple):
    arena: Arena
    meeting: Rendezvous
    roles: list[_Role]
    pid: int


_lock = threading.Lock()
_by_cluster: dict[str, _Joined] = {}
_lingering: weakref.WeakSet[Arena] = weakref.WeakSet()
"""Arenas in which this process has no role any more, but still has views. The tidying thread of each keeps it alive
until the last view is gone."""
_missing: dict[str, int] = {}
"""By cluster: in how many consecutive looks, one per second, the name of the rendezvous was missing."""
_LOOKS = 4

_is_over = False
"""Whether the interpreter is about to exit, and this process has left all arenas for good."""


def join(
    cluster: str,
    kind: str,
    address: str,
    *,
    capacity: Callable[[], int] | None = None,
    warm: float = 0,
    owner: object = None,
    is_share: bool = False,
) -> Arena | None:
    """Make this process a member of a cluster's arena on this node, for one of its roles.

    Parameters
    ----------
    cluster
        Identifies the cluster.
    kind, address
        The role ("nanny", "worker" or "client"), and the address at which it listens.
    capacity
        Returns the capacity, in bytes, of a new arena; called if there is none yet. If None, no arena is created.
    warm
        Seconds for which freed memory stays resident.
    owner
        The object that will end the role. If it is garbage-collected before, for example with an event loop that was
        abandoned without closing anything, the tidying thread ends the role.
    is_share
        Whether the capacity is a share of the machine's memory, which the arenas of this cluster on the machine divide.

    Returns
    -------
    Arena or None
        None if there is no arena and none is to be created, or if the interpreter is about to exit.

    Raises
    ------
    SharedMemoryError
        There is no arena that can be joined; the message names the reason.
    """
    with _lock:
        if _is_over:
            return None
        joined = _by_cluster.get(cluster)
        if joined is None:
            name = rendezvous.name_for(cluster)
            if capacity is None and not rendezvous.exists(name):
                return None
            found = _meet(name, capacity, warm)
            if found is None:
                return None
            joined = _by_cluster[cluster] = _Joined(*found, [], os.getpid())
            joined.arena.labels.cluster = cluster
            joined.arena.each_second(functools.partial(_look_after, cluster))
            beside = functools.partial(_look_beside, joined.arena, Strangers(name), is_share)
            beside()
            joined.arena.each_second(beside)
        elif joined.arena.is_damaged:
            raise TableCorrupt("the arena is damaged")
        joined.roles.append(_Role(kind, address, (lambda: True) if owner is None else weakref.ref(owner)))
    with contextlib.suppress(SharedMemoryError):
        joined.arena.roster.add_role(kind, address)
    return joined.arena


def withdraw(cluster: str, kind: str, address: str) -> None:
    """Remove a role from the arena's table, so that others do not find it; the membership stays."""
    joined = _by_cluster.get(cluster)
    if joined is not None:
        with contextlib.suppress(SharedMemoryError):
            joined.arena.roster.remove_role(kind, address)


def leave(cluster: str, kind: str, address: str, *, owner: object = None) -> None:
    """End one role; with the last one, the process leaves the arena. Harmless if the role never joined."""
    with _lock:
        joined = _by_cluster.get(cluster)
        if joined is not None:
            mine = (role for role in joined.roles if role[:2] == (kind, address) and owner in (None, role.owner()))
            _end(cluster, joined, list(itertools.islice(mine, 1)))


def _end(cluster: str, joined: _Joined, roles: list[_Role]) -> None:
    for role in roles:
        joined.roles.remove(role)
        with contextlib.suppress(SharedMemoryError):
            joined.arena.roster.remove_role(role.kind, role.address)
    if roles and not joined.roles:
        del _by_cluster[cluster]
        _depart(joined)


def find(arena_id: bytes) -> Arena | None:
    """Return the arena with this id, or None if this process is not a member of it."""
    return next((joined.arena for joined in list(_by_cluster.values()) if joined.arena.arena_id == arena_id), None)


def of_cluster(cluster: str) -> Arena | None:
    """Return the arena of a cluster, or None if this process is not a member of it."""
    joined = _by_cluster.get(cluster)
    return joined.arena if joined else None


def all_arenas() -> list[Arena]:
    """Return the arenas of which this process is a member."""
    return [joined.arena for joined in list(_by_cluster.values())]


def _meet(name: str, capacity: Callable[[], int] | None, warm: float) -> tuple[Arena, Rendezvous] | None:
    meeting = rendezvous.enter(name, create=capacity is not None)
    if meeting is None:
        return None
    arena = None
    try:
        arena = _find_or_create(meeting, capacity, warm)
        if arena is None:
            meeting.close()
            return None
        meeting.attend()
        meeting.unlock()
    except BaseException:
        if arena is not None:
            arena.close()
        with contextlib.suppress(SharedMemoryError, OSError):
            if not meeting.is_attended:
                meeting.remove()
        meeting.close()
        raise
    return arena, meeting


def _find_or_create(meeting: Rendezvous, capacity: Callable[[], int] | None, warm: float) -> Arena | None:
    said = meeting.read()
    arena = _attach(said, warm) if said else None
    if arena is None and capacity is not None:
        alive = [listed.pid for listed in said.listed if listed.is_alive] if said else []
        if alive and meeting.is_attended:
            raise ArenaUnavailable(why_refused(alive[0]))
        rendezvous.purge()
        return _listed(Arena.create(capacity(), warm), meeting, ())
    return _listed(arena, meeting, said.listed) if arena is not None and said is not None else None


def _listed(arena: Arena, meeting: Rendezvous, others: Iterable[Listed]) -> Arena:
    try:
        meeting.write(_with_us(arena, others))
    except BaseException:
        arena.close()
        raise
    return arena


def _with_us(arena: Arena, listed: Iterable[Listed]) -> Meeting:
    own = Listed(os.getpid(), processes.start_time(os.getpid()), arena.segment.fd)
    others = tuple(process for process in listed if process.is_alive and process.pid != own.pid)
    return Meeting(arena.arena_id, arena.segment.device, arena.segment.inode, (*others, own))


def _attach(said: Meeting, warm: float) -> Arena | None:
    # A process must never join an arena twice: its record locks would not exclude one membership from the other.
    for arena in list(_lingering):
        if arena.arena_id == said.arena_id and arena.cancel_close():
            _lingering.discard(arena)
            return arena
    # The rendezvous may lead to another arena of this process, or to a damaged one that it avoids.
    for arena in [*all_arenas(), *_lingering]:
        if not arena.has_left and (arena.segment.device, arena.segment.inode) == (said.device, said.inode):
            raise ArenaUnavailable("this process is, or was, in the arena that the rendezvous leads to")
    for at in said.whereabouts():
        try:
            return Arena.attach(at, said.arena_id, warm)
        except ArenaUnavailable as error:
            logger.debug("cannot join through %s: %s", at, error)
    return None


def _look_beside(arena: Arena, strangers: Strangers, is_share: bool) -> None:
    """Tell once why other arenas of this cluster on this machine are none of this process's; divide the capacity."""
    reasons = strangers.look()
    for reason in reasons:
        warn_once(f"Sharing ends at the container: {reason}")
    if is_share:
        arena.divide(1 + len(reasons))


def _look_after(cluster: str) -> None:
    """End the roles whose owners are gone, and make sure that newcomers can find the arena."""
    # This runs in the tidying thread, once a second: it does not wait for threads that join or leave.
    if not _lock.acquire(blocking=False):
        return
    try:
        joined = _by_cluster.get(cluster)
        if joined is not None:
            _end(cluster, joined, [role for role in joined.roles if role.owner() is None])
        looks = _missing.pop(cluster, 0)
        if cluster in _by_cluster and not _by_cluster[cluster].meeting.can_be_found:
            _missing[cluster] = looks + 1
    finally:
        _lock.release()
    # A parent process that exits removes the name, and its children are about to be ended. Children that live on
    # restore the name some seconds later.
    if looks >= _LOOKS:
        _restore(cluster)


def _restore(cluster: str) -> None:
    """Make a new rendezvous for an arena after the old one's name was removed, unless another member has done so."""
    if not _lock.acquire(blocking=False):
        return
    try:
        joined = _by_cluster.get(cluster)
        if joined is not None and not joined.meeting.can_be_found:
            meeting = _meet_again(joined)
            if meeting is not None:
                joined.meeting.close()
                _by_cluster[cluster] = joined._replace(meeting=meeting)
    finally:
        _lock.release()


def _meet_again(joined: _Joined) -> Rendezvous | None:
    before, meeting = joined.meeting.read(), rendezvous.enter(joined.meeting.name, create=True)
    if meeting is None:
        return None
    try:
        said = meeting.read()
        if said is not None and said.arena_id != joined.arena.arena_id and meeting.is_attended:
            # Meanwhile, other processes have created a new arena. Both work; between them, values are sent.
            meeting.close()
            return None
        others = {listed for known in (before, said) if known is not None for listed in known.listed}
        meeting.write(_with_us(joined.arena, others))
        meeting.attend()
        meeting.unlock()
    except BaseException:
        meeting.close()
        raise
    return meeting


def _depart(joined: _Joined, *, is_end: bool = False) -> None:
    """Leave the rendezvous and then the arena; the last member removes the name.

    A process that exits also removes the name if only its children are left: Dask ends them at the same time, with
    signals that they do not handle.
    """
    if joined.pid != os.getpid():  # a child forked without Python's hooks still has its parent's membership
        return
    joined.meeting.close()
    with contextlib.suppress(SharedMemoryError, OSError):
        meeting = rendezvous.enter(joined.meeting.name, create=False)
        if meeting is not None:
            said, are_ending = meeting.read(), False
            if said is not None and said.arena_id == joined.arena.arena_id:
                others = tuple(p for p in said.listed if p.pid != os.getpid() and p.is_alive)
                meeting.write(said._replace(listed=others))
                are_ending = is_end and all(processes.parent(p.pid) == os.getpid() for p in others)
            if are_ending or not meeting.is_attended:
                meeting.remove()
            meeting.close()
    joined.arena.close()
    if not joined.arena.has_left:
        _lingering.add(joined.arena)


@atexit.register
def _depart_from_all() -> None:
    global _is_over
    with _lock:
        # A cluster may be closed after this: modules that were imported earlier run their exit functions later.
        _is_over = True
        while _by_cluster:
            try:
                _depart(_by_cluster.popitem()[1], is_end=True)
            except Exception:
                logger.debug("could not leave", exc_info=True)


_forking = threading.local()


def _before_fork() -> None:
    # Reset this first: if a call below fails, the holds for an earlier child must not be given back twice.
    _forking.holds = []
    try:
        births.before_fork()  # what it seals is held for the child, too
    finally:
        for arena in [*all_arenas(), *_lingering]:
            fork_hold = arena.holdings.hold_for_child()
            if fork_hold is not None:
                _forking.holds.append((arena, fork_hold))


def _after_fork() -> None:
    while _forking.holds:
        arena, fork_hold = _forking.holds.pop()
        fork_hold.in_parent()
        arena.holdings.references.keep(fork_hold)


def _forget_parent() -> None:
    """Make a forked child a process that belongs to no arena; the parent keeps its membership and references."""
    global _lock, _is_over
    _lock, _is_over = threading.Lock(), False
    for _, fork_hold in _forking.holds:
        fork_hold.in_child()
    _by_cluster.clear()
    _lingering.clear()
    ATLAS.forget()
    births.in_child()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget_parent)
