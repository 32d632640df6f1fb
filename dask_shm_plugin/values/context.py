"""Record whether a serializer reads the context that a connection passes to it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

_BY_NAME = ("__getitem__", "__contains__", "get")
_AS_A_WHOLE = (
    *(
        "__iter__",
        "__reversed__",
        "__eq__",
        "__ne__",
        "__repr__",
        "keys",
        "values",
        "items",
        "copy",
        "__or__",
        "__ror__",
    ),
    *("__setitem__", "__delitem__", "__ior__", "update", "clear", "pop", "popitem", "setdefault"),
)


class Context(dict[str, Any]):
    """The context of one serialization.

    Attributes
    ----------
    is_personal
        Whether a serializer read more than the version of pickle. Its result may then depend on the sender or the
        recipient, and is not sent to any other process.
    """

    is_personal = False
    __hash__ = None  # like that of a dict


def _watched(name: str) -> Callable[..., Any]:
    method = getattr(dict, name)

    @functools.wraps(method)
    def call(self: Context, *args: Any, **kwargs: Any) -> Any:
        if name not in _BY_NAME or args[:1] != ("pickle-protocol",):
            self.is_personal = True
        return method(self, *args, **kwargs)

    return call


for _name in (*_BY_NAME, *_AS_A_WHOLE):
    setattr(Context, _name, _watched(_name))
