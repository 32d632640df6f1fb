"""What is spilled: a value that others hold too weighs nothing here, and is not written to disk, for that frees nothing.

Stock Dask weighs each value once, when it is stored, and evicts the oldest. Who else holds a block changes all the time;
so the weights of values that lie in the arena are brought up to date before anyone goes by them.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import zict
from distributed.spill import SpillBuffer

from dask_shm_plugin import reach, seams
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.layout import Row

logger = logging.getLogger("dask_shm_plugin")


class _Held(NamedTuple):
    """A value in memory that lies in blocks: what it weighs by itself, and its bytes in each block."""

    weight: int
    rows: dict[Row, int]


class Spilling:
    """The eviction of one worker.

    Parameters
    ----------
    data
        The worker's mapping from keys to values. Nothing is done to any but Dask's own.
    arena
        Where values may lie.
    largest
        Bytes of the largest value that the worker could hold as its own.

    Notes
    -----
    Lives on the worker's event loop.
    """

    def __init__(self, data: Any, arena: Arena, largest: int) -> None:
        self._data, self._arena, self._largest = data, arena, largest
        self._held: dict[Any, _Held] = {}
        self.counts_shares = False
        """Whether a value that others hold, too, weighs its share, because this node runs short."""
        self._replaced: list[seams.Replacement] = []
        if type(data) is SpillBuffer and type(data.fast) is zict.LRU:
            self._weight = data.weight
            self._evict_from_fast = data.fast.evict
            self._evict = data.evict
            self._replaced = [
                seams.Replacement(data, "weight", self._weigh),
                seams.Replacement(data.fast, "weight", self._weigh),
                seams.Replacement(data.fast, "evict", self._evict_something),
                seams.Replacement(data, "evict", self._evict_or_not),
            ]

    def stop(self) -> None:
        """Put everything back."""
        for replacement in self._replaced:
            replacement.undo()
        self._replaced.clear()
        for key in list(self._held):
            self._set_weight(key, self._held[key].weight)
        self._held.clear()
        self._data = {}  # whoever keeps this object keeps no values

    def reweigh(self) -> None:
        """Bring the weights up to date."""
        if not self._present():
            return
        # Comes while a value is stored, which would be lost.
        with contextlib.suppress(Exception):
            for key, weight in self._weights(self._held).items():
                self._set_weight(key, weight)

    def alone(self) -> int:
        """Return the bytes of blocks that spilling would free: of values in memory, held by no other member."""
        going = [held for held in self._present().values() if not self._is_too_large(held)]
        if not going:
            return 0
        rows, weights = list({row: None for held in going for row in held.rows}), self._arena.weights
        try:
            holders = weights.count_holders(rows)
            return sum(weights.size_of(row) for row, count in zip(rows, holders, strict=True) if count <= 1)
        except Exception:  # there is no arena any more, or none to be asked
            return 0

    def _present(self) -> dict[Any, _Held]:
        """Return what is known of the values in memory."""
        if self._held:
            self._held = {key: held for key, held in self._held.items() if key in self._data.fast.d}
        return self._held

    def _weigh(self, key: Any, value: object) -> int:
        """Stand in for the weight of a value that is about to be stored: must not raise, or the value would be lost."""
        weight = int(self._weight(key, value))
        self._held.pop(key, None)
        try:
            rows = reach.rows_of(value, self._arena.arena_id)
            if not rows:
                return weight
            held = _Held(weight, rows)
            weight = self._weights({key: held})[key]
        except Exception:
            logger.debug("the value of %r is weighed as a private one", key, exc_info=True)
        else:
            self._held[key] = held
        return weight

    def _weights(self, of: dict[Any, _Held]) -> dict[Any, int]:
        """Return the weights of values less what would not be freed."""
        rows = list({row: None for held in of.values() for row in held.rows})
        holders = dict(zip(rows, self._arena.weights.count_holders(rows), strict=True))
        return {key: max(0, held.weight - sum(self._others(held, holders))) for key, held in of.items()}

    def _others(self, held: _Held, holders: dict[Row, int]) -> Iterator[int]:
        """Return the bytes of each block of a value that are not this worker's to free."""
        for row, size in held.rows.items():
            if self._is_too_large(held) or not (self.counts_shares or holders[row] <= 1):
                yield size
            elif holders[row] > 1:
                yield size - size // int(holders[row])

    def _is_too_large(self, held: _Held) -> bool:
        """Tell whether a value would not fit into the memory of this worker when it is read back: it stays."""
        return held.weight > self._largest

    def _set_weight(self, key: Any, weight: int) -> None:
        fast = self._data.fast
        with fast.lock:
            before = fast.weights.get(key)
            if before is None or before == weight:
                return
            fast.weights[key] = weight
            fast.total_weight += weight - before
            if weight > fast.n:
                fast.heavy.add(key)
            else:
                fast.heavy.discard(key)

    def _evict_something(self, *key: Any) -> Any:
        """Stand in for ``LRU.evict``, which raises `KeyError` where there is nothing to evict."""
        if not key:
            self.reweigh()
            fast = self._data.fast
            key = (self._first(itertools.chain(fast.heavy, fast.order)),)
        return self._evict_from_fast(*key)

    def _first(self, keys: Iterable[Any]) -> Any:
        for key in keys:
            if self._frees_enough(key):
                return key
        raise KeyError("others hold all that is in memory")

    def _frees_enough(self, key: Any) -> bool:
        held = self._held.get(key)
        return held is None or self.counts_shares or 2 * self._data.fast.weights[key] >= held.weight

    def _evict_or_not(self) -> int:
        """Stand in for ``SpillBuffer.evict``, which never raises, and returns -1 where it could not evict."""
        try:
            return int(self._evict())
        except KeyError:
            return -1
