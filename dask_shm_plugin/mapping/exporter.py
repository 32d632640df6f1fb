"""The object that keeps a mapping alive as long as any array or memoryview over it lives."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np


class AtEnd:
    """Calls a function when this object is finalized, but only in the process that created it.

    Parameters
    ----------
    function, arguments
        The function and its positional arguments.

    Notes
    -----
    The finalizer may run at any moment and in any thread, even while that thread holds a lock: so the function must not
    take a lock. It may also run in a forked child while the parent still needs the resource: so it compares pids.
    """

    __slots__ = ("_call", "_pid")

    def __init__(self, function: Callable[..., object], *arguments: Any) -> None:
        self._call, self._pid = functools.partial(function, *arguments), os.getpid()

    def __del__(self, getpid: Callable[[], int] = os.getpid) -> None:
        if getpid() == self._pid:
            self._call()


class Exporter:
    """The base object of all arrays and memoryviews over one mapping.

    Parameters
    ----------
    address, length
        The mapping; length in bytes.
    kept
        An object that is kept alive as long as any array or memoryview over the mapping.

    Notes
    -----
    An exporter has no finalizer of its own: that would be Python code, which can be interrupted.
    """

    __slots__ = ("__array_interface__", "_kept")

    def __init__(self, address: int, length: int, kept: object) -> None:
        self.__array_interface__ = {"data": (address, False), "shape": (length,), "typestr": "|u1", "version": 3}
        self._kept = kept

    def bytes(self) -> memoryview:
        """Return the whole mapping as a flat memoryview, which keeps this object alive."""
        return np.asarray(self).data
