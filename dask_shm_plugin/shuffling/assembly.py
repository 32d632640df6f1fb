"""Outputs of a rechunk that are put together in memory while their shards arrive, not from Dask's files at the end.

Each shard is copied to its place in the output once, from where it has arrived. So nothing of it is kept: neither its block
in the arena, nor a copy in a file. Memory is taken for the outputs alone, which the tasks that make them take anyway.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from itertools import accumulate, product
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from dask_shm_plugin.crashpoints import step
from dask_shm_plugin.seams.replacement import Replacement
from dask_shm_plugin.shuffling.kept import Allowance, in_private
from dask_shm_plugin.shuffling.parcels import Index, is_plain

Place = tuple[slice, ...]
Part = tuple[Index, npt.NDArray[Any]]
"""The index of a shard within its output, and its elements."""


class Assembly:
    """The outputs of one rechunk on one worker that are put together in memory, in front of Dask's buffer of shards.

    Parameters
    ----------
    run
        The run of a rechunk on this worker. Its methods, and those of its buffer, are replaced.
    allowance
        The bytes that this worker may keep, or None if Dask keeps all shards in memory, too.
    is_on
        Whether more outputs may be put together in memory.
    restart
        Starts the shuffle again, see :class:`Restart`; None if Dask cannot read an output twice, either.

    Notes
    -----
    A task gets the output itself, and may write to it. If the output is needed again, the shuffle is started again.

    :meth:`output` and :meth:`read` are called in the threads of tasks, after the last shard has arrived; all other methods
    on the worker's event loop.
    """

    def __init__(
        self,
        run: Any,
        allowance: Allowance | None,
        is_on: Callable[[], bool],
        restart: Callable[[], NoReturn] | None,
    ) -> None:
        self._run, self._allowance, self._is_on, self._restart = run, allowance, is_on, restart
        self._lengths = _lengths(run.split_axes, run.new)
        self._outputs: dict[str, Output | None] = {}
        self._given: set[str] = set()
        self._lock = threading.Lock()
        buffer = run._disk_buffer
        self._write = Replacement(buffer, "write", self.write).old
        self._read = Replacement(buffer, "read", self.read).old
        self._close = Replacement(buffer, "close", self.close).old
        self._output = Replacement(run, "_get_output_partition", self.output).old

    @step("keep shards")
    async def write(self, data: dict[str, list[Part]]) -> None:
        """Put shards in their places, and pass those that have none on to Dask's buffer."""
        await self._write({})  # raises if the buffer has failed or is closed
        left = {name: rest for name, shards in data.items() if (rest := self._put(name, shards))}
        if self._allowance is None:
            left = {name: in_private(shards) for name, shards in left.items()}
        await self._write(left)
        if self._allowance is not None:
            await self._allowance.limiter.wait_for_available()

    def _put(self, name: str, shards: list[Part]) -> list[Part]:
        """Put shards of one output in their places, and return the others."""
        if name not in self._outputs:
            self._outputs[name] = self._begin(name, shards[0][1])
        output = self._outputs[name]
        return shards if output is None else [(index, shard) for index, shard in shards if not output.put(index, shard)]

    def _begin(self, name: str, shard: npt.NDArray[Any]) -> Output | None:
        """Make an output of the type of its first shard, unless there is no room, or its shape is not known."""
        if self._lengths is None or not self._is_on() or not is_plain(shard):
            return None
        try:
            output = Output([self._lengths[axis][n] for axis, n in enumerate(map(int, name.split("_")))], shard.dtype)
        except MemoryError:
            return None
        if self._allowance is not None:
            if not self._allowance.has(output.array.nbytes):
                return None
            self._allowance.take(output.array.nbytes)
        return output

    @step("read shards")
    def output(self, partition_id: Index, key: Any, **kwargs: Any) -> Any:
        """Return an output, in place of ``ShuffleRun._get_output_partition``."""
        self._run.raise_if_closed()
        self._run._disk_buffer.raise_on_exception()
        name = "_".join(map(str, partition_id))
        with self._lock:
            output = self._outputs.get(name)
            if output is not None and not output.missing:
                del self._outputs[name]
                self._given.add(name)
                # The callback does not get the output: nothing but its task must refer to it, so that it can be shared.
                self._run._loop.add_callback(self._give_back, output.array.nbytes)
                return output.array
            is_given = name in self._given
        if is_given and self._restart is not None:
            self._restart()
        return self._output(partition_id, key, **kwargs)

    def read(self, name: str) -> list[list[Part]]:
        """Return the shards of an output that is not complete, because some of them did not fit."""
        output, others = self._outputs.get(name), self._read(name)
        return others if output is None else [*others, output.shards()]

    async def close(self) -> None:
        """Close the buffer, as Dask does when the rechunk has ended or failed, and drop all outputs."""
        try:
            await self._close()
        finally:
            with self._lock:
                left, self._outputs = list(self._outputs.values()), {}
            for output in left:
                if output is not None:
                    await self._give_back(output.array.nbytes)

    async def _give_back(self, size: int) -> None:
        if self._allowance is not None:
            await self._allowance.give_back(size)


class Output:
    """One output of a rechunk, of which some shards are in their places.

    Parameters
    ----------
    lengths
        For each axis, the lengths of the shards along it.
    dtype
        The type of the elements.

    Attributes
    ----------
    array
        The output.
    missing
        The places of the shards that have not arrived, by their index.
    """

    def __init__(self, lengths: list[list[int]], dtype: np.dtype[Any]) -> None:
        self.array: npt.NDArray[Any] = np.empty([sum(axis) for axis in lengths], dtype)
        self._places = _places(lengths)
        self.missing = dict(self._places)

    def put(self, index: Index, shard: npt.NDArray[Any]) -> bool:
        """Copy a shard to its place; return False if it is not of the type and shape of this place."""
        place = self.missing.get(index)
        if place is None or not is_plain(shard) or shard.dtype != self.array.dtype:
            return False
        target = self.array[place]
        if target.shape != shard.shape:
            return False
        target[...] = shard
        del self.missing[index]
        return True

    def shards(self) -> list[Part]:
        """Return views of the shards that have arrived."""
        return [(index, self.array[place]) for index, place in self._places.items() if index not in self.missing]


def _places(lengths: list[list[int]]) -> dict[Index, Place]:
    """Return the places of all shards of an output, by their index."""
    axes = [
        [(n, slice(end - length, end)) for n, (length, end) in enumerate(zip(axis, accumulate(axis), strict=True))]
        for axis in lengths
    ]
    return {tuple(n for n, _ in one): tuple(part for _, part in one) for one in product(*axes)}


def _lengths(split_axes: Iterable[Any], new: Iterable[Any]) -> list[list[list[int]]] | None:
    """Return the lengths of shards by axis, new chunk and index within it; None if lengths of chunks are not known."""
    axes = []
    for split_axis, chunks in zip(split_axes, new, strict=True):
        lengths: list[dict[int, int]] = [{} for _ in chunks]
        for chunk, index, part in (split for old in split_axis for split in old):
            if part.start is None or part.stop is None:
                return None
            lengths[chunk][index] = part.stop - part.start
        axes.append([[of_chunk[index] for index in range(len(of_chunk))] for of_chunk in lengths])
    return axes
