"""Which values of a worker may be changing: those that a task has had as its input since somebody began to watch.

A task may write to its input in place, and may return it as its result. Dask lets the other tasks of that worker see it,
and sends what the value has become. So what was copied from a value says nothing any more when a task has had the value
since: neither may the copy take the value's place, nor may others be sent to the copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any


class Watch:
    """A watch over some keys.

    Attributes
    ----------
    is_quiet
        Whether no task has had any of the keys as its input since the watch began, and none had then.
    """

    def __init__(self, keys: frozenset[Any], *, is_quiet: bool) -> None:
        self.keys = keys
        self.is_quiet = is_quiet

    def __repr__(self) -> str:
        return f"<Watch over {set(self.keys)}, {'quiet' if self.is_quiet else 'over'}>"


class Uses:
    """The inputs of one worker's tasks.

    Parameters
    ----------
    inputs
        Returns the keys that the running tasks have as their inputs.
    used
        Called with each watched key that a task begins to use, before it does.

    Notes
    -----
    Lives on the worker's event loop, on which tasks are started.
    """

    def __init__(self, inputs: Callable[[], set[Any]], used: Callable[[Any], None]) -> None:
        self._inputs, self._used = inputs, used
        self._watches: dict[Any, list[Watch]] = {}

    def watch(self, keys: Iterable[Any]) -> Watch:
        """Begin to watch."""
        keys = frozenset(keys)
        watch = Watch(keys, is_quiet=not self.are_running(keys))
        for key in watch.keys:
            self._watches.setdefault(key, []).append(watch)
        return watch

    def end(self, watch: Watch) -> None:
        """Watch no more; harmless when it was done before."""
        for key in watch.keys:
            watches = self._watches.get(key, [])
            if watch in watches:
                watches.remove(watch)
            if not watches:
                self._watches.pop(key, None)

    def are_running(self, keys: Iterable[Any]) -> bool:
        """Tell whether a running task has any of some keys as its input."""
        return not self._inputs().isdisjoint(keys)

    def begin(self, keys: Iterable[Any]) -> None:
        """Take note that a task begins, which has some keys as its inputs."""
        if not self._watches:
            return
        for key in keys:
            for watch in self._watches.get(key, ()):
                if watch.is_quiet:
                    watch.is_quiet = False
                    for watched in watch.keys:
                        self._used(watched)
