"""A shuffle is started again if an output is needed after its shards were given up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from dask.context import thread_state
from distributed import Reschedule
from distributed.utils import sync

from dask_shm_plugin.seams import shuffle as seams


class Restart:
    """Starts the shuffle of a run again, for the task that calls it.

    Parameters
    ----------
    run
        The run of a shuffle on this worker.
    note
        Called with the id of the shuffle, in the thread of a task, before the shuffle is started again.
    """

    def __init__(self, run: Any, note: Callable[[Any], None]) -> None:
        self._run, self._note = run, note
        self._rescheduled: set[Any] = set()

    def __call__(self) -> NoReturn:
        """Start the shuffle again, and let Dask run this task later.

        Raises
        ------
        Reschedule
            The shuffle was started again, by this task or by another one.
        RuntimeError
            The scheduler did not start it again, because a task that needs it has failed.
        """
        key = getattr(thread_state, "key", None)
        if key in self._rescheduled:
            raise RuntimeError(f"{self._run} has dropped shards that are needed again, and cannot be started again")
        self._rescheduled.add(key)
        self._note(self._run.id)
        sync(self._run._loop, seams.ask_for_restart, self._run)
        raise Reschedule
