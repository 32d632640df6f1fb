"""Versions of values: equal versions mean equal bytes, on whichever node.

The version of a value that is published is a digest of its handle: blocks never change, and none has the same name
twice. A value that comes from another node keeps the version that it had there. So each process remembers which of
its places hold a value of an earlier version. It may forget that: then a value is sent once more than needed.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict

VERSION_BYTES = 16
_MAX_KEPT = 4096


def digest_of(*fields: bytes) -> bytes:
    """Return a digest of fields of any length."""
    digest = hashlib.blake2b(digest_size=VERSION_BYTES)
    for field in fields:
        digest.update(len(field).to_bytes(8, "little"))
        digest.update(field)
    return digest.digest()


class Versions:
    """The versions of values that came from other nodes, by the digest of their handles here.

    Notes
    -----
    Thread-safe. The last 4096 are kept.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: OrderedDict[bytes, bytes] = OrderedDict()

    def note(self, place: bytes, version: bytes) -> None:
        """Note the version of the value whose handle has this digest."""
        if place == version:
            return
        with self._lock:
            self._kept[place] = version
            self._kept.move_to_end(place)
            if len(self._kept) > _MAX_KEPT:
                self._kept.popitem(last=False)

    def of(self, place: bytes) -> bytes:
        """Return the version of the value whose handle has this digest: the digest, unless another one was noted."""
        return self._kept.get(place, place)


VERSIONS = Versions()
