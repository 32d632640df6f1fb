"""The one line for the user."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from typing import Any

from distributed import Client
from distributed.diagnostics.plugin import SchedulerPlugin

from dask_shm_plugin import config, metrics, stub
from dask_shm_plugin.notices import warn_once
from dask_shm_plugin.seams import why_not


class SharedMemoryPlugin(SchedulerPlugin):
    """Keep each large value once on the node where it was made or scattered.

    Switched on by ``client.register_plugin(SharedMemoryPlugin())``. Other nodes receive values as with stock Dask.

    Reaches all nannies and workers, present and future, and the client that registers it. What is not given here is
    taken from Dask's configuration, namespace ``shm``, in the process where it matters.

    Parameters
    ----------
    capacity : str or int, optional
        Bytes for shared values on each node, or a share of its memory limit such as "50%". Zero turns sharing off.
    threshold : str or int, optional
        Bytes of serialized frames from which a value is shared.
    publish : {"on-request", "on-completion"}, optional
        When a result is copied into shared memory: when a process on the node first asks for it, or when its task has
        finished.
    views : {"copy-on-write", "read-only"}, optional
        Whether shared arrays are as writeable as without the plugin, each write staying in its process, or read-only.
    warm : str or float, optional
        How long freed shared memory stays resident, to be used again quickly: seconds, or a text such as "2s".

    Raises
    ------
    TypeError, ValueError
        A setting makes no sense.
    """

    name = stub.NAME

    def __init__(
        self,
        capacity: str | int | None = None,
        threshold: str | int | None = None,
        publish: str | None = None,
        views: str | None = None,
        warm: str | float | None = None,
    ) -> None:
        given = {"capacity": capacity, "threshold": threshold, "publish": publish, "views": views, "warm": warm}
        self.given = {name: value for name, value in given.items() if value is not None}
        self.options = config.options(self.given)

    async def start(self, scheduler: Any) -> None:
        """Install both halves, from inside the scheduler."""
        scheduler.plugins.pop(self.name, None)
        if self.is_possible():
            await stub.install(scheduler, self.name, *self.halves())

    def halves(self) -> tuple[bytes, bytes]:
        """Return the nanny's and the worker's half as they travel."""
        return stub.dumps(stub.NannyStub(self.given)), stub.dumps(stub.WorkerStub(self.given))

    def is_possible(self) -> bool:
        """Tell whether there is shared memory on this platform; says once why not."""
        reason = why_not()
        if reason:
            warn_once(f"Sharing is off: {reason}")
        return reason is None


def is_shared(value: object) -> bool:
    """Tell whether a value lies in shared memory, all of it.

    Parameters
    ----------
    value
        Anything that Dask can send. Not counted are buffers of up to 1 KiB, and what a pickle of it holds beside its
        buffers, up to 16 KiB or a hundredth of the value. So a DataFrame with a column of Python objects is not shared,
        though its other columns may be.
    """
    if why_not():
        return False
    from dask_shm_plugin import codec

    return codec.is_shared(value)


async def _register(client: Client, plugin: SharedMemoryPlugin, name: str) -> None:
    if not plugin.is_possible():
        return
    from dask_shm_plugin.client import take_part

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
    """Switch sharing off in the whole cluster and put everything back. Values that live on stay valid.

    Parameters
    ----------
    client
        Any client of the cluster. With an asynchronous one, await the result.
    """
    return client.sync(_unregister, client)


async def _unregister(client: Client) -> None:
    from dask_shm_plugin.client import half_of

    scheduler: Any = client.scheduler
    half = half_of(client)
    if half is not None:
        await half.stop()
        await half.settled()
    for call in (
        scheduler.unregister_scheduler_plugin,
        scheduler.unregister_worker_plugin,
        scheduler.unregister_nanny_plugin,
    ):
        # It may not be registered there.
        with contextlib.suppress(ValueError, KeyError):
            await call(name=stub.NAME)
    # Those who came by --preload were never registered with the scheduler.
    await scheduler.broadcast(msg={"op": "run", "function": stub.dumps(stub.remove), "wait": True}, on_error="ignore")


def stats(client: Client) -> Any:
    """Return what is shared, and how well it goes.

    Parameters
    ----------
    client
        Any client of the cluster. With an asynchronous one, await the result.

    Returns
    -------
    dict
        For each arena ("host-id") a dict: ``capacity``, ``used`` and ``resident`` in bytes, ``blocks``, ``members``,
        ``room`` (bytes that further values may take now) and ``bound_by`` (what leaves no more: ``shm.capacity``, physical
        memory or a control group), ``workers`` (addresses), and the counters ``published``, ``attached``, ``found``,
        ``adopted`` (each ``count`` and ``bytes``) and ``sent`` (the same for each reason), summed over its workers and this
        process. The first seven are None while a process that stands still (stopped, in a debugger) has the lock of the arena.
    """
    return client.sync(_stats, client)


async def _stats(client: Client) -> dict[str, dict[str, Any]]:
    from dask_shm_plugin.client import half_of

    scheduler: Any = client.scheduler
    answers = await scheduler.broadcast(
        msg={"op": "run", "function": stub.dumps(stub.report), "wait": True}, on_error="ignore"
    )
    half = half_of(client)
    reports = [answer["result"] for answer in answers.values() if answer.get("status") == "OK" and answer["result"]]
    own = half.report() if half else None
    hosts = {report["arena"]: report["host"] for report in reports}
    by_arena: defaultdict[str, list[dict[str, Any]]] = defaultdict(list)
    for report in [*reports, *([own] if own else [])]:
        by_arena[report["arena"]].append(report)
    return {f"{hosts.get(arena, 'here')}-{arena[:8]}": _summary(said) for arena, said in by_arena.items()}


_STATE = ("capacity", "used", "resident", "room", "bound_by", "blocks", "members")


def _summary(reports: list[dict[str, Any]]) -> dict[str, Any]:
    # Not all of them need be in the same control group.
    state = min((report for report in reports if "used" in report), key=lambda report: report["room"], default={})
    summary = {name: state.get(name) for name in _STATE}
    summary["workers"] = sorted(report["worker"] for report in reports if "worker" in report)
    # Several workers, and the client, may be one process, which counts once.
    for counters in {report["process"]: report["counters"] for report in reports}.values():
        metrics.add(summary, counters)
    return summary
