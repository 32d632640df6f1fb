"""A library may close descriptors that it has not opened, and open other files under their numbers; these are not touched."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from other_processes import JOIN, LEAVE, Process, join, publish, wait_until

from dask_shm_plugin import membership
from dask_shm_plugin.exceptions import SharedMemoryError

#: What a daemon does, but for the one descriptor by which the test speaks to the process.
CLOSE = """
kept = _connection.fileno()
os.closerange(3, kept)
os.closerange(kept + 1, 256)
"""
#: What comes under the numbers then.
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
def test_what_is_no_longer_the_arenas_is_not_touched(
    cluster: str, new: str, process: Callable[[], Process], tmp_path: Path
) -> None:
    """Sharing is off in that process, with one warning; its views stay, the others go on, and it can still leave."""
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
            "arena.directory.enter(b'name', b'value') or arena.inspect()",
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
    wait_until(lambda: (arena.roster.reclaim_dead(), arena.stats())[1].members == 1, "it is no member any more")
    wait_until(lambda: arena.stats().used == 0, "nothing of it is left")
    arena.validate()
    assert foreign.read_bytes() == before
    assert foreign.stat().st_size == len(before)
    # None of them was closed in the place of the arena's.
    other("for fd in files: os.fstat(fd)")
    membership.leave(cluster, "nanny", "tcp://here")


def test_a_child_is_waited_for_where_the_file_that_shows_its_end_was_closed(
    cluster: str, process: Callable[[], Process]
) -> None:
    """What cannot be asked counts as alive, and as gone when all children are."""
    join(cluster)
    other = process()  # without children of its own, which would be waited for as well
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
        asking = arena.holdings._references._pins[0].asking
        os.dup2(os.open('/dev/zero', os.O_RDWR), asking)
        del view
        for _ in range(3):
            arena.holdings.tidy()
            arena.holdings.unpin()
        publish(arena, bytes([8]) * 4096).close()
        """)
    wait_until(lambda: other("arena.holdings.tidy(), len(arena.holdings)")[1] == 1, "what the child looks at is left")
    other("os.close(go)")
    assert other("os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])") == 7
    wait_until(
        lambda: other("arena.holdings.unpin(), arena.holdings.tidy(), len(arena.holdings)")[2] == 0, "it is gone"
    )
    assert other("os.fstat(asking).st_mode")
    other(LEAVE)
    membership.leave(cluster, "nanny", "tcp://here")
