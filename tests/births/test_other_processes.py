"""Forks, deaths and exits of a process with arrays in the arena."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import Process, wait_until

MIB = 1 << 20

JOIN = "arena = membership.join(cluster, 'worker', f'tcp://{os.getpid()}', capacity=lambda: 64 << 20, warm=2**20)"
BEAR = """
from births import *
assert switch.switch_on(arena, None, 3600) is None
one, two = (newborn(np.full, 1 << 20, number, np.uint8) for number in (1, 2))
published = switch.seal(two.ctypes.data, two.nbytes)
"""


@pytest.fixture
def parent(cluster: str, member: Callable[[str], Process]) -> Process:
    """Start a process with an array in a draft, and one in a block."""
    one = member(JOIN)
    one(BEAR)
    return one


def test_parent_and_child_do_not_see_each_others_writes(parent: Process) -> None:
    """Arrays in drafts and in blocks are copy-on-write after a fork."""
    child = parent.fork()
    child("one[:], two[:] = 11, 12")
    parent("one[:5], two[:5] = 21, 22")
    assert child("(one == 11).all() and (two == 12).all()")
    assert parent("one[:6].tolist(), two[:6].tolist()") == ([21] * 5 + [1], [22] * 5 + [2])
    parent("more = newborn(np.full, 1 << 20, 3, np.uint8)")


def test_a_child_allocates_as_usual_and_may_join_by_itself(parent: Process, cluster: str) -> None:
    """Its parent's allocator is off in the child, and frees nothing there."""
    child = parent.fork()
    child("new = in_arena(np.ones, 1 << 20, np.uint8)")
    assert child("switch._nursery is None and not 0 <= new.ctypes.data - parent_area < span", **parent_area(parent))
    child("gc.collect(); del one, two; gc.collect()")
    assert parent("(one == 1).all() and (two == 2).all()")
    child("arena = membership.join(cluster, 'worker', 'tcp://child')", cluster=cluster)
    assert child("arena.stats().members") == 2


def parent_area(parent: Process) -> dict[str, int]:
    """Return the addresses of a process's chunks."""
    return dict(zip(("parent_area", "span"), parent("(switch._nursery._area, switch._nursery._span)"), strict=True))


@pytest.mark.parametrize("how", ["freed", "killed"])
def test_a_child_keeps_its_values_when_its_parent_ends_them(
    parent: Process, member: Callable[[str], Process], how: str
) -> None:
    """The blocks stay as long as the child, whatever becomes of the parent."""
    other = member(JOIN)
    child = parent.fork()
    if how == "killed":
        parent.kill()
    else:
        parent("del one, two; gc.collect(); switch.switch_off(arena)")
    other("arena.roster.reclaim_dead()")
    other("others = [publish(arena, bytes([9]) * (1 << 20)) for _ in range(8)]")
    assert child("(one == 1).all() and (two == 2).all()")
    child.kill()
    other("for block in others: block.close()")
    wait_until(
        lambda: other("arena.roster.reclaim_dead(), arena.holdings.tidy(), arena.stats().used")[2] == 0, "all is free"
    )


def test_a_fork_while_the_table_is_locked_copies(parent: Process, member: Callable[[str], Process]) -> None:
    """A draft cannot be sealed then, so the child gets its own pages."""
    other = member(JOIN)
    other("enter(arena._mutex)")
    parent("arena._mutex._patience = 0.01")
    child = parent.fork()
    other("leave(arena._mutex)")
    parent("one[:] = 5")
    parent.kill()
    other("arena.roster.reclaim_dead(); others = [publish(arena, bytes([9]) * (1 << 20)) for _ in range(8)]")
    assert child("(one == 1).all()")
    other("for block in others: block.close()")


def test_a_fork_from_c_keeps_writes_apart(parent: Process) -> None:
    """Python's hooks do not run then, so the library has its own."""
    parent("""
        import contextlib, ctypes
        (there, back), (yes, no) = os.pipe(), os.pipe()
        if (pid := ctypes.PyDLL(None).fork()) == 0:
            os.read(there, 1)
            seen = one[0], two[0]
            one[:], two[:] = 11, 12
            os.write(no, bytes(map(int, seen)))
            os._exit(0)
        one[:5], two[:5] = 21, 22
        os.write(back, b"x")
        seen = list(os.read(yes, 2))
        for fd in (there, back, yes, no): os.close(fd)
        # While the child lives, it has the parent's place in the rendezvous. SIGCHLD may be ignored: then this waits, too.
        with contextlib.suppress(ChildProcessError): os.waitpid(pid, 0)
    """)
    assert parent("seen") == [1, 2]
    assert parent("one[:6].tolist(), two[:6].tolist()") == ([21] * 5 + [1], [22] * 5 + [2])
    assert parent("switch.seal(one.ctypes.data, one.nbytes)")
    assert parent("pagemap.is_written(one.ctypes.data, one.nbytes)")


def test_forks_while_another_thread_frees_large_arrays(parent: Process) -> None:
    """A chunk loses its pages when its array is freed, without any lock: no array is older or newer than it should be."""
    parent("""
        wrong, is_over = [], threading.Event()
        def churn():
            for number in range(1 << 20):
                large = [in_arena(np.full, 8 << 20, (number + n) % 251, np.uint8) for n in range(2)]
                born = sum(map(is_born, large))
                if any((one != (number + n) % 251).any() for n, one in enumerate(large)): wrong.append(number)
                del large
                if is_over.is_set(): return seen.append((number, born))
        (told, yes), seen = os.pipe(), []
        churning = threading.Thread(target=churn)
        churning.start()
        for number in range(10):
            kept = newborn(np.full, 8 << 20, number, np.uint8)
            if os.fork() == 0:
                kept += 1
                os.write(yes, b"good" if (kept == number + 1).all() else b"bad")
                os._exit(0)
            kept[:9] = 255
            if os.read(told, 9) != b"good" or not (kept[9:] == number).all(): wrong.append(-number)
        is_over.set(); churning.join()
        os.close(told); os.close(yes)
    """)
    assert parent("wrong") == []
    assert parent("seen[0][0] > 10 and figures().reused > 20")


def test_another_member_maps_a_born_array(parent: Process, member: Callable[[str], Process]) -> None:
    """It sees the sealed bytes, and not what the owner writes afterwards."""
    other = member(JOIN)
    row = parent("ATLAS.locate(two.ctypes.data, two.nbytes).row")
    other(
        "from dask_shm_plugin.arena.block import Descriptor\n"
        "view = np.frombuffer(arena.view(Descriptor(arena.arena_id, BlockId(*row)), 0, 1 << 20), np.uint8)",
        row=row,
    )
    parent("two[:] = 7")
    assert other("(view == 2).all()")
    parent("del two; gc.collect()")
    wait_until(lambda: parent("figures().private") == 0, "the array is freed")
    assert other("(view == 2).all()")
    parent.kill()
    other("arena.roster.reclaim_dead()")
    assert other("(view == 2).all() and arena.stats().used") == MIB
    other("view = None; gc.collect()")
    wait_until(lambda: other("arena.holdings.tidy(), arena.stats().used")[1] == 0, "the block is free")


EXIT = """
import sys, threading, time
from other_processes import *
exec(PRELUDE)
segment.NAME_PREFIX = rendezvous.NAME_PREFIX = sys.argv[1]
cluster = sys.argv[2]
{join}
{bear}
cycle = [one[3:]]
cycle.append(cycle)
if sys.argv[3] == "in a thread":
    def work():
        while True:
            in_arena(np.ones, 1 << 20)
    threading.Thread(target=work, daemon=True).start()
    time.sleep(0.2)
sys.exit(3)
"""


@pytest.mark.parametrize("how", ["quietly", "in a thread"])
def test_an_interpreter_exits_with_arrays_in_the_arena(prefix: str, cluster: str, how: str) -> None:
    """Arrays of globals, of cycles and of a running thread are freed late, or not at all."""
    source = EXIT.format(join=JOIN, bear=BEAR)
    done = subprocess.run(
        [sys.executable, "-c", source, prefix, cluster, how],
        cwd=Path(__file__).parents[1] / "support",
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (3, "")


def test_a_process_with_a_limited_address_space_has_no_births(cluster: str, member: Callable[[str], Process]) -> None:
    """The reservation takes as many addresses as the arena has."""
    one = member(JOIN)
    one("resource.setrlimit(resource.RLIMIT_AS, (1 << 36, resource.RLIM_INFINITY)); from births import *")
    assert "ulimit" in one("switch.switch_on(arena, None, 4)")
