"""Spill only values that free memory: a value that other processes hold, too, weighs nothing and stays.

Where the node is short of memory, such a value weighs this worker's share, and may be spilled.

Stock Dask weighs each value once, when it is stored, and evicts the oldest. But the holders of a block change all the
time. So the weights of values that lie in the arena are updated before Dask evicts.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import zict
from distributed.spill import SpillBuffer

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.table.layout import BlockId
from dask_shm_plugin.values import buffers

logger = logging.getLogger("dask_shm_plugin")


class _Held(NamedTuple):
    """A value in memory that lies in blocks: its weight as Dask measures it, and its bytes in each block."""

    weight: int
    rows: dict[BlockId, int]


class Spilling:
    """Adapts the weights and the eviction of one worker's values, from its creation to :meth:`stop`.

    Parameters
    ----------
    data
        The worker's mapping from keys to values. It is adapted only if it is Dask's own ``SpillBuffer``.
    arena
        The arena in which values may lie.
    largest
        Size (bytes) of the largest value that the worker could hold in private memory.

    Notes
    -----
    To be used on the worker's event loop.
    """

    def __init__(self, data: Any, arena: Arena, largest: int) -> None:
        self._data, self._arena, self._largest = data, arena, largest
        self._held: dict[Any, _Held] = {}
        self.counts_shares = False
        """Whether a value that other processes hold, too, weighs this worker's share; set while the node is short."""
        self._replaced: list[Replacement] = []
        if type(data) is SpillBuffer and type(data.fast) is zict.LRU:
            self._weight = data.weight
            self._evict_from_fast = data.fast.evict
            self._evict = data.evict
            self._replaced = [
                Replacement(data, "weight", self._weigh),
                Replacement(data.fast, "weight", self._weigh),
                Replacement(data.fast, "evict", self._evict_something),
                Replacement(data, "evict", self._evict_or_not),
            ]

    def stop(self) -> None:
        """Put Dask's functions and weights back in place."""
        for replacement in self._replaced:
            replacement.undo()
        self._replaced.clear()
        for key in list(self._held):
            self._set_weight(key, self._held[key].weight)
        self._held.clear()
        self._data = {}  # a reference to this object must not keep the values

    def reweigh(self) -> None:
        """Update the weights of all values that lie in the arena."""
        if not self._present():
            return
        # May run while a value is being stored, and an exception would lose that value.
        with contextlib.suppress(Exception):
            for key, weight in self._weights(self._held).items():
                self._set_weight(key, weight)

    def placed(self, key: Any, value: object) -> None:
        """Weigh a value in memory anew: it may lie in blocks since it was stored, for its arrays were sealed in place."""
        if self._replaced and key not in self._held and key in self._data.fast.weights:
            self._set_weight(key, self._weigh(key, value))

    def spillable_bytes(self) -> int:
        """Return the bytes that spilling would free: of blocks of values in memory that no other member refers to."""
        going = [held for held in self._present().values() if not self._is_too_large(held)]
        if not going:
            return 0
        rows, shares = list({row: None for held in going for row in held.rows}), self._arena.shares
        try:
            return int(np.sum(shares.sizes_of(rows)[shares.count_holders(rows) <= 1]))
        except Exception:  # this process has left the arena, or cannot read it
            return 0

    def surplus_bytes(self) -> int:
        """Return the bytes by which the sizes of the values in memory exceed this worker's shares in their blocks."""
        in_keys: defaultdict[BlockId, int] = defaultdict(int)
        for held in self._present().values():
            for row, size in held.rows.items():
                in_keys[row] += size
        if not in_keys:
            return 0
        rows, sizes, shares = list(in_keys), np.array([*in_keys.values()]), self._arena.shares
        try:
            counted = shares.sizes_of(rows) // np.maximum(shares.count_holders(rows), 1).astype(np.uint64)
        except Exception:  # as above
            return 0
        return int(np.sum(np.maximum(sizes - counted.astype(np.int64), 0)))

    def _present(self) -> dict[Any, _Held]:
        """Return the records of those values that are still in memory."""
        if self._held:
            self._held = {key: held for key, held in self._held.items() if key in self._data.fast.d}
        return self._held

    def _weigh(self, key: Any, value: object) -> int:
        """Weigh a value that is about to be stored, in place of Dask; an exception would lose the value."""
        weight = int(self._weight(key, value))
        self._held.pop(key, None)
        try:
            rows = buffers.blocks_of(value, self._arena.arena_id)
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
        """Return the weights of values, less the bytes that spilling would not free."""
        rows = list({row: None for held in of.values() for row in held.rows})
        holders = dict(zip(rows, self._arena.shares.count_holders(rows), strict=True))
        return {key: max(0, held.weight - sum(self._others(held, holders))) for key, held in of.items()}

    def _others(self, held: _Held, holders: dict[BlockId, int]) -> Iterator[int]:
        """Yield, for each block of a value, the bytes that do not count against this worker."""
        for row, size in held.rows.items():
            if self._is_too_large(held) or not (self.counts_shares or holders[row] <= 1):
                yield size
            elif holders[row] > 1:
                yield size - size // int(holders[row])

    def _is_too_large(self, held: _Held) -> bool:
        """Return whether a value would not fit into this worker's memory when read back; its blocks weigh nothing."""
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
        """Evict a value in place of ``LRU.evict``; as there, raise `KeyError` if there is nothing to evict."""
        if not key:
            self.reweigh()
            fast = self._data.fast
            key = (self._first(itertools.chain(fast.heavy, fast.order)),)
        return self._evict_from_fast(*key)

    def _first(self, keys: Iterable[Any]) -> Any:
        for key in keys:
            if self._frees_enough(key):
                return key
        raise KeyError("evicting a value would free too little: other processes hold the values in memory, too")

    def _frees_enough(self, key: Any) -> bool:
        held = self._held.get(key)
        return held is None or self.counts_shares or 2 * self._data.fast.weights[key] >= held.weight

    def _evict_or_not(self) -> int:
        """Evict a value in place of ``SpillBuffer.evict``, which never raises and returns -1 if it could not evict."""
        try:
            return int(self._evict())
        except KeyError:
            return -1
