"""A value is serialized no more often than on stock Dask, in the same threads, and with the same context."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import counted
import numpy as np
import pytest
from clusters import local_cluster
from counted import Broken, Counted, Typed
from distributed import Client, Future, get_client, get_worker, wait
from observing import addresses, drop_replica, totals, wait_until

LARGE, SMALL, ITEMS = 1 << 15, 4, 20_000

CLUSTERS: dict[str, dict[str, Any] | None] = {
    "stock": None,
    "on-request": {"threshold": "64 KiB", "capacity": "256 MiB"},
    "on-completion": {"threshold": "64 KiB", "capacity": "256 MiB", "publish": "on-completion"},
    "no room": {"threshold": "64 KiB", "capacity": "64 KiB"},
}


@pytest.fixture(scope="module")
def clusters(nothing_leaks: None) -> Iterator[dict[str, Client]]:
    """Clients of clusters of three workers, by name; a cluster is started when it is first used."""
    open_clients: dict[str, Client] = {}
    contexts = []

    class Started(dict):  # type: ignore[type-arg]
        def __missing__(self, name: str) -> Client:
            context = local_cluster(3, CLUSTERS[name])
            contexts.append(context)
            client = self[name] = context.__enter__()
            client.run(counted.teach)
            if CLUSTERS[name] is not None:
                client.run(keep_handles_valid)
            return client

    counted.teach()
    started = Started(open_clients)
    try:
        yield started
    finally:
        started.clear()
        for context in reversed(contexts):
            context.__exit__(None, None, None)


def keep_handles_valid() -> None:
    """Let a recipient take its time: one that is slower than a second asks again, and the value is pickled again."""
    from dask_shm_plugin.transfer import publisher

    publisher._DELIVERY_S = 60


def made(client: Client, name: str, size: int, items: int, once: bool) -> Future:
    """Let the first worker make a value, and return its future."""
    return client.submit(Counted, name, size, items, once=once, workers=[addresses(client)[0]], pure=False)


def total(client: Client, value: Any, worker: int) -> float:
    """Let a worker compute the total of a value."""
    return client.submit(Counted.total, value, workers=[addresses(client)[worker]], pure=False).result()


def scattered(client: Client, *args: Any, **options: Any) -> list[float]:
    """Scatter a value, and read it on the first worker."""
    name, size, items, once = args
    where = {} if "broadcast" in options else {"workers": [addresses(client)[0]]}
    future = client.scatter(Counted(name, size, items, once=once), hash=False, **where, **options)
    return [total(client, future, 0)]


def fetched(client: Client, *args: Any) -> list[float]:
    """Let another worker read a result."""
    return [total(client, made(client, *args), 1)]


def fetched_again(client: Client, *args: Any) -> list[float]:
    """Let another worker fetch a result three times, or once if it can be pickled only once."""
    value, seen = made(client, *args), []
    for _ in range(1 if args[-1] else 3):
        seen.append(total(client, value, 1))
        drop_replica(client, value, addresses(client)[1])
    return seen


def gathered(client: Client, *args: Any) -> list[float]:
    """Gather a result through the scheduler."""
    return [made(client, *args).result().total()]


def gathered_directly(client: Client, *args: Any) -> list[float]:
    """Gather a result from its worker."""
    return [client.gather(made(client, *args), direct=True).total()]


def replicated(client: Client, *args: Any) -> list[float]:
    """Let Dask replicate a result."""
    value = made(client, *args)
    wait(value)
    client.replicate(value, n=2)
    return [total(client, value, 0)]


def from_a_task(client: Client, *args: Any) -> list[float]:
    """Scatter from inside a task, and let another worker read the value."""

    def scatter() -> None:
        name, size, items, once = args
        get_worker().kept = get_client().scatter({name: Counted(name, size, items, once=once)})  # type: ignore[attr-defined]

    client.submit(scatter, workers=[addresses(client)[0]], pure=False).result()
    return [total(client, Future(args[0], client), 1)]


def spilled(client: Client, *args: Any) -> list[float]:
    """Spill a result, and read it back."""
    value = made(client, *args)
    wait(value)
    key = value.key
    client.run(lambda dask_worker: dask_worker.data.fast.evict(key) and None, workers=[addresses(client)[0]])
    return [total(client, value, 0)]


PATHS: dict[str, Callable[..., list[float]]] = {
    "scatter": scattered,
    "direct scatter": lambda *args: scattered(*args, direct=True),
    "broadcast": lambda *args: scattered(*args, broadcast=True),
    "fetch": fetched,
    "fetch again": fetched_again,
    "gather": gathered,
    "direct gather": gathered_directly,
    "replicate": replicated,
    "from a task": from_a_task,
    "spill": spilled,
}


def count(client: Client, path: str, *args: Any) -> tuple[list[float], int]:
    """Take a path; return the totals that were read, and the number of pickles of the value in all processes."""
    name = f"counted-{uuid.uuid4().hex}"
    seen = PATHS[path](client, name, *args)
    pickles = sum((Counter(each) for each in client.run(counted.counts).values()), Counter(counted.counts()))
    return seen, pickles[name]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["on-request", "on-completion", "no room"])
@pytest.mark.parametrize("size", [(SMALL, 0), (LARGE, 0), (SMALL, ITEMS)], ids=["small", "buffer", "stream"])
@pytest.mark.parametrize("path", PATHS)
def test_a_value_is_pickled_no_more_often_than_on_stock_dask(
    clusters: dict[str, Client], path: str, size: tuple[int, int], how: str
) -> None:
    """Each kind of value takes each path, and is shared or sent."""
    expected, most = count(clusters["stock"], path, *size, False)
    seen, pickles = count(clusters[how], path, *size, False)
    assert seen == expected
    assert pickles <= most


@pytest.mark.parametrize("path", [path for path in PATHS if path not in ("broadcast", "spill", "fetch again")])
@pytest.mark.parametrize("how", ["on-request", "no room"])
def test_a_value_that_can_be_pickled_once_arrives(clusters: dict[str, Client], path: str, how: str) -> None:
    """No path may need a second pickle where stock Dask needs only one."""
    for size in ((LARGE, 0), (SMALL, ITEMS)):
        assert count(clusters[how], path, *size, True) == count(clusters["stock"], path, *size, True)


def test_no_two_threads_pickle_at_once(clusters: dict[str, Client]) -> None:
    """Large values are serialized in the one thread that Dask has for them."""
    client = clusters["on-request"]
    a, b, c = addresses(client)
    values = client.map(
        lambda n: [Counted(f"together-{n}", 1 << 21), Counted("stream", 4, ITEMS)], range(4), workers=[a], pure=False
    )
    wait(values)
    for worker in (b, c):
        client.submit(lambda *values: len(values), *values, workers=[worker], pure=False).result()
    assert max(client.run(counted.together).values()) == 1


@pytest.mark.parametrize("size", [SMALL, LARGE])
@pytest.mark.parametrize("path", ["fetch", "gather"])
def test_a_serializer_gets_the_context_of_its_connection(clusters: dict[str, Client], path: str, size: int) -> None:
    """The context names the sender and the recipient, with the same fields as on stock Dask."""
    seen = []
    for client in (clusters["stock"], clusters["on-request"]):
        a, b, _ = addresses(client)
        value = client.submit(lambda n: Typed(np.ones(n)), size, workers=[a], pure=False)
        if path == "gather":
            arrived = client.gather(value)
            told, data = arrived.told, arrived.data.sum()
        else:
            told, data = client.submit(lambda x: (x.told, x.data.sum()), value, workers=[b], pure=False).result()
        assert told["sender"] == a
        assert told["recipient"]
        seen.append((sorted(told), data))
    assert seen[0] == seen[1]


def tried(client: Client) -> int:
    """Return how often a cluster and its client have tried to deserialize a `Broken` value."""
    return sum(client.run(counted.attempts).values()) + counted.attempts()


@pytest.mark.parametrize("path", ["fetch", "gather", "scatter", "direct scatter"])
@pytest.mark.parametrize("name", ["stock", "on-request"])
def test_a_deserializer_that_fails_is_called_once(clusters: dict[str, Client], name: str, path: str) -> None:
    """Its error appears where it appears on stock Dask."""
    client = clusters[name]
    a, b, _ = addresses(client)
    before = tried(client)
    if path == "scatter":
        with pytest.raises(Exception, match="nobody can deserialize this"):
            client.scatter(Broken(np.ones(LARGE)), hash=False)
    elif path == "direct scatter":
        with pytest.raises((ZeroDivisionError, OSError)):
            client.scatter(Broken(np.ones(LARGE)), hash=False, direct=True)
    else:
        value = client.submit(lambda: Broken(np.ones(LARGE)), workers=[a], pure=False)
        wait(value)
        if path == "gather":
            with pytest.raises(ZeroDivisionError):
                client.gather(value)
        else:
            # On stock Dask, too, this task waits for ever (distributed#6705).
            needing = client.submit(id, value, workers=[b], pure=False)
            wait_until(lambda: tried(client) > before, "the worker tries to deserialize the value")
            del needing
    assert tried(client) - before == 1


def test_the_time_of_serializing_has_its_own_label_in_the_metrics(clusters: dict[str, Client]) -> None:
    """Dask's fine metrics tell it apart from the time of the network, also if a thread serializes."""
    client = clusters["on-request"]
    a, b, _ = addresses(client)
    value = client.submit(Counted, "metered", 1 << 21, ITEMS, workers=[a], pure=False)
    total(client, value, 1)

    def labels(dask_worker: Any) -> set[str]:
        return {str(key) for key in dask_worker.digests_total}

    def has(worker: str, *words: str) -> bool:
        return any(all(word in label for word in words) for label in client.run(labels)[worker])

    # A worker counts after it has answered, which may be later than the reader's result.
    wait_until(lambda: has(a, "get-data", "'serialize'"), lambda: f"{client.run(labels)[a]}")
    wait_until(lambda: has(b, "gather-dep", "'deserialize'"), lambda: f"{client.run(labels)[b]}")


def test_the_clusters_did_share(clusters: dict[str, Client]) -> None:
    """Otherwise these tests would compare stock Dask with itself."""
    client = clusters["on-request"]
    before = totals(client)
    fetched(client, f"counted-{uuid.uuid4().hex}", LARGE, 0, False)
    grown = totals(client) - before
    assert (grown.blocks_made, grown.attached, grown.sent) == (1, 1, 0)
