"""The state of one value of a worker: its published copy, and whether it was read since it was alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dask_shm_plugin.values.codec import Published


class Entry:
    """The state of the value under a key: its published copy, and whether the value may have changed since.

    If nothing else reached a value at some moment, and it was not handed out since, it is unchanged since then.
    Hand-outs for answers of this worker do not count, if all of these answers are over.

    Parameters
    ----------
    value
        The value.
    remove
        Withdraws the listing of the value.

    Notes
    -----
    Any thread may call :meth:`handed_out` at any moment. There must never be a moment when the value is listed and a
    reader has it: the listing is made and withdrawn under one lock.
    """

    def __init__(self, value: object, remove: Callable[[], None]) -> None:
        self.value = value
        self.published: Published | None = None
        self.asks = 0
        """The number of answers in progress that read the value."""
        self.run = 0
        """How many times the value was found alone while it was not intact."""
        self.is_verified = False
        """Whether the published copy equals the value; valid only while :attr:`is_intact`."""
        self.is_adopted = self.is_private = self.is_listed = self.is_idle = self.is_settling = False
        self._lock = threading.RLock()
        self._remove_listing = remove
        self.reads = 0
        """How many times the value was handed out."""
        self._safe_at: int | None = None

    @property
    def is_intact(self) -> bool:
        """Whether only answers of this worker have read the value since it was last found alone."""
        return self._safe_at == self.reads

    def handed_out(self) -> None:
        """Note that a reader is about to get the value, and withdraw the listing."""
        with self._lock:
            self.reads += 1
            self._withdraw()

    def begin(self, reads: int, *, is_verified: bool = False) -> None:
        """Note that the value was found alone after ``reads`` hand-outs; that number was taken before the look."""
        self.run += 1
        self.is_verified, self._safe_at = is_verified, reads

    def was_read_once_since(self, reads: int) -> None:
        """Discount the one hand-out after ``reads`` hand-outs, because an answer of this worker caused it."""
        with self._lock:
            if self._safe_at == reads == self.reads - 1:
                self._safe_at = self.reads

    def list(self, add: Callable[[], None]) -> None:
        """List the value if it is intact and its published copy equals it."""
        with self._lock:
            if self.is_intact and self.is_verified and not self.is_listed:
                self.is_listed = True
                add()
                if not self.is_intact:  # a finalizer in this thread has read the value meanwhile
                    self.is_listed = True
                    self._withdraw()

    def give_way(self, swap: Callable[[], None]) -> bool:
        """Let another value replace this one, if this one is intact and its published copy equals it.

        A reader may have taken this value from the worker's data since it was found alone, and not have reported it
        yet. It takes the new value when it reports.

        Parameters
        ----------
        swap
            Replaces the value.

        Returns
        -------
        bool
            Whether the value was replaced.
        """
        with self._lock:
            if not (self.is_intact and self.is_verified):
                return False
            swap()
            return True

    def close(self) -> None:
        """Withdraw the listing, and treat the value as not intact."""
        with self._lock:
            self._withdraw()
            self._safe_at = None

    def _withdraw(self) -> None:
        if self.is_listed:
            self.is_listed = False
            self._remove_listing()


class Ask:
    """One answer that is about to be made from some values: it reads each of them once.

    Parameters
    ----------
    entries
        The entries of its large values, by key.
    """

    def __init__(self, entries: dict[Any, Entry]) -> None:
        self.entries = entries
        self._reads = {key: entry.reads for key, entry in entries.items()}
        for entry in entries.values():
            entry.asks += 1

    def has_read(self) -> None:
        """Note that the values were read for this answer."""
        for key, reads in self._reads.items():
            self.entries[key].was_read_once_since(reads)
        self._reads.clear()
