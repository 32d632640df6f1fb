"""Hostile environments for the tests: processes that run out of a resource, and the messages that their users see."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
import resource
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from describing import assert_descriptions_equal, describe
from observing import array, fresh, see_on, wait_until

# ----------------------------------------------------------------------------------------- messages that users see


_LOGGERS = [logging.getLogger("dask_shm_plugin"), logging.getLogger("distributed.shm")]


class _Recorder(logging.Handler):
    """Records the messages that the package logs in this process, from INFO on."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.heard: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append((record.levelname, record.getMessage()))


def listen() -> None:
    """Begin to record the package's log messages in this process, and drop earlier ones."""
    stop_listening()
    recorder = _Recorder()
    for logger in _LOGGERS:
        logger.setLevel(logging.INFO)
        logger.addHandler(recorder)


def stop_listening() -> None:
    """Undo :func:`listen`."""
    for logger in _LOGGERS:
        logger.setLevel(logging.NOTSET)
        for handler in _recorders(logger):
            logger.removeHandler(handler)


def heard() -> list[tuple[str, str]]:
    """Return the level and the text of each message that was logged since :func:`listen`."""
    return [said for recorder in _recorders(_LOGGERS[0]) for said in vars(recorder)["heard"]]


def _recorders(logger: logging.Logger) -> list[logging.Handler]:
    return [handler for handler in logger.handlers if type(handler).__name__ == "_Recorder"]


def warnings_of(client: Any, *addresses: str) -> dict[str, list[str]]:
    """Return the warnings that each of some workers has logged."""
    said = client.run(heard, workers=list(addresses))
    return {address: [text for level, text in lines if level == "WARNING"] for address, lines in said.items()}


def sent(client: Any) -> dict[str, int]:
    """Return how often values were sent instead of shared, by reason."""
    from dask_shm_plugin import stats

    counts: dict[str, int] = {}
    for arena in stats(client).values():
        for reason, pair in arena["sent"].items():
            counts[reason] = counts.get(reason, 0) + pair["count"]
    return counts


# ------------------------------------------------------------------------------------------------------ moving values


def move(client: Any, source: str, reader: str, size: int) -> bool:
    """Make a value on one worker and read it on another. Fail unless it is equal; return whether it was shared."""
    seed = fresh()
    made = client.submit(array, seed, size, workers=[source])
    (seen,) = see_on(client, made, [reader])
    assert_descriptions_equal(seen.description, describe(array(seed, size)))
    return seen.shared


# --------------------------------------------------------------------------------------------- exhausting resources

_MAP_FAILED = ctypes.c_void_p(-1).value
_kept: list[Callable[[], Any]] = []


def forbid_descriptors() -> None:
    """Prevent this process from opening more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # If another thread has a file open for a moment, its number is free afterwards.
    wait_until(lambda: not any(name.startswith("/proc/") for name in opened()), "no other thread reads in /proc")
    first_free = os.open("/dev/null", os.O_RDONLY)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, before[1]))
    _kept.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before))


def opened() -> list[str]:
    """Return the names of the files that this process has open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the descriptor of the listing itself
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return names


def forbid_files() -> None:
    """Prevent this process from writing behind the first MiB of a file."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    _kept.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))


def forbid_address_space() -> None:
    """Prevent this process from getting more address space."""
    _reserve_heap()
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    _kept.append(lambda: resource.setrlimit(resource.RLIMIT_AS, before))


def _reserve_heap() -> None:
    """Give the allocator some free MiB, with which code goes on that needs no mapping of its own, such as Dask."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    m_trim_threshold, m_mmap_threshold = -1, -3
    for option in (m_mmap_threshold, m_trim_threshold):
        assert libc.mallopt(option, 1 << 30)
    spare = libc.malloc(ctypes.c_size_t(64 << 20))
    assert spare
    libc.free(ctypes.c_void_p(spare))


def forbid_mappings() -> None:
    """Use up all mappings that this process may have. Neighbours differ in permissions, so the kernel merges none."""
    _reserve_heap()
    pages = 1 << 21
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    anywhere, flags, nowhere = ctypes.c_void_p(0), mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, ctypes.c_int64(0)
    start = libc.mmap(anywhere, ctypes.c_size_t(pages * mmap.PAGESIZE), mmap.PROT_READ, flags, -1, nowhere)
    assert start != _MAP_FAILED
    size = ctypes.c_size_t(mmap.PAGESIZE)
    for page in range(0, pages, 2):
        if libc.mprotect(ctypes.c_void_p(start + page * mmap.PAGESIZE), size, 0):
            break
    else:
        raise AssertionError("the mappings could not be used up")
    # A split of one mapping adds two. The last ones are therefore used up one by one.
    taken: list[int] = []
    while (address := libc.mmap(anywhere, size, len(taken) % 2, flags, -1, nowhere)) != _MAP_FAILED:
        taken.append(address)

    def give_back() -> None:
        for address in taken:
            libc.munmap(ctypes.c_void_p(address), size)
        libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE))

    _kept.append(give_back)


def allow() -> None:
    """Undo the last of these functions."""
    _kept.pop()()


@contextmanager
def without(client: Any, what: Callable[[], None], address: str) -> Iterator[None]:
    """Let one worker lack a resource during a block."""
    client.run(what, workers=[address])
    try:
        yield
    finally:
        client.run(allow, workers=[address])


# --------------------------------------------------------------------------------------------------- filling a table


def take_rows(leave: int) -> None:
    """Take all rows of the arena's table but ``leave`` of them, in this process, which is a member."""
    from dask_shm_plugin.arena.references import Hold
    from dask_shm_plugin.node import membership
    from dask_shm_plugin.table.layout import BLOCKS, Extent

    (arena,) = membership.all_arenas()
    holds: list[Any] = []

    def take(table: Any) -> None:
        first = int(np.max(np.sum(table.blocks.taken(), axis=1), initial=0)) // mmap.PAGESIZE
        count = BLOCKS - len(table.blocks.taken()) - leave
        for n in range(count):
            holds.append(Hold())
            arena.allocator._take(table, holds[-1], Extent((first + n) * mmap.PAGESIZE, mmap.PAGESIZE), 1)

    arena._access.run(take)
    _kept.append(holds.clear)


#: A program that takes all vacant slots for members of an arena, and keeps them until it is killed.
TAKE_PLACES = """
import sys
from dask_shm_plugin.linux import locks
from dask_shm_plugin.table import layout
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.linux.segment import Whereabouts

arena = Arena.attach(Whereabouts(*map(int, sys.argv[2:])), bytes.fromhex(sys.argv[1]))

def take(table):
    for slot in table.vacant():
        assert locks.hold(arena.segment.fd, slot)
        arena.segment.reserve(layout.claims_offset(slot), layout.CLAIM_BYTES)
        table.join(slot, 1, 1)

arena._access.run(take)
print("taken", flush=True)
sys.stdin.read()
"""


def forget_warnings() -> None:
    """Let this process repeat its warnings, as a new process would."""
    from dask_shm_plugin import notices

    notices._told.clear()
    notices.warn_once.cache_clear()


def forget_mappings() -> None:
    """Drop the mappings without views in this process. They would serve where no new mapping can be made."""
    from dask_shm_plugin.node import membership

    for arena in membership.all_arenas():
        arena.holdings.mappings.clear()
