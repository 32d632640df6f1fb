"""The public interface: the plugin, and functions to inspect sharing and to switch it off."""

from __future__ import annotations

import contextlib
import pickle
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

from distributed import Client, default_client

from dask_shm_plugin import __version__, config, metrics, stub
from dask_shm_plugin.monitor.notebook import ArenaFigures, Explanations
from dask_shm_plugin.notices import warn_once
from dask_shm_plugin.seams.checks import why_not


class SharedMemoryPlugin(stub.OwnsScheduling):
    """Keep one copy of each large value on each node that needs it.

    ``client.register_plugin(SharedMemoryPlugin())`` switches sharing on in all present and future nannies and workers
    of the cluster, and in the client that registers it. Each node receives a value once.

    Each process takes the settings that are not given here from its own Dask configuration, namespace ``shm``.

    Parameters
    ----------
    capacity : str or int, optional
        Shared memory for values on each node: a number of bytes ("8 GiB"), or a share of the node's memory limit
        ("50%"). Zero turns sharing off.
    threshold : str or int, optional
        Smallest value to share, in bytes of its serialized frames. Smaller values are sent as with stock Dask.
    publish : {"on-request", "on-completion"}, optional
        When a worker copies a result into shared memory: when a process on the node first requests it, or when its task
        has finished.
    views : {"copy-on-write", "read-only"}, optional
        "copy-on-write": shared arrays are as writeable as without the plugin, and a write stays in the process that
        makes it. "read-only": all shared arrays are read-only.
    warm : str or float, optional
        How long freed shared memory stays resident for quick reuse: seconds, or a text such as "2s". It may stay up to
        twice as long. It is returned at once where memory runs short.
    shuffle : {"auto", "off"}, optional
        "auto": peer-to-peer shuffles and rechunks move their data through shared memory. "off": they work as with stock
        Dask.
    born : {"auto", "on", "off"}, optional
        "auto": where it is possible, large arrays of tasks are allocated in shared memory, and shared without a copy.
        "on": the same, and a warning says why where it is not possible. "off": they are copied when they are shared.

    Raises
    ------
    TypeError, ValueError
        A setting has the wrong type or an invalid value.
    """

    name = stub.NAME

    def __init__(
        self,
        capacity: str | int | None = None,
        threshold: str | int | None = None,
        publish: str | None = None,
        views: str | None = None,
        warm: str | float | None = None,
        shuffle: str | None = None,
        born: str | None = None,
    ) -> None:
        given = {"capacity": capacity, "threshold": threshold, "publish": publish, "views": views, "warm": warm}
        given |= {"shuffle": shuffle, "born": born}
        self.given = {name: value for name, value in given.items() if value is not None}
        self.options = config.options(self.given)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in self.options._asdict().items())
        return f"SharedMemoryPlugin({settings})"

    async def start(self, scheduler: Any) -> None:
        """Register the nanny plugin and the worker plugin; the scheduler calls this in its own process."""
        if self.is_possible():
            await self.begin(scheduler, *self.halves())

    def halves(self) -> tuple[bytes, bytes]:
        """Return the pickled stubs of the nanny plugin and of the worker plugin."""
        return stub.dumps(stub.NannyStub(self.given)), stub.dumps(stub.WorkerStub(self.given))

    def is_possible(self) -> bool:
        """Return whether this process can switch sharing on; warn once with the reason if it cannot."""
        reason = why_not()
        if reason:
            warn_once(f"Sharing is off: {reason}")
        return reason is None


def is_shared(value: object) -> bool:
    """Return whether this process maps a value, apart from small parts of it, from shared memory.

    Parameters
    ----------
    value
        Anything that Dask can send.

    Returns
    -------
    bool
        For a NumPy array: True if its memory lies in shared memory. For other values: True if the value has buffers of
        more than 1 KiB and all of these lie in shared memory. The bytes that a pickle of the value holds beside its
        buffers are ignored up to 16 KiB or a hundredth of the value, whichever is more. So a DataFrame with a large
        column of Python objects is not shared, although its other columns may be. Always False where sharing is not
        possible, for example on macOS or Windows.

    Raises
    ------
    Exception
        The value cannot be serialized.
    """
    if why_not():
        return False
    from dask_shm_plugin.values import codec

    return codec.is_shared(value)


@contextlib.contextmanager
def born(client: Client | None = None) -> Iterator[None]:
    """Allocate the NumPy arrays that are made in this block in shared memory, so that ``scatter`` need not copy them.

    Parameters
    ----------
    client
        The client that will scatter them; by default, the default client of this process.

    Notes
    -----
    Arrays of 1 MiB or more are born, the first one included, in the thread that runs the block, and in asynchronous code
    in the task that does. They are as other arrays: they may be written, outlive the block and the client, and are freed
    as usual. Blocks may be nested. Without an arena on this machine, without room in it, and wherever
    :doc:`arrays of tasks are not born </concepts/born>`, the arrays lie in ordinary memory.

    While the block runs, up to half of the room that is left for such arrays is set aside in the arena. So the block
    should make the arrays, and no more.

    Examples
    --------
    >>> with dask_shm_plugin.born():  # doctest: +SKIP
    ...     table = np.random.random((100_000, 1_000))
    >>> future = client.scatter(table, broadcast=True)  # doctest: +SKIP
    """
    if client is None:
        with contextlib.suppress(ValueError):
            client = default_client()
    half = None
    if client is not None and not why_not():
        from dask_shm_plugin.roles.client import half_of

        half = half_of(client)
    with contextlib.nullcontext() if half is None else half.born():
        yield


async def _register(client: Client, plugin: SharedMemoryPlugin, name: str) -> None:
    if not plugin.is_possible():
        return
    from dask_shm_plugin.roles.client import take_part

    scheduler: Any = client.scheduler
    await scheduler.register_scheduler_plugin(
        plugin=stub.dumps(stub.SchedulerStub(*plugin.halves())), name=name, idempotent=False
    )
    await take_part(client, plugin.options)


def _register_plugin(self: Client, plugin: SharedMemoryPlugin, name: str, idempotent: bool) -> Any:
    return self.sync(_register, self, plugin, name)


if hasattr(vars(Client).get("_register_plugin"), "register"):
    vars(Client)["_register_plugin"].register(SharedMemoryPlugin, _register_plugin)


def unregister(client: Client) -> Any:
    """Switch sharing off in all nannies and workers of the cluster, and in all its clients in this process.

    Dask's own functions are put back in place. Values that are still in use stay valid.

    Parameters
    ----------
    client
        Any client of the cluster. If it is asynchronous, await the result.
    """
    return client.sync(_unregister, client)


async def _unregister(client: Client) -> None:
    from dask_shm_plugin.roles.client import stop_taking_part

    scheduler: Any = client.scheduler
    await stop_taking_part(client)
    for call in (
        scheduler.unregister_scheduler_plugin,
        scheduler.unregister_worker_plugin,
        scheduler.unregister_nanny_plugin,
    ):
        # Raised if no plugin of this kind is registered with the scheduler.
        with contextlib.suppress(ValueError, KeyError):
            await call(name=stub.NAME)
    for undo in (stub.stop_scheduling, stub.hide):
        await scheduler.run_function(function=stub.dumps(undo))
    # Plugins that were started by --preload were never registered with the scheduler.
    await scheduler.broadcast(msg={"op": "run", "function": stub.dumps(stub.remove), "wait": True}, on_error="ignore")


def stats(client: Client) -> Any:
    """Return the state of each arena of the cluster, and the counters of shared and sent values.

    Parameters
    ----------
    client
        Any client of the cluster. If it is asynchronous, await the result.

    Returns
    -------
    dict
        One dict per arena, shown as a table in a notebook, with the key "host-id": the host of its workers ("here" if only this client reported the
        arena), and the first eight digits of the arena's id. Sizes are in bytes. Each dict has these items:

        ``capacity``
            The most that the arena's blocks may take.
        ``used``
            Bytes that blocks take now, including those that are still being written.
        ``resident``
            Memory that the arena takes now, including its table and free pages that are kept for reuse.
        ``room``
            Bytes that further values may take now.
        ``bound_by``
            The limit that determines ``room``: "shm.capacity", "physical memory" or "control group ...".
        ``blocks``, ``members``
            The number of blocks, and of processes that are members of the arena.
        ``workers``
            Addresses of the workers that use the arena, sorted.
        ``published``, ``attached``, ``found``, ``adopted``
            Values that were copied into the arena, values that were mapped instead of received, those of them that were
            found in the arena without a request to their owner, and values of which the owner replaced its private copy
            by the shared one. Each is a dict of ``count`` and ``bytes``.
        ``free_replicas``
            Replicas of values of 8 MiB or more that take no memory, because another worker of the arena has the same
            memory mapped.
        ``deaths_absorbed``
            How often a worker was lost while other workers of the arena held values that it had published.
        ``shuffled``
            Messages of shuffles and rechunks whose data other workers mapped instead of receiving them: a dict of
            ``count`` and ``bytes``.
        ``sent``
            Values that were large enough to be shared, but were sent or copied as bytes: a dict of ``count`` and
            ``bytes`` for each reason.

        The counters are summed over the arena's workers and this client. Each process counts from the moment when it
        joined the cluster's sharing. All items but ``workers`` and the counters are None while no process can read
        them, for example because a stopped process (SIGSTOP, a debugger) holds the arena's lock.
    """
    return client.sync(_stats, client)


async def _stats(client: Client) -> dict[str, dict[str, Any]]:
    from dask_shm_plugin.roles.client import half_of

    scheduler: Any = client.scheduler
    answers = await scheduler.broadcast(
        msg={"op": "run", "function": stub.dumps(stub.report), "wait": True}, on_error="ignore"
    )
    try:
        placing = await scheduler.run_function(function=stub.dumps(stub.report_of_scheduler))
    except Exception:  # the scheduler does not let clients run functions
        placing = {}
    half = half_of(client)
    reports = [answer["result"] for answer in answers.values() if answer.get("status") == "OK" and answer["result"]]
    own = half.report() if half else None
    hosts = {report["arena"]: report["host"] for report in reports}
    by_arena: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in [*reports, *([own] if own else [])]:
        by_arena[report["arena"]].append(report)
    _warn_of_versions(reports)
    return ArenaFigures(
        {
            f"{hosts.get(arena, 'here')}-{arena[:8]}": _summary(said) | _placing(placing, arena)
            for arena, said in by_arena.items()
        }
    )


def _placing(answer: dict[str, Any], arena: str) -> dict[str, int]:
    """Return the figures of the scheduler for an arena, from its answer."""
    said = (answer.get("result") or {}).get(arena, {})
    return {name: said.get(name, 0) for name in ("free_replicas", "deaths_absorbed")}


def _warn_of_versions(reports: list[dict[str, Any]]) -> None:
    others = sorted({(one["worker"], one["version"]) for one in reports if one["version"] != __version__})
    if others:
        named = ", ".join(f"{worker} has {version}" for worker, version in others)
        warn_once(
            f"Workers have another version of dask_shm_plugin than this client ({__version__}): {named}. "
            "Install the same one everywhere."
        )


def explain(future: Any, client: Client | None = None) -> Any:
    """Say for one value, on every worker, whether it is shared, and the reason.

    Parameters
    ----------
    future
        A future of the value.
    client
        The client, by default that of the future. If it is asynchronous, await the result.

    Returns
    -------
    dict
        For the address of each worker, a dict of ``state`` and ``why``. The state is "shared" (mapped from the arena),
        "adopted" (the same, in the worker that made the value), "private copy kept" (there is a shared copy, too),
        "private", "on disk", "absent", or "off". The reason is a sentence. In a notebook the dict is shown as a table.
    """
    chosen: Client = client or future.client
    return chosen.sync(_explain, chosen, future.key)


async def _explain(client: Client, key: Any) -> dict[str, dict[str, Any]]:
    scheduler: Any = client.scheduler
    kwargs = {"key": key}
    answers = await scheduler.broadcast(
        msg={"op": "run", "function": stub.dumps(stub.explain), "kwargs": pickle.dumps(kwargs), "wait": True},
        on_error="ignore",
    )
    return Explanations(
        {address: answer["result"] for address, answer in sorted(answers.items()) if answer.get("status") == "OK"}
    )


_STATE = ("capacity", "used", "resident", "room", "bound_by", "blocks", "members")


def _summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    # The processes may be in different control groups: the one with the least room counts.
    state = min((report for report in reports if "used" in report), key=lambda report: report["room"], default={})
    summary = {name: state.get(name) for name in _STATE}
    summary["workers"] = sorted(report["worker"] for report in reports if "worker" in report)
    # Several workers and the client may live in one process. Its counters are added once: those since the earliest start.
    counted: dict[str, dict[str, Any]] = {}
    for report in sorted(reports, key=lambda report: metrics.events(report["counters"])):
        counted[report["process"]] = report["counters"]
    for counters in counted.values():
        metrics.add(summary, counters)
    return summary
