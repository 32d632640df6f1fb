"""The arenas of a cluster as its scheduler knows them, from workers' heartbeats and clients. Sizes are in bytes."""

from __future__ import annotations

from collections import defaultdict
from typing import Any, NamedTuple

from dask_shm_plugin import metrics
from dask_shm_plugin.monitor.clients import CountersOfClients


class ValueSeen(NamedTuple):
    """A value in an arena, and the addresses of the processes that hold it."""

    key: str
    type: str
    shape: str
    size: int
    holders: tuple[str, ...]


class Node(NamedTuple):
    """One arena: its figures, the private memory of its workers by address, its counters, and its largest values."""

    name: str
    state: dict[str, int]
    private: dict[str, int]
    counters: dict[str, Any]
    values: list[ValueSeen]


def nodes(scheduler: Any, clients: CountersOfClients) -> list[Node]:
    """Return the arenas that the workers' last heartbeats describe, by name; reads no more than these.

    ``clients`` has the counters of the arenas' clients.
    """
    by_arena: defaultdict[str, list[Any]] = defaultdict(list)
    for worker in scheduler.workers.values():
        told = worker.metrics.get("shm") or {}
        if "state" in told:
            by_arena[told["arena"]].append(worker)
    found = [_node(arena, workers, clients.of(arena)) for arena, workers in by_arena.items()]
    return sorted(found, key=lambda node: node.name)


def _node(arena: str, workers: list[Any], clients: dict[str, dict[str, Any]]) -> Node:
    told = [worker.metrics["shm"] for worker in workers]
    newest = max(workers, key=lambda worker: worker.last_seen)
    addresses = {one["process"]: worker.address for one, worker in zip(told, workers, strict=True)}
    counters: dict[str, Any] = {}
    # Several workers and clients may live in one process, which has one set of counters.
    for one in (clients | {one["process"]: one for one in told}).values():
        metrics.add(counters, one)
    return Node(
        f"{newest.host}-{arena[:8]}",
        newest.metrics["shm"]["state"],
        {worker.address: one["private"] for one, worker in zip(told, workers, strict=True)},
        counters,
        _values(told, addresses),
    )


def _values(told: list[dict[str, Any]], addresses: dict[str, str]) -> list[ValueSeen]:
    found: dict[str, ValueSeen] = {}
    for value in (value for one in told for value in one["values"]):
        holders = sorted(addresses.get(process, "a client or nanny") for process in value["holders"])
        seen = ValueSeen(value["key"], value["type"], value["shape"], value["bytes"], tuple(dict.fromkeys(holders)))
        found[seen.key] = max(seen, found.get(seen.key, seen), key=lambda one: len(one.holders))
    return sorted(found.values(), key=lambda one: -one.size)
