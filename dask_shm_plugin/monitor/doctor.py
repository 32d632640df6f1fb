"""``dask shm doctor``: will sharing work on this machine, what would make it better, and what does it bring?"""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import numpy as np
from dask.utils import format_bytes

import dask_shm_plugin
from dask_shm_plugin import config
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block
from dask_shm_plugin.births.bounds import why_not_here
from dask_shm_plugin.births.library import load
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.linux import limits, locks, pagemap, syscalls
from dask_shm_plugin.linux.segment import SHM_DIRECTORY, nameless_file
from dask_shm_plugin.mapping import large_pages
from dask_shm_plugin.node import strangers
from dask_shm_plugin.seams import checks, tasks
from dask_shm_plugin.units import PAGE, round_up

GOOD, SLOWER, OFF = "good", "slower", "off"
"""The verdicts: sharing works, works less well, or would be off."""
_TRIAL_BYTES = 64 << 20
_FEW_DESCRIPTORS, _FEW_MAPPINGS = 1024, 65530
_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")


class Finding(NamedTuple):
    """The result of one check: its subject, the verdict, what was found, and the remedy if one is needed."""

    subject: str
    verdict: str
    found: str
    remedy: str = ""


def examine() -> list[Finding]:
    """Return the results of all checks; a check that fails unexpectedly says so."""
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            findings.extend(check())
        except Exception as error:
            findings.append(Finding(check.__name__.strip("_"), SLOWER, f"{type(error).__name__}: {error}"))
    return findings


def report(findings: list[Finding]) -> list[str]:
    """Return the findings as lines of text."""
    lines = []
    for finding in findings:
        lines.append(f"{finding.verdict:6}  {finding.subject}: {finding.found}")
        if finding.remedy:
            lines.append(f"        → {finding.remedy}")
    return lines


def _versions() -> Iterator[Finding]:
    names = ("distributed", "dask", "numpy")
    yield Finding(
        "versions",
        GOOD,
        f"dask-shm-plugin {dask_shm_plugin.__version__}, {', '.join(f'{name} {version(name)}' for name in names)}",
    )
    reason = checks.why_not()
    if reason:
        yield Finding("distributed", OFF, reason)
    else:
        yield Finding("distributed", GOOD, f"all {len(checks.SEAMS)} private names are as expected")


def _settings() -> Iterator[Finding]:
    capacity = config.options({}).capacity_here()
    if capacity:
        yield Finding("shm.capacity", GOOD, f"{format_bytes(capacity)} on this machine")
    else:
        yield Finding("shm.capacity", OFF, "0", "set shm.capacity, for example to 50%")
    library = tasks.why_not() or why_not_here() or load()
    if config.options({}).born == "off":
        yield Finding("shm.born", GOOD, "off: results are copied when they are shared")
    elif isinstance(library, str):
        yield Finding("shm.born", SLOWER, library, "results are copied when they are shared")
    else:
        yield Finding("shm.born", GOOD, "large arrays of tasks are allocated in shared memory")


def _memory() -> Iterator[Finding]:
    limit, left = limits.tightest(), limits.least_left()
    verdict = GOOD if left.size > _TRIAL_BYTES else SLOWER
    remedy = "" if verdict == GOOD else "free memory or raise the limit: until then, values are sent"
    yield Finding("memory limit", GOOD, f"{format_bytes(limit.size)} ({limit.name})")
    yield Finding("memory left", verdict, f"{format_bytes(max(0, left.size))} ({left.name})", remedy)


def _dev_shm() -> Iterator[Finding]:
    try:
        status = os.statvfs(SHM_DIRECTORY)
    except OSError as error:
        yield Finding(SHM_DIRECTORY, OFF, str(error), "members meet there: mount a tmpfs on it")
        return
    free = status.f_bavail * status.f_frsize
    needed = config.options({}).capacity_here()
    if free >= needed:
        yield Finding(SHM_DIRECTORY, GOOD, f"{format_bytes(free)} free: the arena lies there")
    else:
        remedy = "docker run --shm-size, or remount with a larger size" if not _has_memfd() else ""
        verdict = GOOD if _has_memfd() else OFF
        yield Finding(SHM_DIRECTORY, verdict, f"{format_bytes(free)} free: the arena is a memfd", remedy)


def _has_memfd() -> bool:
    with contextlib.suppress(OSError):
        os.close(syscalls.memory_file("dask-shm-doctor"))
        return True
    return False


def _kernel() -> Iterator[Finding]:
    yield _feature("memfd_create", _has_memfd(), "the arena must fit into /dev/shm")
    yield _lock_feature()
    data = np.ones(4 * PAGE, np.uint8)
    first, size = round_up(data.ctypes.data), 2 * PAGE
    yield _feature("MADV_POPULATE_READ", syscalls.populate(first, size), "the first read of a large value is slower")
    yield _feature("MADV_COLLAPSE", large_pages.are_served(), "no large pages: copying and reading are slower")
    yield _feature("/proc/self/pagemap", pagemap.is_present(first, size), "a value that is passed on is copied again")
    if _HUGE_PAGES.exists():
        yield Finding("shmem_enabled", GOOD, _HUGE_PAGES.read_text().strip())


def _feature(name: str, is_there: bool, otherwise: str) -> Finding:
    return Finding(name, GOOD, "there") if is_there else Finding(name, SLOWER, f"missing: {otherwise}")


def _lock_feature() -> Finding:
    fd = nameless_file("doctor", PAGE)
    try:
        locks.hold(fd, 0)
    except SharedMemoryError as error:
        return Finding("open file description locks", OFF, str(error), "use Linux 3.15 or later, or another sandbox")
    finally:
        os.close(fd)
    return Finding("open file description locks", GOOD, "there")


def _limits() -> Iterator[Finding]:
    needed = 4 * config.options({}).capacity_here()
    yield _limit("ulimit -f", resource.RLIMIT_FSIZE, needed, "an arena needs four times its capacity: raise it")
    yield _limit("ulimit -n", resource.RLIMIT_NOFILE, _FEW_DESCRIPTORS, "raise it")
    yield _limit("ulimit -v", resource.RLIMIT_AS, 2 * needed, "views take address space: raise it")
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    remedy = "" if most >= _FEW_MAPPINGS else f"each view is a mapping: set it to {_FEW_MAPPINGS} or more"
    yield Finding("vm.max_map_count", SLOWER if remedy else GOOD, str(most), remedy)


def _limit(name: str, kind: int, needed: int, remedy: str) -> Finding:
    soft, _ = resource.getrlimit(kind)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return Finding(name, GOOD, "unlimited" if soft == resource.RLIM_INFINITY else str(soft))
    return Finding(name, SLOWER, str(soft), remedy)


def _namespace() -> Iterator[Finding]:
    try:
        yield Finding("pid namespace", GOOD, f"{os.readlink('/proc/self/ns/pid')}: members must be in the same one")
    except OSError as error:
        yield Finding("/proc", OFF, str(error), "mount /proc: members find each other there")
        return
    for reason in strangers.reasons():
        found, _, remedy = reason.partition("; ")
        yield Finding("other processes", SLOWER, found, remedy)


def _gain() -> Iterator[Finding]:
    """Measure a plain copy, a publication and a mapping of the same size."""
    data = np.ones(_TRIAL_BYTES, np.uint8)
    copy = np.zeros_like(data)
    try:
        arena = Arena.create(2 * _TRIAL_BYTES)
    except SharedMemoryError as error:
        yield Finding("an arena", OFF, str(error))
        return
    try:
        copied = _fastest(lambda: np.copyto(copy, data))
        published = _fastest(lambda: _publish_and_release(arena, data))
        block = _publish(arena, data)
        attached = _fastest(lambda: arena.view(block.descriptor, 0, _TRIAL_BYTES).release())
        block.close()
    except SharedMemoryError as error:
        yield Finding("an arena", SLOWER, str(error))
    else:
        figures = ", ".join(
            f"{name} {1e3 * seconds:.2f} ms"
            for name, seconds in (("copy", copied), ("publish", published), ("attach", attached))
        )
        yield Finding("an arena", GOOD, f"{_TRIAL_BYTES >> 20} MiB: {figures}")
    finally:
        arena.close()


def _publish_and_release(arena: Arena, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> None:
    _publish(arena, data).close()
    arena.holdings.tidy()


def _publish(arena: Arena, data: np.ndarray[tuple[int], np.dtype[np.uint8]]) -> Block:
    with arena.draft(len(data)) as draft:
        draft.write(0, data.data)
        return draft.seal()


def _fastest(call: Callable[[], object], times: int = 3) -> float:
    seconds = []
    for _ in range(times):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


_CHECKS = (_versions, _settings, _memory, _dev_shm, _kernel, _limits, _namespace, _gain)
