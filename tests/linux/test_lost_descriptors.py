"""A library may close descriptors that it did not open, and reuse their numbers; its files are not touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import JOIN, LEAVE, Process, join, publish, wait_until

from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.node import membership

#: Closes descriptors as a daemon does, except for the one that connects the process with the test.
CLOSE = """
kept = _connection.fileno()
os.closerange(3, kept)
os.closerange(kept + 1, 256)
"""
#: Opens files that get the numbers of the closed descriptors.
NEW = {
    "nothing": "files = []",
    "a file": "files = [os.open(path, os.O_RDWR) for _ in range(100)]",
    "pipes": "files = [fd for _ in range(50) for fd in os.pipe()]",
}


@pytest.fixture
def cluster(prefix: str) -> str:
    """Return the name of a cluster of which this process is a member, too."""
    return "lost"


@pytest.mark.parametrize("new", NEW)
def test_a_file_under_a_closed_descriptor_of_the_arena_is_not_touched(
    cluster: str, new: str, process: Callable[[], Process], tmp_path: Path
) -> None:
    """Sharing is off in that process, after one warning; its views stay valid, and it can still leave."""
    arena = join(cluster)
    foreign = tmp_path / "foreign"
    foreign.write_bytes(bytes(range(256)) * 4096)
    before = foreign.read_bytes()
    other = process()
    other(JOIN, cluster=cluster)
    other("""
        import logging
        heard = []
        handler = logging.Handler()
        handler.emit = lambda record: heard.append(record.getMessage())
        logging.getLogger("dask_shm_plugin").addHandler(handler)
        """)
    with publish(arena, b"theirs") as block:
        other(
            "view = arena.view(d, 0, 6); own = publish(arena, b'mine' * 1024); mine = own.view(0, 4)",
            d=block.descriptor,
        )
        other("draft = arena.draft(200 << 10); draft.write(0, memoryview(bytes(4096)))")
        other(CLOSE)
        other(NEW[new], path=str(foreign))
        for what in (
            "draft.write(4096, memoryview(b'x' * (100 << 10)))",
            "draft.seal()",
            "publish(arena, b'more')",
            "arena.view(d, 0, 6)",
            "own.view(0, 4)",
            "own.read(0, 4)",
            "arena.directory.add(b'name', b'value') or arena.inspect()",
        ):
            with pytest.raises(SharedMemoryError):
                other(what, d=block.descriptor)
        assert other("bytes(view), bytes(mine)") == (b"theirs", b"mine")
        assert other("arena.is_damaged")
        assert len(other("heard")) == 1
        assert "closerange" in other("heard")[0]
    publish(arena, b"ours").close()
    other(LEAVE)
    assert other("bytes(view), bytes(mine)") == (b"theirs", b"mine")
    other("del view, mine, draft; own.close(); gc.collect(); arena.holdings.tidy()")
    wait_until(lambda: other("arena.has_left"), "the process has left")
    wait_until(
        lambda: (arena.roster.reclaim_dead(), arena.stats())[1].members == 1, "the process is no member any more"
    )
    wait_until(lambda: arena.stats().used == 0, "nothing of the process is left")
    arena.validate()
    assert foreign.read_bytes() == before
    assert foreign.stat().st_size == len(before)
    # Fails if one of them was closed in the place of the arena's descriptor.
    other("for fd in files: os.fstat(fd)")
    membership.leave(cluster, "nanny", "tcp://here")


def test_a_child_counts_as_alive_if_the_file_that_shows_its_end_was_closed(
    cluster: str, process: Callable[[], Process]
) -> None:
    """Without the lock of that file, the references are kept until the process has no children at all."""
    join(cluster)
    other = process()  # a process without other children, because it would wait for these as well
    other(JOIN, cluster=cluster)
    other("""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with publish(arena, bytes([7]) * 4096) as block:
            view = block.view(0, 4096)
        ready, go = os.pipe()
        if (pid := os.fork()) == 0:
            os.close(go)
            os.read(ready, 1)
            os._exit(view[-1])
        asking = arena.holdings.references._fork_holds[0].asking
        os.dup2(os.open('/dev/zero', os.O_RDWR), asking)
        del view
        for _ in range(3):
            arena.holdings.tidy()
            arena.holdings.references.release_ended_children()
        publish(arena, bytes([8]) * 4096).close()
        """)
    wait_until(
        lambda: other("arena.holdings.tidy(), len(arena.holdings)")[1] == 1, "only the block of the child is left"
    )
    other("os.close(go)")
    assert other("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 7
    wait_until(
        lambda: (
            other("arena.holdings.references.release_ended_children(), arena.holdings.tidy(), len(arena.holdings)")[2]
            == 0
        ),
        "the block of the child is released",
    )
    assert other("os.fstat(asking).st_mode")
    other(LEAVE)
    membership.leave(cluster, "nanny", "tcp://here")
