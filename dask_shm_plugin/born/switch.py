"""The one nursery of this process: switched on and off by its workers, and asked by whoever publishes or forks."""

from __future__ import annotations

import atexit
import threading

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.born.library import Figures, load
from dask_shm_plugin.born.nursery import Nursery

_lock = threading.Lock()
_nursery: Nursery | None = None
_arena: Arena | None = None
_users = 0


def switch_on(arena: Arena, memory_limit: int | None, warm: float) -> str | None:
    """Let the tasks of one more worker allocate their arrays in an arena; return the reason if that is not possible.

    Parameters
    ----------
    arena
        The arena.
    memory_limit
        The memory limit of the worker in bytes, or None.
    warm
        Seconds for which memory that is not used is kept.
    """
    global _nursery, _arena, _users
    with _lock:
        if _users and _arena is arena:
            _users += 1
            return None
        library = load()
        if isinstance(library, str):
            return library
        nursery = Nursery(library, arena, memory_limit, warm)
        reason = nursery.start()
        if reason is None:
            _nursery, _arena, _users = nursery, arena, 1
        return reason


def switch_off(arena: Arena) -> None:
    """End one successful :func:`switch_on`; with the last one, no more arrays are allocated in the arena."""
    global _users
    with _lock:
        if _arena is arena and _users:
            _users -= 1
            if not _users and _nursery is not None:
                _nursery.stop()


def allocate_here() -> None:
    """Let NumPy allocate in the arena in the present context, unless a user's own handler is set there."""
    library = load()
    if isinstance(library, str):
        return
    before = library.set_handler(library.capsule)
    if before is not library.numpys_capsule and before is not library.capsule:
        library.set_handler(before)


def seal(address: int, length: int) -> bool:
    """Seal the chunk that contains some bytes; see :meth:`Nursery.seal`."""
    nursery = _nursery
    return nursery is not None and nursery.seal(address, length)


def figures() -> Figures | None:
    """Return the figures of this process; None if it never allocated in an arena."""
    return None if _nursery is None else _nursery.figures()


def before_fork() -> None:
    """Make sure that a child about to be forked and this process do not see each other's writes."""
    nursery = _nursery
    if nursery is not None:
        nursery.before_fork()


@atexit.register
def _stop_at_exit() -> None:
    """Let threads that are still at work allocate as usual."""
    if _nursery is not None:
        _nursery.stop()


def in_child() -> None:
    """Forget the parent's nursery; its arrays stay readable and writeable."""
    global _nursery, _arena, _users, _lock
    _nursery, _arena, _users, _lock = None, None, 0, threading.Lock()
