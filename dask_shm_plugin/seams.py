"""Every private thing of ``distributed`` that we touch, and why.

Each is a :class:`Seam`: what it is, what for, and a check that it still is what it was. When one has moved, the plugin
stays off and says so once; ``tests/test_seams.py`` says it earlier. Written against distributed 2026.8.0.
"""

from __future__ import annotations

import functools
import inspect
import pickle
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from types import CodeType
from typing import Any, NamedTuple

import distributed.client
import distributed.comm.core
import distributed.comm.tcp
import distributed.comm.utils
import distributed.core
import distributed.nanny
import distributed.protocol.core
import distributed.scheduler
import distributed.spill
import distributed.system_monitor
import distributed.utils_comm
import distributed.worker
import distributed.worker_memory
import distributed.worker_state_machine
import zict
from distributed.protocol.serialize import families
from distributed.sizeof import safe_sizeof


class Seam(NamedTuple):
    """One private name: where, why we touch it, and whether it is still there."""

    name: str
    reason: str
    holds: Callable[[], bool]


def _takes(function: Any, *names: str) -> bool:
    return set(names) <= set(inspect.signature(function).parameters)


def _names(function: Any, *names: str) -> bool:
    return set(names) <= set(_named_in(inspect.unwrap(function).__code__))


def _named_in(constant: Any) -> Iterator[str]:
    """Yield the names and strings of a function's code and of the functions in it; its source may not be there."""
    if isinstance(constant, str):
        yield constant
    elif isinstance(constant, (tuple, frozenset)):
        for item in constant:
            yield from _named_in(item)
    elif isinstance(constant, CodeType):
        yield from constant.co_names
        yield from _named_in(constant.co_consts)


_MANAGER = distributed.worker_memory.WorkerMemoryManager

SEAMS = (
    Seam(
        "distributed.worker.get_data_from_worker",
        "every fetch of every role goes through it: here a request says who asks, and an unusable answer is repeated",
        lambda: (
            _takes(distributed.worker.get_data_from_worker, "rpc", "keys", "worker", "who", "serializers")
            and _names(distributed.worker.Worker.gather_dep, "get_data_from_worker")
            and _names(distributed.utils_comm.gather_from_workers, "distributed.worker", "get_data_from_worker")
        ),
    ),
    Seam(
        "distributed.client.scatter_to_workers",
        "Client.scatter(direct=True) sends through it",
        lambda: (
            _takes(vars(distributed.client)["scatter_to_workers"], "workers", "data", "rpc")
            and _names(distributed.client.Client._scatter, "scatter_to_workers")
        ),
    ),
    Seam(
        "Worker.get_data",
        "the handler of data requests: values become handles when the answer is written",
        lambda: _takes(distributed.worker.Worker.get_data, "comm", "keys", "who", "serializers"),
    ),
    Seam(
        "Worker.update_data",
        "the handler of scatter: a handle that could not be resolved must not become a value",
        lambda: _takes(distributed.worker.Worker.update_data, "data", "stimulus_id"),
    ),
    Seam(
        "Comm.local_info, .remote_info, .handshake_options, .allow_offload, comm.utils.OFFLOAD_THRESHOLD",
        "a value is serialized with what its connection would have told, and in the thread in which Dask would do it",
        lambda: (
            _names(
                distributed.comm.core.Comm.__init__, "local_info", "remote_info", "handshake_options", "allow_offload"
            )
            and _names(
                distributed.comm.tcp.TCP.write, "to_frames", "sender", "local_info", "recipient", "handshake_options"
            )
            and _names(distributed.comm.utils.to_frames, "OFFLOAD_THRESHOLD", "safe_sizeof", "offload")
        ),
    ),
    Seam(
        "WorkerState.handle_stimulus(FreeKeysEvent)",
        "a worker that has closed forgets the keys of its shared values",
        lambda: (
            _takes(distributed.worker_state_machine.FreeKeysEvent, "keys", "stimulus_id")
            and hasattr(distributed.worker_state_machine.WorkerState, "handle_stimulus")
        ),
    ),
    Seam(
        "PooledRPCCall.__getattr__",
        "the client's calls of the scheduler are looked up on the object: scatter and gather can be put in front",
        lambda: "__getattr__" in vars(distributed.core.PooledRPCCall),
    ),
    Seam(
        "Scheduler.gather(serializers=)",
        "passes its serializers on to the workers: so the client's name reaches them",
        lambda: _takes(distributed.scheduler.Scheduler.gather, "keys", "serializers"),
    ),
    Seam(
        "ConnectionPool.deserialize",
        "tells those who unpack what they fetch from the scheduler, who passes it on",
        lambda: _takes(distributed.core.ConnectionPool, "deserialize", "serializers", "deserializers"),
    ),
    Seam(
        "distributed.protocol.core.dumps, .loads",
        "a header is packed as Dask packs it",
        lambda: (
            _names(distributed.protocol.core.dumps, "msgpack_encode_default", "use_bin_type")
            and _names(distributed.protocol.core.loads, "msgpack_decode_default", "use_list", "msgpack_opts")
        ),
    ),
    Seam(
        "Client._close",
        "a client that closes leaves the arena",
        lambda: inspect.iscoroutinefunction(distributed.client.Client._close),
    ),
    Seam(
        "Client._register_plugin",
        "a plugin class of ours can say what its registration does",
        lambda: hasattr(vars(distributed.client.Client).get("_register_plugin"), "register"),
    ),
    Seam(
        "SpillBuffer.fast, LRU.d, WorkerMemoryManager.data, WorkerState.data",
        "whoever reads, writes or drops a value of a worker is noticed",
        lambda: (
            issubclass(distributed.spill.SpillBuffer, zict.Buffer)
            and _takes(zict.Buffer, "fast")
            and _takes(zict.LRU, "d")
            and all(
                _names(method, "d") for method in (zict.LRU.__getitem__, zict.LRU.__delitem__, zict.LRU.set_noevict)
            )
            and _names(zict.LRU.values, "d", "values")
            and _names(distributed.worker.Worker.__init__, "memory_manager", "data")
            and _names(vars(distributed.worker.Worker)["data"].fget, "memory_manager", "data")
            and "data" in distributed.worker_state_machine.WorkerState.__annotations__
        ),
    ),
    Seam(
        "SpillBuffer.evict, .weight and those of its LRU",
        "what others hold, too, weighs nothing and is not spilled",
        lambda: (
            _names(zict.LRU.set_noevict, "weight", "weights", "heavy", "total_weight")
            and _names(zict.LRU.evict_until_below_target, "evict", "KeyError")
            and _names(zict.LRU.evict, "heavy", "order", "unlock")
            and _names(distributed.spill.SpillBuffer.evict, "fast", "evict")
        ),
    ),
    Seam(
        "WorkerMemoryManager.memory_monitor",
        "pauses and spills by private memory and by what spilling would free",
        lambda: (
            _takes(_MANAGER._maybe_pause_or_unpause, "worker", "memory")
            and _takes(_MANAGER._maybe_spill, "worker", "memory")
            and _names(_MANAGER.__init__, "memory_monitor", "periodic_callbacks", "memory_target_fraction")
            and _names(_MANAGER.__init__, "memory_limit", "memory_spill_fraction")
        ),
    ),
    Seam(
        "SystemMonitor.get_process_memory",
        "reports private memory and a share of what is shared",
        lambda: (
            _names(distributed.system_monitor.SystemMonitor.update, "get_process_memory")
            and _names(_MANAGER._spill, "get_process_memory")
        ),
    ),
    Seam(
        "NannyMemoryManager.memory_monitor",
        "terminates by private memory",
        lambda: (
            _names(distributed.worker_memory.NannyMemoryManager.__init__, "periodic_callbacks", "memory_monitor")
            and _names(distributed.worker_memory.NannyMemoryManager.memory_monitor, "memory_terminate_fraction")
        ),
    ),
)


@functools.cache
def why_not() -> str | None:
    """Return why sharing cannot be switched on in this process, or None."""
    if not sys.platform.startswith("linux"):
        return f"shared memory needs Linux, this is {sys.platform}; Dask works as without the plugin"
    moved = [seam.name for seam in SEAMS if not _still_holds(seam)]
    if moved:
        return (
            f"this version of distributed ({version('distributed')}) has changed {', '.join(moved)}; "
            "install a newer dask_shm_plugin"
        )
    return None


def _still_holds(seam: Seam) -> bool:
    try:
        return seam.holds()
    except Exception:
        return False


# -- replacing, and putting back


class Replacement:
    """An attribute or an item that is replaced until :meth:`undo`."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self._owner, self._name, self._new = owner, name, new
        self._is_item = isinstance(owner, dict)
        held = owner if self._is_item else getattr(owner, "__dict__", None)
        # Objects without a ``__dict__`` have their attributes in slots.
        self._was_there = held is None or name in held
        self.old = held[name] if held is not None and self._was_there else getattr(owner, name)
        self._put(new)

    def undo(self) -> None:
        """Put the old one back, unless somebody else has replaced ours since."""
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
    """A replacement for the whole process, in place as long as anybody uses it."""

    def __init__(self, owner: Any, name: str, new: Any) -> None:
        self._make = lambda: Replacement(owner, name, new)
        self._original = getattr(owner, name)
        self._lock = threading.Lock()
        self._users = 0
        self._replacement: Replacement | None = None

    @property
    def old(self) -> Any:
        """What was there before."""
        replacement = self._replacement
        return replacement.old if replacement else self._original

    def begin(self) -> None:
        """Put it in place, until :meth:`end` was called as often."""
        with self._lock:
            self._users += 1
            if self._users == 1:
                self._replacement = self._make()

    def end(self) -> None:
        """Undo one :meth:`begin`."""
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._replacement is not None:
                self._replacement.undo()
                self._replacement = None


# -- who asks: a name among the serializers of a request

_TAG = "shm:"


def tagged(askers: Iterable[str]) -> list[str]:
    """Return serializers that say, besides all that Dask knows, who asks.

    The list of serializers is the one field of a request that Dask hands on from hop to hop and that a worker without
    us accepts: a name that it does not know stands behind all that it does, and is never tried.
    """
    return [*families, *(_TAG + asker for asker in askers)]


def untag(serializers: list[str] | None) -> tuple[list[str], list[str] | None]:
    """Return who asks, and the serializers as they would have been without :func:`tagged`."""
    askers = [name[len(_TAG) :] for name in serializers or () if name.startswith(_TAG)]
    return askers, None if askers else serializers


# -- serializing


def context_of(comm: Any) -> dict[str, Any]:
    """Return what a connection tells serializers, as its ``write`` makes it.

    The scheduler asks for version 4 of pickle, for it may hand on to anybody; that has no buffers outside of the stream.
    Every version of Python that distributed (2026.1.1 and later) runs on reads version 5.
    """
    told = {"sender": comm.local_info, "recipient": comm.remote_info, **comm.handshake_options}
    return {**told, "pickle-protocol": pickle.HIGHEST_PROTOCOL}


def is_offloaded(comm: Any, message: Any) -> bool:
    """Tell whether a connection would serialize a message in a thread."""
    limit = distributed.comm.utils.OFFLOAD_THRESHOLD
    if not limit or not comm.allow_offload:
        return False
    size = safe_sizeof(message, default_size=-1)
    return bool(size == -1 or size > limit)


async def cluster_of(scheduler: Any) -> str:
    """Ask a scheduler, by its rpc, for the name that no other scheduler has."""
    return str((await scheduler.identity(n_workers=0))["id"])
