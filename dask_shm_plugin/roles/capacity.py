"""Determine the capacity of a new arena."""

from __future__ import annotations

from dask_shm_plugin.config import Options
from dask_shm_plugin.linux import limits


class CapacityPlan:
    """The capacity of an arena that this process may create, and the reasons for it.

    Parameters
    ----------
    options
        The settings.

    Attributes
    ----------
    chosen
        The reasons, as a text for the log, once :meth:`capacity` was called; None before.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        self.chosen: str | None = None

    def capacity(self) -> int:
        """Return the capacity of a new arena in bytes."""
        limit, left = limits.tightest(), limits.least_left()
        self.chosen = (
            f"shm.capacity is {self._options.capacity!r}; the limit is {limit.size} bytes ({limit.name}); "
            f"now {left.size} bytes can be had ({left.name})"
        )
        return self._options.capacity_here()
