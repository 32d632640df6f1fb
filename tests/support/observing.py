"""Observations of a cluster from outside: memory, loopback traffic, counters, and the location of values."""

from __future__ import annotations

import contextvars
import itertools
import os
import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from describing import assert_descriptions_equal, describe

T = TypeVar("T")

KIB = 1024
MIB = 1024 * KIB

#: The sizes of arrays in these tests, in doubles. 256 KiB are above the threshold of the test clusters, 8 KiB below.
BIG = 32 * KIB
LITTLE = KIB


def wait_until(predicate: Callable[[], T], what: str | Callable[[], str], seconds: float = 20) -> T:
    """Return the first true result of ``predicate``; fail if there is none within a generous time."""
    deadline = time.monotonic() + seconds
    while not (result := predicate()):
        if time.monotonic() > deadline:
            raise AssertionError(f"timed out after {seconds} s: {what if isinstance(what, str) else what()}")
        time.sleep(0.02)
    return result


def undisturbed(measure: Callable[[], T], accept: Callable[[T], bool], seconds: float = 60) -> T:
    """Return the first acceptable measurement, or the last one after some time.

    Other programs can only spoil a measurement. Above all, tests that run at the same time use the same loopback
    interface, and some of them send much for several seconds.
    """
    deadline = time.monotonic() + seconds
    while not accept(result := measure()) and time.monotonic() < deadline:
        time.sleep(1)
    return result


# ---------------------------------------------------------------------------------------------------- the machine


def shmem() -> int:
    """Return the bytes of all shared memory on this machine."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("Shmem:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("/proc/meminfo has no Shmem")


def shared_memory(pids: Iterable[int]) -> int:
    """Return the bytes of shared memory that some processes have mapped, each page counted once.

    Unlike `shmem`, this excludes other programs. If several processes map a page, an equal part counts for each.
    """
    lines = [line for pid in pids for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()]
    return sum(int(line.split()[1]) * KIB for line in lines if line.startswith("Pss_Shmem:"))


def arena_pages(pids: Iterable[int]) -> int:
    """Return the bytes of memory behind the package's segments that some processes have open, mapped or not."""
    found = {}
    for pid in pids:
        for fd in Path(f"/proc/{pid}/fd").iterdir():
            if _is_memory_of_package(os.readlink(fd)):
                status = fd.stat()
                found[status.st_dev, status.st_ino] = 512 * status.st_blocks
    return sum(found.values())


def private_memory(pid: int | str = "self") -> int:
    """Return the bytes of anonymous memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * KIB
    raise AssertionError("/proc/<pid>/status has no RssAnon")


def loopback() -> int:
    """Return the bytes that the loopback interface has carried so far."""
    for line in Path("/proc/net/dev").read_text().splitlines():
        if line.strip().startswith("lo:"):
            return int(line.split(":")[1].split()[0])
    raise AssertionError("no loopback interface")


def names() -> set[str]:
    """Return the package's names in ``/dev/shm``, except those that other tests or other processes use."""
    entries = {
        entry.name
        for entry in Path("/dev/shm").glob("dask-shm*")
        if not {"test", "fuzz"} & set(re.split(r"[-\d]+", entry.name))
    }
    return {name for name in entries if name not in used_by_strangers()} if entries else entries


def used_by_strangers() -> str:
    """List the package's shared memory that processes outside this test run have open or mapped, one per line."""
    family = {os.getpid(), *(child.pid for child in psutil.Process().children(recursive=True))}
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        if int(process.name) not in family:
            with suppress(OSError):
                found += [os.readlink(fd) for fd in (process / "fd").iterdir()]
            with suppress(OSError):
                found += (process / "maps").read_text().splitlines()
    return "\n".join(line for line in found if _is_memory_of_package(line))


def _is_memory_of_package(line: str) -> bool:
    return "/dev/shm/dask-shm" in line or "/memfd:dask-shm" in line


def mappings(pid: int | str = "self") -> int:
    """Return the number of mappings of the package's shared memory in a process."""
    return sum(map(_is_memory_of_package, Path(f"/proc/{pid}/maps").read_text().splitlines()))


def descriptors() -> int:
    """Return the number of file descriptors of this process."""
    return len(os.listdir("/proc/self/fd"))


def own_descriptors() -> set[tuple[str, str]]:
    """Return the file descriptors of this process that refer to the package's shared memory."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):  # the descriptor of the listing itself
            found.add((number, os.readlink(f"/proc/self/fd/{number}")))
    return {descriptor for descriptor in found if _is_memory_of_package(descriptor[1])}


# ---------------------------------------------------------------------------------------------------- the cluster


@dataclass(frozen=True)
class Totals:
    """The counters of ``stats``, summed over all arenas. They can be added and subtracted."""

    arenas: int = 0
    members: int = 0
    blocks: int = 0
    used: int = 0
    resident: int = 0
    published: int = 0
    published_bytes: int = 0
    born: int = 0
    born_bytes: int = 0
    attached: int = 0
    attached_bytes: int = 0
    adopted: int = 0
    adopted_bytes: int = 0
    sent: int = 0
    sent_bytes: int = 0

    @property
    def blocks_made(self) -> int:
        """The number of values of which a block was made, by a copy or in place."""
        return self.published + self.born

    @property
    def bytes_made(self) -> int:
        """The bytes of their blocks."""
        return self.published_bytes + self.born_bytes

    def __sub__(self, other: Totals) -> Totals:
        names = [field.name for field in fields(self)]
        return Totals(**{name: getattr(self, name) - getattr(other, name) for name in names})

    def __add__(self, other: Totals) -> Totals:
        return self - (Totals() - other)


def totals(client: Any) -> Totals:
    """Return the sums of ``stats(client)``."""
    from dask_shm_plugin import stats

    return summed(stats(client))


def summed(found: dict[str, Any]) -> Totals:
    """Sum a result of ``stats`` over arenas and reasons."""
    result = Totals()
    for arena in found.values():
        sent = arena["sent"].values()
        counts = {name: arena[name]["count"] for name in ("published", "born", "attached", "adopted")}
        sizes = {f"{name}_bytes": arena[name]["bytes"] for name in ("published", "born", "attached", "adopted")}
        result += Totals(
            arenas=1,
            members=arena["members"] if isinstance(arena["members"], int) else len(arena["members"]),
            blocks=arena["blocks"],
            used=arena["used"],
            resident=arena["resident"],
            sent=sum(reason["count"] for reason in sent),
            sent_bytes=sum(reason["bytes"] for reason in sent),
            **counts,
            **sizes,
        )
    return result


def unshared(client: Any) -> int:
    """Return the bytes of the arrays of all workers that were allocated in the arena, and are not shared."""
    return sum(client.run(_unshared).values())


def _unshared() -> int:
    from dask_shm_plugin.births import switch

    figures = switch.figures()
    return 0 if figures is None else figures.used + figures.idle


def settle(client: Any) -> None:
    """Wait for the release of earlier tests' blocks, without a failure if some stay: other tests check that."""
    with suppress(AssertionError):
        wait_until(lambda: totals(client).used == 0, "the arena empties", seconds=3)


def known_workers(client: Any) -> dict[str, Any]:
    """Return the scheduler's information about each worker.

    ``Client.scheduler_info`` may return no workers: its periodic query, which asks for none, may come in between.
    """
    return dict(client.sync(client.scheduler.identity, n_workers=-1)["workers"])


def addresses(client: Any) -> list[str]:
    """Return the addresses of a cluster's workers, always in the same order."""
    workers = known_workers(client)
    return sorted(workers, key=lambda address: (str(workers[address]["name"]), address))


def pids(client: Any) -> dict[str, int]:
    """Return the process id of each worker."""
    return client.run(os.getpid)


def holders(client: Any, future: Any) -> set[str]:
    """Return the workers that hold a value, according to the scheduler."""
    return set(client.who_has([future])[future.key])


def drop_replica(client: Any, future: Any, address: str) -> None:
    """Drop one worker's replica of a value, as the Active Memory Manager does, and wait until it is gone."""

    def ask(dask_scheduler: Any) -> None:
        dask_scheduler.request_remove_replicas(address, [future.key], stimulus_id="test")

    client.run_on_scheduler(ask)
    wait_until(lambda: not kept(client, future, address), f"{address} drops its replica")


def kept(client: Any, future: Any, address: str) -> bool:
    """Return whether a worker holds a value in memory or on disk."""
    return bool(client.run(stored_type, future.key, workers=[address])[address])


def lies_in_arena(client: Any, future: Any, address: str) -> bool:
    """Return whether the value that a worker keeps lies in the arena."""
    return client.run(shared_in_data, future.key, workers=[address])[address]


def shared_in_data(key: str, dask_worker: Any) -> bool:
    """Return whether this worker's value of a key lies in the arena.

    This does not read the value through ``data``, because the plugin does not give up a value that is being read.
    """
    value = dask_worker.plugins["dask-shm"].half._running._data.in_memory(key)
    return value is not None and is_shared(value)


def stored_type(key: str, dask_worker: Any) -> str:
    """Return the name of the type of this worker's value of a key, or an empty string if there is no value."""
    return type(dask_worker.data[key]).__qualname__ if key in dask_worker.data else ""


# ---------------------------------------------------------------------------------------------------------- tasks


def array(seed: int, size: int = BIG) -> np.ndarray:
    """Return random doubles, the same for the same seed. Every page is touched."""
    return np.random.default_rng(seed).random(size)


#: Returns a new seed. A used one could lead to the key of an earlier test, whose release may not be complete.
fresh = itertools.count(1000).__next__


@dataclass(frozen=True)
class Seen:
    """A task's observations of its argument."""

    description: Any
    shared: bool
    writeable: bool | None
    pid: int


def outside(function: Callable[..., T], *arguments: Any) -> T:
    """Call a function whose arrays are not born in the arena, in a task: in a context of its own."""
    return contextvars.Context().run(function, *arguments)


def is_shared(value: Any) -> bool:
    """Return whether a value lies in the arena. Without the package, no value does."""
    try:
        import dask_shm_plugin
    except ImportError:
        return False
    return dask_shm_plugin.is_shared(value)


def see(value: Any) -> Seen:
    """Return the observations of a value in this process."""
    flags = getattr(value, "flags", None)
    return Seen(describe(value), is_shared(value), getattr(flags, "writeable", None), os.getpid())


def see_on(client: Any, value: Any, workers: Iterable[str]) -> list[Seen]:
    """Run `see` on each of the workers at the same time, and return their observations."""
    return client.gather([client.submit(see, value, workers=[address], pure=False) for address in workers])


def assert_saw(seen: Seen, value: Any, *, shared: bool = True) -> None:
    """Fail unless a task saw an equal, writeable value, and saw it in the arena if it should be shared."""
    assert_descriptions_equal(seen.description, describe(value))
    assert seen.shared == shared
    assert seen.writeable
