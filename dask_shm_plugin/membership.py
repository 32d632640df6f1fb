"""Which arenas this process belongs to: one membership per cluster, shared by all roles that live in the process.

In a ``LocalCluster`` the scheduler, all nannies and the client are one process, and so one member. The first role joins,
the last one leaves.
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

from dask_shm_plugin import liveness, rendezvous
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import ArenaUnavailable, SharedMemoryError, TableCorrupt
from dask_shm_plugin.rendezvous import Listed, Meeting, Rendezvous
from dask_shm_plugin.views import ATLAS

logger = logging.getLogger(__name__)


class _Role(NamedTuple):
    kind: str
    address: str
    owner: Callable[[], object]
    """Returns whoever will end the role, or None when that is gone without doing so."""


class _Joined(NamedTuple):
    arena: Arena
    meeting: Rendezvous
    roles: list[_Role]
    pid: int


_lock = threading.Lock()
_by_cluster: dict[str, _Joined] = {}
_lingering: weakref.WeakSet[Arena] = weakref.WeakSet()
"""Arenas that this process has left in all its roles, but into which views of it still look. Each is kept by its tidying
thread until the last of them is gone."""
_missing: dict[str, int] = {}
"""At how many looks in a row, one a second, the name of a cluster's arena was missing."""
_LOOKS = 4

_is_over = False
"""Whether the interpreter is about to end, and this process has left all arenas for good."""


def join(
    cluster: str,
    kind: str,
    address: str,
    *,
    capacity: Callable[[], int] | None = None,
    warm: float = 0,
    owner: object = None,
) -> Arena | None:
    """Make this process, in one of its roles, a member of a cluster's arena on this node.

    Parameters
    ----------
    cluster
        What distinguishes one cluster from another.
    kind, address
        The role ("nanny", "worker" or "client") and where it listens.
    capacity
        Called for the bytes of a new arena when there is none; without it, None is returned in that case.
    warm
        Seconds for which freed memory stays resident.
    owner
        Who will end the role. Where that is collected before, as after an event loop that was left without closing
        anything, the role is ended by the tidying thread.

    Raises
    ------
    SharedMemoryError
        With the reason why there is nothing to join.
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
            joined.arena.upkeep = functools.partial(_look_after, cluster)
        elif joined.arena.is_damaged:
            raise TableCorrupt("the arena is damaged")
        joined.roles.append(_Role(kind, address, (lambda: True) if owner is None else weakref.ref(owner)))
    with contextlib.suppress(SharedMemoryError):
        joined.arena.roster.add_role(kind, address)
    return joined.arena


def withdraw(cluster: str, kind: str, address: str) -> None:
    """Let others not find a role any more."""
    joined = _by_cluster.get(cluster)
    if joined is not None:
        with contextlib.suppress(SharedMemoryError):
            joined.arena.roster.remove_role(kind, address)


def leave(cluster: str, kind: str, address: str, *, owner: object = None) -> None:
    """End one role; with the last one, the process leaves the arena. Harmless when it never joined."""
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
    """Return the arena of that name, if this process is a member of it."""
    return next((joined.arena for joined in list(_by_cluster.values()) if joined.arena.arena_id == arena_id), None)


def of_cluster(cluster: str) -> Arena | None:
    """Return the arena of a cluster, if this process is a member of it."""
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
        if said and meeting.is_attended and any(listed.is_alive for listed in said.listed):
            raise ArenaUnavailable("the arena of this cluster exists, but its members' memory cannot be opened")
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
    own = Listed(os.getpid(), liveness.start_time(os.getpid()), arena.segment.fd)
    others = tuple(process for process in listed if process.is_alive and process.pid != own.pid)
    return Meeting(arena.arena_id, arena.segment.device, arena.segment.inode, (*others, own))


def _attach(said: Meeting, warm: float) -> Arena | None:
    # A process must never be in one arena twice: its record locks would not keep the one from the other.
    for arena in list(_lingering):
        if arena.arena_id == said.arena_id and arena.stay():
            _lingering.discard(arena)
            return arena
    # It may say the place of another arena, or of one that this process keeps away from.
    for arena in [*all_arenas(), *_lingering]:
        if not arena.has_left and (arena.segment.device, arena.segment.inode) == (said.device, said.inode):
            raise ArenaUnavailable("this process is, or was, in the arena that the rendezvous leads to")
    for at in said.whereabouts():
        try:
            return Arena.attach(at, said.arena_id, warm)
        except ArenaUnavailable as error:
            logger.debug("%s cannot help to join: %s", at, error)
    return None


def _look_after(cluster: str) -> None:
    """End the roles of owners that are gone, and see to it that newcomers can find the arena."""
    # The tidying thread, which comes here, does not wait for those who join or leave; it comes again.
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
    # A parent that ends has removed it, and its children are about to be ended: those who live on restore it some looks later.
    if looks >= _LOOKS:
        _restore(cluster)


def _restore(cluster: str) -> None:
    """Make a new rendezvous for an arena whose name somebody has removed, unless others were quicker."""
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
            # Somebody came in between and began anew. Both arenas work; between them, values are sent.
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
    """Leave the rendezvous and then the arena; whoever leaves last removes the name.

    So does a process that ends, and leaves nobody but children: Dask ends them with it, by signals that they do not handle.
    """
    if joined.pid != os.getpid():  # a child that was forked past Python's hooks has not forgotten what its parent has
        return
    joined.meeting.close()
    with contextlib.suppress(SharedMemoryError, OSError):
        meeting = rendezvous.enter(joined.meeting.name, create=False)
        if meeting is not None:
            said, are_ending = meeting.read(), False
            if said is not None and said.arena_id == joined.arena.arena_id:
                others = tuple(p for p in said.listed if p.pid != os.getpid() and p.is_alive)
                meeting.write(said._replace(listed=others))
                are_ending = is_end and all(liveness.parent(p.pid) == os.getpid() for p in others)
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
        # Whoever closes a cluster may come later: what was imported first is called last.
        _is_over = True
        while _by_cluster:
            try:
                _depart(_by_cluster.popitem()[1], is_end=True)
            except Exception:
                logger.debug("could not leave", exc_info=True)


_forking = threading.local()


def _before_fork() -> None:
    # First of all: whatever fails below, what was kept for an earlier child is not given back twice.
    _forking.pins = []
    for arena in [*all_arenas(), *_lingering]:
        pins = arena.holdings.pin()
        if pins is not None:
            _forking.pins.append((arena, pins))


def _after_fork() -> None:
    while _forking.pins:
        arena, pins = _forking.pins.pop()
        pins.in_parent()
        arena.holdings.keep(pins)


def _forget_parent() -> None:
    """Begin a forked child as a process that belongs to no arena; what its parent holds is its parent's."""
    global _lock, _is_over
    _lock, _is_over = threading.Lock(), False
    for _, pins in _forking.pins:
        pins.in_child()
    _by_cluster.clear()
    _lingering.clear()
    ATLAS.forget()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before_fork, after_in_parent=_after_fork, after_in_child=_forget_parent)
