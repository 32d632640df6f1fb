"""Readers: processes that attach a value that another process has put, and measure how long it takes them."""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import machine
import numpy as np
from remote import Remote, remote


class Answer(NamedTuple):
    """Seconds to attach a value and to read one element of every page; the sum of those; a checksum, if wanted."""

    attach: float
    read: float
    total: int
    checksum: int


class Timed:
    """Attaches values with a function, and keeps the latest."""

    def __init__(self, get: Callable[[Any], np.ndarray], detach: Callable[[], None] = lambda: None) -> None:
        self._get, self._detach = get, detach

    def attach(self, name: Any, is_whole: bool) -> Answer:
        """Attach a value and read it."""
        start = time.perf_counter()
        self._x = self._get(name)
        attached = time.perf_counter()
        total = machine.read_pages(self._x)
        read = time.perf_counter()
        return Answer(attached - start, read - attached, total, zlib.crc32(self._x) if is_whole else 0)

    def detach(self) -> None:
        """Release the value."""
        self._x = None
        self._detach()


@contextlib.contextmanager
def joined(kind: type[Any], whereabouts: Any) -> Iterator[Timed]:
    """Join a store."""
    store = kind()
    store.join(whereabouts)
    yield Timed(store.attach, store.detach)


class Process:
    """Such a process, as seen by the writer."""

    def __init__(self, other: Remote) -> None:
        self._other = other

    def attach(self, name: Any, is_whole: bool) -> Answer:
        """Let it attach a value and read it."""
        return self._other.ask(Timed.attach, name, is_whole)

    def detach(self) -> None:
        """Let it release the value."""
        self._other.ask(Timed.detach)


@contextlib.contextmanager
def reader(store: Any, whereabouts: Any) -> Iterator[Any]:
    """Start a reader: in the store's own way, if it has one."""
    if hasattr(store, "reader"):
        yield store.reader()
    else:
        with remote(joined, type(store), whereabouts) as other:
            yield Process(other)
