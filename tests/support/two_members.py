"""Two members that stay in an arena while others come, stop and die, and that check for effects on themselves."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

from other_processes import JOIN, LEAVE, LOOK, Process, join, publish, wait_until

from dask_shm_plugin.arena import housekeeping
from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.node import rendezvous
from dask_shm_plugin.table import layout
from dask_shm_plugin.table.members import Member

SIZE = 64 << 10
#: Seconds between two searches for dead members. `OFTEN` finds them at once; other tests check the usual second.
OFTEN, NEVER = 0.03, 3600.0

#: The lines of a newcomer that comes while another member is stopped: they succeed, or they are refused for a reason.
VISIT = """
    Mutex.__init__.__defaults__ = (0.02,)
    rendezvous._LOCK_TIMEOUT_S = 0.02
    try:
        {how}
        visited = arena.arena_id if arena else None
        publish(arena, b"x").close()
    except SharedMemoryError:
        pass
    except AttributeError:
        assert arena is None
    """


def open_files(pid: int) -> str:
    """Return the names of the files that a process has open, one per line."""
    names = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(descriptor))
    return "\n".join(names)


class MemberPair:
    """Two processes, one of them this one. Each has blocks, and views of the other's blocks.

    Parameters
    ----------
    first_process
        The process from which others are forked.
    cluster
        The cluster of the arena.
    """

    def __init__(self, first_process: Process, cluster: str) -> None:
        self.first_process, self.cluster = first_process, cluster
        self.arena: Arena = join(cluster)
        self.second = first_process.fork()
        self.second(JOIN, cluster=cluster)
        self.second("import zlib; own = [publish(arena, os.urandom(size)) for _ in range(2)]", size=SIZE)
        self.block = publish(self.arena, bytes(range(256)) * (SIZE // 256))
        self.second("theirs = arena.attach_block(d)", d=self.block.descriptor)
        self.second("view = theirs.view(0, size)", size=SIZE)
        self.found = self.second("[block.descriptor for block in own]")
        self.blocks = [self.arena.attach_block(descriptor) for descriptor in self.found]
        self.views = [block.view(0, SIZE) for block in self.blocks]
        self.sums = self.look()
        self.members = set(self.arena._access.table.members.live())

    def end(self) -> None:
        """Release everything, and check that the arena is empty afterwards."""
        self.second("own = theirs = view = None")
        for block in [self.block, *self.blocks]:
            block.close()
        self.views.clear()
        wait_until(lambda: self.arena.stats().used == 0, "the arena is empty")
        self.second.kill_all()
        self.first_process.forked.remove(self.second)

    def look(self) -> list[int]:
        """Return the checksums of all views of the two."""
        return [zlib.crc32(view) for view in self.views] + [self.second("zlib.crc32(view)")]

    def look_after_the_dead(self, every: float) -> None:
        """Set the seconds after which the two search for dead members again."""
        housekeeping._INTERVAL_S = every
        self.arena.holdings.releases.wake()
        self.second("housekeeping._INTERVAL_S = every; arena.holdings.releases.wake()", every=every)

    def fork(self) -> Process:
        """Start another process. It is no member yet, and never searches for dead members by itself."""
        one = self.first_process.fork()
        one("import zlib; housekeeping._INTERVAL_S = every", every=NEVER)
        return one

    def bury(self, process: Process) -> None:
        """Kill a process and its children."""
        process.kill_all()
        self.first_process.forked.remove(process)

    def corpse(self, *, with_child: bool) -> Process:
        """Return a dead member that had references of every kind, and perhaps left a child."""
        one = self.fork()
        one(JOIN, cluster=self.cluster)
        one("kept = publish(arena, b'kept'), arena.draft(1), arena.attach_block(d)", d=self.found[0])
        if with_child:
            one.fork()
        one.kill()
        return one

    def guests(self) -> set[Member]:
        """Return the members other than the two."""
        return set(self.arena._access.table.members.live()) - self.members

    def can_be_found(self) -> bool:
        """Return whether the rendezvous lists both, and neither has kept a rendezvous that was removed."""
        with contextlib.suppress(SharedMemoryError):
            name = rendezvous.name_for(self.cluster)
            meeting = rendezvous.enter(name, create=False)
            said = meeting and meeting.read()
            if meeting:
                meeting.close()
            return (
                bool(said)
                and said.arena_id == self.arena.arena_id
                and {os.getpid(), self.second.pid} <= {listed.pid for listed in said.listed}
                and not any(f"{name} (deleted)" in open_files(pid) for pid in (os.getpid(), self.second.pid))
            )
        return False

    def is_as_before(self) -> bool:
        """Return whether only the blocks of the two are used and resident, and there are no other members."""
        with contextlib.suppress(SharedMemoryError):
            self.arena.trimmer.trim_all()
            stats = self.arena.stats()
            is_small = stats.resident == self.arena._access.table.reserved_bytes() + stats.used + self._labels()
            return is_small and (stats.used, stats.blocks) == (3 * SIZE, 3) and not self.guests()
        return False

    def _labels(self) -> int:
        """Return the bytes of the pages that the labels of all members take."""
        slots = [member.slot for member in self.arena._access.table.members.live()]
        missing = [self.arena.segment.missing(layout.labels_offset(slot), layout.LABELS_BYTES) for slot in slots]
        return sum(layout.LABELS_BYTES - size for size in missing)

    def check(self) -> None:
        """Check that others can join and publish, that the arena is then as before, and that no view has changed."""
        newcomer = self.fork()
        newcomer(LOOK, cluster=self.cluster)
        newcomer("publish(arena, b'\\xff' * (256 << 10)).close(); arena.holdings.tidy()")
        newcomer(LEAVE)
        self.bury(newcomer)
        wait_until(self.is_as_before, "the memory of all guests is reclaimed")
        self.arena.validate()
        assert self.look() == self.sums

    def work(self, cluster: str) -> Process:
        """Let the second and a newcomer work with short timeouts, as far as they can; return the newcomer."""
        self.second("arena._mutex._patience = 0.02")
        for what in (
            "publish(arena, b'x').close()",
            "arena.attach_block(d).close()",
            "arena.draft(1 << 19).__exit__(None, None, None)",
            "arena.roster.reclaim_dead(); arena.holdings.tidy(); arena.trimmer.trim_all()",
        ):
            with contextlib.suppress(SharedMemoryError):
                self.second(what, d=self.block.descriptor)
        self.second("arena._mutex._patience = 0.25")
        newcomer = self.fork()
        newcomer("visited = arena = None")
        newcomer(VISIT.format(how=LOOK if cluster == self.cluster else JOIN), cluster=cluster)
        return newcomer
