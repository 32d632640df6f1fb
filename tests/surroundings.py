"""Hostile surroundings for the tests: processes that run out of something, and what their users are told."""

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

# ------------------------------------------------------------------------------------------------- what users are told


_LOGGERS = [logging.getLogger("dask_shm_plugin"), logging.getLogger("distributed.shm")]


class _Ear(logging.Handler):
    """Keeps what the package logs in this process, from INFO on."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.heard: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.heard.append((record.levelname, record.getMessage()))


def listen() -> None:
    """Begin to keep what the package logs in this process, whatever it kept before."""
    stop_listening()
    ear = _Ear()
    for logger in _LOGGERS:
        logger.setLevel(logging.INFO)
        logger.addHandler(ear)


def stop_listening() -> None:
    """Undo :func:`listen`."""
    for logger in _LOGGERS:
        logger.setLevel(logging.NOTSET)
        for handler in _ears(logger):
            logger.removeHandler(handler)


def heard() -> list[tuple[str, str]]:
    """Return level and text of what was logged since :func:`listen`."""
    return [said for ear in _ears(_LOGGERS[0]) for said in vars(ear)["heard"]]


def _ears(logger: logging.Logger) -> list[logging.Handler]:
    return [handler for handler in logger.handlers if type(handler).__name__ == "_Ear"]


def warnings_of(client: Any, *addresses: str) -> dict[str, list[str]]:
    """Return what each of some workers has warned of."""
    said = client.run(heard, workers=list(addresses))
    return {address: [text for level, text in lines if level == "WARNING"] for address, lines in said.items()}


def sent(client: Any) -> dict[str, int]:
    """Return how often values were sent instead of shared, by cause."""
    from dask_shm_plugin import stats

    counts: dict[str, int] = {}
    for arena in stats(client).values():
        for reason, pair in arena["sent"].items():
            counts[reason] = counts.get(reason, 0) + pair["count"]
    return counts


# ------------------------------------------------------------------------------------------------------ moving values


def move(client: Any, source: str, reader: str, size: int) -> bool:
    """Let one worker make a value and another read it; fail unless it is right; return whether it was shared."""
    seed = fresh()
    made = client.submit(array, seed, size, workers=[source])
    (seen,) = see_on(client, made, [reader])
    assert_descriptions_equal(seen.description, describe(array(seed, size)))
    return seen.shared


# --------------------------------------------------------------------------------------------------- using something up

_MAP_FAILED = ctypes.c_void_p(-1).value
_kept: list[Callable[[], Any]] = []


def forbid_descriptors() -> None:
    """Let this process open no more files."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    # What another thread has open for a moment would leave a number free.
    wait_until(lambda: not any(name.startswith("/proc/") for name in opened()), "nothing else is read")
    first_free = os.open("/dev/null", os.O_RDONLY)
    os.close(first_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (first_free, before[1]))
    _kept.append(lambda: resource.setrlimit(resource.RLIMIT_NOFILE, before))


def opened() -> list[str]:
    """Return what this process has open."""
    names = []
    for number in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # this very listing
            names.append(os.readlink(f"/proc/self/fd/{number}"))
    return names


def forbid_files() -> None:
    """Let this process write nothing behind the first MiB of a file."""
    assert signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    _kept.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before))


def forbid_address_space() -> None:
    """Let this process have no more address space."""
    _lay_in_memory()
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        size = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (size, before[1]))
    _kept.append(lambda: resource.setrlimit(resource.RLIMIT_AS, before))


def _lay_in_memory() -> None:
    """Let the allocator keep some MiB, with which all goes on that needs no mapping of its own, such as Dask."""
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    m_trim_threshold, m_mmap_threshold = -1, -3
    for option in (m_mmap_threshold, m_trim_threshold):
        assert libc.mallopt(option, 1 << 30)
    spare = libc.malloc(ctypes.c_size_t(64 << 20))
    assert spare
    libc.free(ctypes.c_void_p(spare))


def forbid_mappings() -> None:
    """Use up all mappings that this process may have: no neighbours have the same permissions, so none are merged."""
    _lay_in_memory()
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
    # To part one takes two more; those that are left are taken one by one.
    taken: list[int] = []
    while (address := libc.mmap(anywhere, size, len(taken) % 2, flags, -1, nowhere)) != _MAP_FAILED:
        taken.append(address)

    def give_back() -> None:
        for address in taken:
            libc.munmap(ctypes.c_void_p(address), size)
        libc.munmap(ctypes.c_void_p(start), ctypes.c_size_t(pages * mmap.PAGESIZE))

    _kept.append(give_back)


def allow() -> None:
    """Undo the last of these."""
    _kept.pop()()


@contextmanager
def without(client: Any, what: Callable[[], None], address: str) -> Iterator[None]:
    """Let one worker run out of something for the time of a block."""
    client.run(what, workers=[address])
    try:
        yield
    finally:
        client.run(allow, workers=[address])


# --------------------------------------------------------------------------------------------------- taking all places


def take_rows(leave: int) -> None:
    """Let this process, a member, take all rows of its arena's table but a few."""
    from dask_shm_plugin import membership
    from dask_shm_plugin.layout import BLOCKS, Extent
    from dask_shm_plugin.references import Hold

    (arena,) = membership.all_arenas()
    holds: list[Any] = []

    def take(table: Any) -> None:
        first = int(np.max(np.sum(table.blocks.taken(), axis=1), initial=0)) // mmap.PAGESIZE
        count = BLOCKS - len(table.blocks.taken()) - leave
        for n in range(count):
            holds.append(Hold())
            arena._take(table, holds[-1], Extent((first + n) * mmap.PAGESIZE, mmap.PAGESIZE), 1)

    arena._access.run(take)
    _kept.append(holds.clear)


#: Takes all places for members of an arena but one, and keeps them until it is killed.
TAKE_PLACES = """
import sys
from dask_shm_plugin import layout, liveness, rendezvous
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.segment import Whereabouts

arena = Arena.attach(Whereabouts(*map(int, sys.argv[2:])), bytes.fromhex(sys.argv[1]))

def take(table):
    for slot in table.vacant():
        assert liveness.hold(arena.segment.fd, slot)
        arena.segment.reserve(layout.claims_offset(slot), layout.CLAIM_BYTES)
        table.join(slot, 1, 1)

arena._access.run(take)
print("taken", flush=True)
sys.stdin.read()
"""


def forget_warnings() -> None:
    """Let this process warn again, as a new one would."""
    from dask_shm_plugin import notices

    notices._told.clear()
    notices.warn_once.cache_clear()


def forget_mappings() -> None:
    """Let this process keep no mappings without views, which would serve where no new one is to be had."""
    from dask_shm_plugin import membership

    for arena in membership.all_arenas():
        arena.holdings.forget_mappings()
