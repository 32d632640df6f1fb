"""The settings of the plugin: defaults and checks. Their namespace in Dask's configuration is ``shm``."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
from typing import Any, NamedTuple

import dask.config
from dask.utils import parse_bytes, parse_timedelta

from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.linux import limits

_CHOICES = {
    "publish": ("on-request", "on-completion"),
    "views": ("copy-on-write", "read-only"),
    "shuffle": ("auto", "off"),
    "born": ("auto", "on", "off"),
}
_PERCENT = re.compile(r"\s*(\d+(?:\.\d+)?)\s*%\s*")


class Options(NamedTuple):
    """The settings of one process; sizes in bytes, times in seconds.

    Notes
    -----
    ``capacity`` stays as the user wrote it, because "50%" is another number of bytes on each node.
    """

    capacity: str | int
    threshold: int
    publish: str
    views: str
    warm: float
    shuffle: str
    born: str

    @property
    def is_share(self) -> bool:
        """Whether the capacity is a share of the machine's memory, and not of a control group's, or a number of bytes."""
        return bool(_PERCENT.fullmatch(str(self.capacity))) and limits.tightest().name == limits.PHYSICAL

    def capacity_here(self) -> int:
        """Return the capacity of an arena on this node, in bytes.

        Raises
        ------
        TypeError, ValueError
            The capacity is neither a size in bytes nor a percentage of at most 100%.
        SharedMemoryError
            The capacity is a percentage, and the memory of this node cannot be read.
        """
        percent = _PERCENT.fullmatch(str(self.capacity))
        if percent and float(percent[1]) > 100:
            raise ValueError(f"shm.capacity is {self.capacity!r}; a node has no more than 100%")
        if percent:
            return int(limits.memory_limit() * float(percent[1]) / 100)
        return _bytes("capacity", self.capacity)


@functools.cache
def load_defaults() -> dict[str, Any]:
    """Add the defaults to Dask's configuration, below all settings of the user, and return them."""
    import yaml

    with open(os.path.join(os.path.dirname(__file__), "dask_shm.yaml")) as file:
        defaults: dict[str, Any] = yaml.safe_load(file)
    dask.config.update_defaults(defaults)
    return dict(defaults["shm"])


def options(given: dict[str, Any]) -> Options:
    """Return the settings: the given ones, and for the others those of Dask's configuration.

    Parameters
    ----------
    given
        Settings by name; None means that a setting is not given.

    Raises
    ------
    TypeError, ValueError
        A setting is unknown or has an invalid value; the message names it and the allowed values.
    """
    # If the namespace ``shm`` first came into being in a ``with dask.config.set(...)``, leaving that block removes all
    # of it, the defaults included. So they are merged in here each time.
    configured = {**load_defaults(), **dask.config.get("shm", default={})}
    merged = {**configured, **{name: value for name, value in given.items() if value is not None}}
    unknown = sorted(set(merged) - set(Options._fields))
    if unknown:
        raise ValueError(
            f"unknown option shm.{unknown[0]}; known are {', '.join('shm.' + name for name in Options._fields)}"
        )
    for name in ("shuffle", "born"):
        if isinstance(merged[name], bool):  # YAML reads a bare ``off`` or ``on`` as a boolean
            merged[name] = "on" if merged[name] else "off"
    for name, choices in _CHOICES.items():
        if merged[name] not in choices:
            raise ValueError(f"shm.{name} is {merged[name]!r}; it may be {' or '.join(map(repr, choices))}")
    result = Options(
        capacity=merged["capacity"],
        threshold=_bytes("threshold", merged["threshold"]),
        publish=merged["publish"],
        views=merged["views"],
        warm=_seconds("warm", merged["warm"]),
        shuffle=merged["shuffle"],
        born=merged["born"],
    )
    # Reports an invalid capacity here. Its number of bytes is known only on the node where the arena is made.
    with contextlib.suppress(SharedMemoryError):
        result.capacity_here()
    return result


def _bytes(name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(f"shm.{name} is {value!r}; it must be a number of bytes or a text like '1 GiB'")
    try:
        size = int(parse_bytes(value))
    except (ValueError, OverflowError) as error:
        raise ValueError(f"shm.{name} is {value!r}; it must be a number of bytes or a text like '1 GiB'") from error
    if size < 0:
        raise ValueError(f"shm.{name} is {value!r}; it must not be negative")
    return size


def _seconds(name: str, value: Any) -> float:
    remedy = f"shm.{name} is {value!r}; it must be a number of seconds or a text like '2 s'"
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        raise TypeError(remedy)
    try:
        seconds = float(parse_timedelta(value))
    except (ValueError, KeyError) as error:
        raise ValueError(remedy) from error
    if not 0 <= seconds < math.inf:
        raise ValueError(remedy)
    return seconds
