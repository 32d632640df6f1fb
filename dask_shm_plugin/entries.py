"""What is known of one value of a worker: what was published of it, and who has had it since it was alone."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from dask_shm_plugin.codec import Published


class Entry:
    """What is known of the value under a key: what was published of it, and who has had it since.

    A value that nothing else reached at some moment, and that was not handed out since, is what it was then. What was
    handed out for answers of this worker does not count, if all of these are over.

    Notes
    -----
    ``handed_out`` may be called by any thread at any moment. There must never be a moment when the value is listed and
    a reader has it: the listing is made, and withdrawn, under one lock.
    """

    def __init__(self, value: object, cross_out: Callable[[], None]) -> None:
        self.value = value
        self.published: Published | None = None
        self.asks = 0
        """Answers under way that read the value."""
        self.run = 0
        """How often it was seen to be alone after it had not been."""
        self.is_verified = False
        """Whether what is published is the value as it is now, as long as :attr:`is_intact`."""
        self.is_adopted = self.is_private = self.is_listed = self.is_idle = self.is_settling = False
        self._lock = threading.RLock()
        self._cross_out = cross_out
        self.reads = 0
        """How often the value was handed out."""
        self._safe_at: int | None = None

    @property
    def is_intact(self) -> bool:
        """Whether nobody but answers of this worker has had the value since it was alone."""
        return self._safe_at == self.reads

    def handed_out(self) -> None:
        """Take note that somebody gets the value."""
        with self._lock:
            self.reads += 1
            self._withdraw()

    def begin(self, reads: int, *, is_verified: bool = False) -> None:
        """Take note that the value was alone after so many hand-outs; they are counted before it is looked at."""
        self.run += 1
        self.is_verified, self._safe_at = is_verified, reads

    def was_read_once_since(self, reads: int) -> None:
        """Let the one hand-out since then not count, for it was an answer's."""
        with self._lock:
            if self._safe_at == reads == self.reads - 1:
                self._safe_at = self.reads

    def list(self, enter: Callable[[], None]) -> None:
        """List the value if it is intact, and published as it is now."""
        with self._lock:
            if self.is_intact and self.is_verified and not self.is_listed:
                self.is_listed = True
                enter()
                if not self.is_intact:  # a finalizer has read it meanwhile, in this thread
                    self.is_listed = True
                    self._withdraw()

    def give_way(self, swap: Callable[[], None]) -> bool:
        """Let another value take the place of this one, if it is intact and published as it is now; return whether it has.

        Who has taken this value from the worker's data since it was seen to be alone, and has not told yet, takes it anew.
        """
        with self._lock:
            if not (self.is_intact and self.is_verified):
                return False
            swap()
            return True

    def close(self) -> None:
        """List nothing any more."""
        with self._lock:
            self._withdraw()
            self._safe_at = None

    def _withdraw(self) -> None:
        if self.is_listed:
            self.is_listed = False
            self._cross_out()


class Ask:
    """One answer that is about to be made of some values: it reads each of them once.

    Parameters
    ----------
    entries
        Of the values that are large.
    """

    def __init__(self, entries: dict[Any, Entry]) -> None:
        self.entries = entries
        self._reads = {key: entry.reads for key, entry in entries.items()}
        for entry in entries.values():
            entry.asks += 1

    def has_read(self) -> None:
        """Take note that the values were read for this answer."""
        for key, reads in self._reads.items():
            self.entries[key].was_read_once_since(reads)
        self._reads.clear()
