"""Replace attributes and dict items of ``distributed``, and put the old ones back."""

from __future__ import annotations

import threading
from typing import Any


class Replacement:
    """The replacement of an attribute, or of an item of a dict, until :meth:`undo`.

    Parameters
    ----------
    owner
        The object, or the dict.
    name
        The name of the attribute, or the key of the item.
    new
        The new value.

    Attributes
    ----------
    old
        The value before the replacement.
    """

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self._owner, self._name, self._new = owner, name, new
        self._is_item = isinstance(owner, dict)
        held = owner if self._is_item else getattr(owner, "__dict__", None)
        # Objects without a ``__dict__`` have their attributes in slots.
        self._was_there = held is None or name in held
        self.old = held[name] if held is not None and self._was_there else getattr(owner, name)
        self._put(new)

    def undo(self) -> None:
        """Put the old value back, unless other code has replaced the new one since."""
        if self._present() is not self._new:
            return
        if self._was_there:
            self._put(self.old)
        elif self._is_item:
            del self._owner[self._name]
        else:
            delattr(self._owner, self._name)

    def _put(self, value: Any) -> None:
        if self._is_item:
            self._owner[self._name] = value
        else:
            setattr(self._owner, self._name, value)

    def _present(self) -> Any:
        if self._is_item:
            return self._owner.get(self._name)
        held = getattr(self._owner, "__dict__", None)
        return getattr(self._owner, self._name) if held is None else held.get(self._name)


class SharedReplacement:
    """A replacement for the whole process, in place while it has users.

    Parameters
    ----------
    owner, name, new
        As for :class:`Replacement`.

    Notes
    -----
    Thread-safe: any thread may call :meth:`begin` and :meth:`end`.
    """

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self._make = lambda: Replacement(owner, name, new)
        self._original = getattr(owner, name)
        self._lock = threading.Lock()
        self._users = 0
        self._replacement: Replacement | None = None

    @property
    def old(self) -> Any:
        """The value before the replacement."""
        replacement = self._replacement
        return replacement.old if replacement else self._original

    def begin(self) -> None:
        """Put the new value in place until :meth:`end` has been called as often as this method."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._replacement = self._make()

    def end(self) -> None:
        """Undo one :meth:`begin`; the last call puts the old value back."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._replacement is not None:
                self._replacement.undo()
                self._replacement = None
