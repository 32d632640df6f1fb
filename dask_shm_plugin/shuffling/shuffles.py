"""The shuffles of a worker: each new run is made to use the arena, and is told when its outputs are done."""

from __future__ import annotations

import weakref
from typing import Any

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.seams import shuffle as seams
from dask_shm_plugin.seams.replacement import SharedReplacement
from dask_shm_plugin.shuffling.assembly import Assembly
from dask_shm_plugin.shuffling.failures import forget_written
from dask_shm_plugin.shuffling.kept import Allowance, KeptShards
from dask_shm_plugin.shuffling.restarts import Restart
from dask_shm_plugin.shuffling.sending import Sender

_ACTIVE: weakref.WeakKeyDictionary[Any, Shuffles] = weakref.WeakKeyDictionary()


class Shuffles:
    """The shuffles of one worker, from its creation to :meth:`stop`.

    Parameters
    ----------
    worker
        The worker.
    arena
        The arena of its process.

    Notes
    -----
    To be used on the worker's event loop. Runs that begin later use the arena. After :meth:`stop`, those under way
    complete without it: their further partitions go Dask's way, and what is kept is read or dropped with the run.
    """

    def __init__(self, worker: Any, arena: Arena) -> None:
        self._worker, self._arena = worker, arena
        self._is_on = True
        self._allowances: weakref.WeakKeyDictionary[Any, Allowance] = weakref.WeakKeyDictionary()
        self._readers: dict[Any, list[tuple[KeptShards, str]]] = {}
        self._restarted: set[Any] = set()
        _ACTIVE[worker] = self
        _REFRESH.begin()

    def stop(self) -> None:
        """Let all further runs go Dask's way."""
        self._is_on = False
        self._readers.clear()
        if _ACTIVE.get(self._worker) is self:
            del _ACTIVE[self._worker]
        _REFRESH.end()

    def share(self, run: Any, plugin: Any) -> None:
        """Let a new run use the arena; harmless if it does already, or is of an unknown kind."""
        if type(run) not in (seams.ArrayRechunkRun, seams.DataFrameShuffleRun) or "_shard_partition" in vars(run):
            return
        Sender(run, plugin, self._arena, self.is_on)
        buffer, allowance, restart = run._disk_buffer, None, None
        if isinstance(buffer, seams.DiskShardsBuffer):
            forget_written(buffer)
            if run.id in self._restarted:
                return  # its outputs are read more than once, which files allow
            allowance, restart = self._allowance(buffer.memory_limiter), Restart(run, self._restarted.add)
        if type(run) is seams.ArrayRechunkRun:
            Assembly(run, allowance, self.is_on, restart)
        elif allowance is not None and restart is not None:
            KeptShards(run, allowance, self.is_on, self._note_reader, self._note_closed, restart)

    def is_on(self) -> bool:
        """Return whether runs may use the arena."""
        return self._is_on

    def finished(self, key: Any) -> None:
        """Drop the kept shards that a task has read, because its result is in memory."""
        for kept, name in self._readers.pop(key, ()):
            self._worker.loop.add_callback(kept.drop, name)

    def _note_reader(self, key: Any, kept: KeptShards, name: str) -> None:
        # A task runs in one thread, and finishes only after it: no other thread uses its entry now.
        if key is not None and self._is_on:
            self._readers.setdefault(key, []).append((kept, name))

    def _note_closed(self, closed: KeptShards) -> None:
        # Tasks that were cancelled, or have failed, have not finished. Threads may add entries meanwhile.
        for key, read in list(self._readers.items()):
            read[:] = [(kept, name) for kept, name in read if kept is not closed]
            if not read:
                self._readers.pop(key, None)

    def _allowance(self, limiter: Any) -> Allowance:
        if limiter not in self._allowances:
            self._allowances[limiter] = Allowance(limiter)
        return self._allowances[limiter]


async def _refresh(manager: Any, *args: Any, **kwargs: Any) -> Any:
    """Run in place of ``_ShuffleRunManager._refresh``; nothing uses a new run before this returns.

    A run that began before the plugin was switched on may be returned, and stays as it is.
    """
    before = set(manager._active_runs.values())
    run = await _REFRESH.old(manager, *args, **kwargs)
    shuffles = _ACTIVE.get(manager._plugin.worker)
    if shuffles is not None and run not in before:
        shuffles.share(run, manager._plugin)
    return run


_REFRESH = SharedReplacement(seams.ShuffleRunManager, "_refresh", _refresh)
