"""The one nursery of this process: switched on and off by its workers, and asked by whoever publishes or forks."""

from __future__ import annotations

import atexit
import contextlib
import threading
from collections.abc import Iterator

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.births.library import Figures, Library, load
from dask_shm_plugin.births.nursery import Nursery, Sealed

_lock = threading.Lock()
_nursery: Nursery | None = None
_arena: Arena | None = None
_users = 0


def switch_on(arena: Arena, memory_limit: int | None, warm: float, *, has_worker: bool = True) -> str | None:
    """Let the tasks of one more worker, or the blocks of one more client, allocate their arrays in an arena.

    Parameters
    ----------
    arena
        The arena.
    memory_limit
        The memory limit of the worker in bytes, or None.
    warm
        Seconds for which memory that is not used is kept.
    has_worker
        Whether it is a worker.

    Returns
    -------
    str or None
        The reason if that is not possible.
    """
    global _nursery, _arena, _users
    with _lock:
        if _users and _arena is arena and _nursery is not None:
            _users += 1
            if has_worker:
                _nursery.add_worker(memory_limit)
            return None
        library = load()
        if isinstance(library, str):
            return library
        nursery = Nursery(library, arena, warm)
        if has_worker:
            nursery.add_worker(memory_limit)
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
    if not isinstance(library, str):
        _set_handler(library, library.capsule)


@contextlib.contextmanager
def block() -> Iterator[None]:
    """Let NumPy allocate in the arena in the present context, from the first array on, until the end of the block."""
    library, nursery = load(), _nursery
    if isinstance(library, str) or nursery is None:
        yield
        return
    before = _set_handler(library, library.block_capsule)
    try:
        with nursery.block():
            yield
    finally:
        library.set_handler(before)


def _set_handler(library: Library, capsule: object) -> object:
    """Set a handler, unless a user's own is set; return the one before."""
    before = library.set_handler(capsule)
    if not any(before is one for one in (library.numpys_capsule, library.capsule, library.block_capsule)):
        library.set_handler(before)
    return before


def seal(address: int, length: int) -> Sealed:
    """Seal the chunk that contains some bytes; see :meth:`Nursery.seal`."""
    nursery = _nursery
    return Sealed.NOT if nursery is None else nursery.seal(address, length)


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
