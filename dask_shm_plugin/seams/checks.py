"""List every private name of ``distributed`` that this package relies on, with a reason and a check.

Each is a :class:`Seam`. When one has changed, the plugin stays off and logs one warning;
``tests/seams/test_seams.py`` fails before that. Written against distributed 2026.8.0.
"""

from __future__ import annotations

import functools
import inspect
import sys
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


class Seam(NamedTuple):
    """One private name, the reason why the package relies on it, and a check that it is still as expected."""

    name: str
    reason: str
    holds: Callable[[], bool]


def takes(function: Any, *parameters: str) -> bool:
    """Return whether a function has these parameters."""
    return set(parameters) <= set(inspect.signature(function).parameters)


def names(function: Any, *expected: str) -> bool:
    """Return whether the code of a function, or of its inner functions, has these names or strings."""
    return set(expected) <= set(_named_in(inspect.unwrap(function).__code__))


def _named_in(constant: Any) -> Iterator[str]:
    """Yield the names and strings in a function's code and in its inner functions; needs no source file."""
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
        "all roles request data through it: a request names the memberships, and is repeated if its answer is unusable",
        lambda: (
            takes(distributed.worker.get_data_from_worker, "rpc", "keys", "worker", "who", "serializers")
            and names(distributed.worker.Worker.gather_dep, "get_data_from_worker")
            and names(distributed.utils_comm.gather_from_workers, "distributed.worker", "get_data_from_worker")
        ),
    ),
    Seam(
        "distributed.client.scatter_to_workers",
        "Client.scatter(direct=True) sends through it",
        lambda: (
            takes(vars(distributed.client)["scatter_to_workers"], "workers", "data", "rpc")
            and names(distributed.client.Client._scatter, "scatter_to_workers")
        ),
    ),
    Seam(
        "Worker.get_data",
        "the handler of data requests: values become handles when the answer is written",
        lambda: takes(distributed.worker.Worker.get_data, "comm", "keys", "who", "serializers"),
    ),
    Seam(
        "Worker.update_data",
        "the handler of scatter: a handle that could not be resolved must not become a value",
        lambda: takes(distributed.worker.Worker.update_data, "data", "stimulus_id"),
    ),
    Seam(
        "Comm.local_info, .remote_info, .handshake_options, .allow_offload, comm.utils.OFFLOAD_THRESHOLD",
        "a value is serialized with the context of its connection, and in the thread in which Dask would do it",
        lambda: (
            names(
                distributed.comm.core.Comm.__init__, "local_info", "remote_info", "handshake_options", "allow_offload"
            )
            and names(
                distributed.comm.tcp.TCP.write, "to_frames", "sender", "local_info", "recipient", "handshake_options"
            )
            and names(distributed.comm.utils.to_frames, "OFFLOAD_THRESHOLD", "safe_sizeof", "offload")
        ),
    ),
    Seam(
        "WorkerState.handle_stimulus(FreeKeysEvent)",
        "a worker that has closed forgets the keys of its shared values",
        lambda: (
            takes(distributed.worker_state_machine.FreeKeysEvent, "keys", "stimulus_id")
            and hasattr(distributed.worker_state_machine.WorkerState, "handle_stimulus")
        ),
    ),
    Seam(
        "PooledRPCCall.__getattr__",
        "looks the client's calls of the scheduler up on the object, so that scatter and gather can be replaced there",
        lambda: "__getattr__" in vars(distributed.core.PooledRPCCall),
    ),
    Seam(
        "Scheduler.gather(serializers=)",
        "passes its serializers on to the workers, so that the client's memberships reach them",
        lambda: takes(distributed.scheduler.Scheduler.gather, "keys", "serializers"),
    ),
    Seam(
        "ConnectionPool.deserialize",
        "is true where fetched data are unpacked, and false in the scheduler, which passes them on",
        lambda: takes(distributed.core.ConnectionPool, "deserialize", "serializers", "deserializers"),
    ),
    Seam(
        "distributed.protocol.core.dumps, .loads",
        "a header is packed as Dask packs it",
        lambda: (
            names(distributed.protocol.core.dumps, "msgpack_encode_default", "use_bin_type")
            and names(distributed.protocol.core.loads, "msgpack_decode_default", "use_list", "msgpack_opts")
        ),
    ),
    Seam(
        "Client._gather, Client._scatter",
        "a further client of a process that takes part does so, too, from its first value on",
        lambda: all(
            names(vars(distributed.client.Client)[public], private)
            and inspect.iscoroutinefunction(vars(distributed.client.Client)[private])
            for public, private in (("gather", "_gather"), ("scatter", "_scatter"))
        ),
    ),
    Seam(
        "Client._close",
        "a client that closes leaves the arena",
        lambda: inspect.iscoroutinefunction(distributed.client.Client._close),
    ),
    Seam(
        "Client._register_plugin",
        "dispatches on the plugin's class, so that SharedMemoryPlugin has its own way of being registered",
        lambda: hasattr(vars(distributed.client.Client).get("_register_plugin"), "register"),
    ),
    Seam(
        "SpillBuffer.fast, LRU.d, WorkerMemoryManager.data, WorkerState.data",
        "every read, write and removal of a worker's value is noticed",
        lambda: (
            issubclass(distributed.spill.SpillBuffer, zict.Buffer)
            and takes(zict.Buffer, "fast")
            and takes(zict.LRU, "d")
            and all(names(method, "d") for method in (zict.LRU.__getitem__, zict.LRU.__delitem__, zict.LRU.set_noevict))
            and names(zict.LRU.values, "d", "values")
            and names(distributed.worker.Worker.__init__, "memory_manager", "data")
            and names(vars(distributed.worker.Worker)["data"].fget, "memory_manager", "data")
            and "data" in distributed.worker_state_machine.WorkerState.__annotations__
        ),
    ),
    Seam(
        "SpillBuffer.evict, .weight and those of its LRU",
        "a value that other processes hold, too, weighs nothing and is not spilled",
        lambda: (
            names(zict.LRU.set_noevict, "weight", "weights", "heavy", "total_weight")
            and names(zict.LRU.evict_until_below_target, "evict", "KeyError")
            and names(zict.LRU.evict, "heavy", "order", "unlock")
            and names(distributed.spill.SpillBuffer.evict, "fast", "evict")
        ),
    ),
    Seam(
        "WorkerMemoryManager.memory_monitor",
        "pauses and spills by private memory and the bytes that spilling would free",
        lambda: (
            takes(_MANAGER._maybe_pause_or_unpause, "worker", "memory")
            and takes(_MANAGER._maybe_spill, "worker", "memory")
            and names(_MANAGER.__init__, "memory_monitor", "periodic_callbacks", "memory_target_fraction")
            and names(_MANAGER.__init__, "memory_limit", "memory_spill_fraction")
        ),
    ),
    Seam(
        "SystemMonitor.get_process_memory",
        "reports private memory and a share of each block",
        lambda: (
            names(distributed.system_monitor.SystemMonitor.update, "get_process_memory")
            and names(_MANAGER._spill, "get_process_memory")
        ),
    ),
    Seam(
        "Worker.get_metrics, WorkerState.memory",
        "managed memory counts a share of each block",
        lambda: (
            inspect.iscoroutinefunction(distributed.worker.Worker.get_metrics)
            and names(distributed.worker.Worker.get_metrics, "spilled_bytes", "memory", "disk")
            and names(distributed.worker.Worker.heartbeat, "get_metrics")
            and names(vars(distributed.scheduler.WorkerState)["memory"].fget, "spilled_bytes", "nbytes", "disk")
        ),
    ),
    Seam(
        "Worker._update_metrics_received_data, .bandwidth, .bandwidth_workers, .bandwidth_types",
        "mapped bytes are no measure of the network",
        lambda: (
            takes(distributed.worker.Worker._update_metrics_received_data, "start", "stop", "data", "cause", "worker")
            and names(
                distributed.worker.Worker._update_metrics_received_data,
                "bandwidth",
                "bandwidth_workers",
                "bandwidth_types",
            )
            and names(distributed.worker.Worker.gather_dep, "_update_metrics_received_data")
        ),
    ),
    Seam(
        "Worker.heartbeat",
        "the scheduler learns at once which arena a worker uses",
        lambda: inspect.iscoroutinefunction(distributed.worker.Worker.heartbeat),
    ),
    Seam(
        "NannyMemoryManager.memory_monitor",
        "terminates by private memory",
        lambda: (
            names(distributed.worker_memory.NannyMemoryManager.__init__, "periodic_callbacks", "memory_monitor")
            and names(distributed.worker_memory.NannyMemoryManager.memory_monitor, "memory_terminate_fraction")
        ),
    ),
)


@functools.cache
def why_not() -> str | None:
    """Return the reason why sharing cannot be switched on in this process, or None."""
    if not sys.platform.startswith("linux"):
        return f"shared memory needs Linux, this is {sys.platform}; Dask works as without the plugin"
    return moved(SEAMS)


def moved(seams: Iterable[Seam]) -> str | None:
    """Return which of the seams this version of ``distributed`` has changed, as a sentence, or None."""
    changed = [seam.name for seam in seams if not _still_holds(seam)]
    if changed:
        return (
            f"this version of distributed ({version('distributed')}) has changed {', '.join(changed)}; "
            "install a newer dask_shm_plugin"
        )
    return None


def _still_holds(seam: Seam) -> bool:
    try:
        return seam.holds()
    except Exception:
        return False
