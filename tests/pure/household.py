"""Two members that live through everything that others do, and notice if any of it touches them."""

from __future__ import annotations

import contextlib
import os
import zlib
from pathlib import Path

from other_processes import JOIN, LEAVE, LOOK, Process, join, publish, wait_until

from dask_shm_plugin import rendezvous, tidying
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.memberbook import Member

SIZE = 64 << 10
#: So that the dead are found at once. That it takes a second at most in use is shown elsewhere.
OFTEN, NEVER = 0.03, 3600.0

#: What somebody does who comes while another member stands still: it goes well, or it is told why not.
VISIT = """
    liveness.Mutex.__init__.__defaults__ = (0.02,)
    rendezvous._PATIENCE = 0.02
    try:
        {how}
        visited = arena.arena_id if arena else None
        publish(arena, b"x").close()
    except SharedMemoryError:
        pass
    except AttributeError:
        assert arena is None
    """


def opened(pid: int) -> str:
    """Return what a process has open."""
    names = []
    for descriptor in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            names.append(os.readlink(descriptor))
    return "\n".join(names)


class Household:
    """Two processes, one of them this, each with a block, and with views of the other's.

    Parameters
    ----------
    nursery
        From which others are forked.
    cluster
        Whose arena it is.
    """

    def __init__(self, nursery: Process, cluster: str) -> None:
        self.nursery, self.cluster = nursery, cluster
        self.arena: Arena = join(cluster)
        self.second = nursery.fork()
        self.second(JOIN, cluster=cluster)
        self.second("import zlib; own = [publish(arena, os.urandom(size)) for _ in range(2)]", size=SIZE)
        self.block = publish(self.arena, bytes(range(256)) * (SIZE // 256))
        self.second("theirs = arena.attach_block(d)", d=self.block.descriptor)
        self.second("view = theirs.view(0, size)", size=SIZE)
        self.found = self.second("[block.descriptor for block in own]")
        self.blocks = [self.arena.attach_block(descriptor) for descriptor in self.found]
        self.views = [block.view(0, SIZE) for block in self.blocks]
        self.sums = self.look()
        self.members = set(self.arena._access.table.members())

    def end(self) -> None:
        """Let go of everything, and see that the arena is empty then."""
        self.second("own = theirs = view = None")
        for block in [self.block, *self.blocks]:
            block.close()
        self.views.clear()
        wait_until(lambda: self.arena.stats().used == 0, "the arena is empty")
        self.second.kill_all()
        self.nursery.forked.remove(self.second)

    def look(self) -> list[int]:
        """Return checksums of all that the two see."""
        return [zlib.crc32(view) for view in self.views] + [self.second("zlib.crc32(view)")]

    def look_after_the_dead(self, every: float) -> None:
        """Let the two look so often, in seconds."""
        tidying._EVERY = every
        self.arena.holdings.wake()
        self.second("tidying._EVERY = every; arena.holdings.wake()", every=every)

    def fork(self) -> Process:
        """Start another process, which is no member yet and never looks after the dead unless it is told to."""
        one = self.nursery.fork()
        one("import zlib; tidying._EVERY = every", every=NEVER)
        return one

    def bury(self, process: Process) -> None:
        """End a process and its children for good."""
        process.kill_all()
        self.nursery.forked.remove(process)

    def corpse(self, *, with_child: bool) -> Process:
        """Return a member that has died with something of everything, and perhaps left a child."""
        one = self.fork()
        one(JOIN, cluster=self.cluster)
        one("kept = publish(arena, b'kept'), arena.draft(1), arena.attach_block(d)", d=self.found[0])
        if with_child:
            one.fork()
        one.kill()
        return one

    def guests(self) -> set[Member]:
        """Return the members that are none of the two."""
        return set(self.arena._access.table.members()) - self.members

    def can_be_found(self) -> bool:
        """Tell whether newcomers are led to both, and neither has kept a rendezvous that was removed."""
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
                and not any(f"{name} (deleted)" in opened(pid) for pid in (os.getpid(), self.second.pid))
            )
        return False

    def is_as_before(self) -> bool:
        """Tell whether nothing is used or resident but the blocks of the two, and nobody else is a member."""
        with contextlib.suppress(SharedMemoryError):
            self.arena.trimmer.trim_all()
            stats = self.arena.stats()
            is_small = stats.resident == self.arena._access.table.reserved_bytes() + stats.used
            return is_small and (stats.used, stats.blocks) == (3 * SIZE, 3) and not self.guests()
        return False

    def check(self) -> None:
        """See that all is as before, unasked, that the two see what they saw, and that others can join and publish."""
        newcomer = self.fork()
        newcomer(LOOK, cluster=self.cluster)
        newcomer("publish(arena, b'\\xff' * (256 << 10)).close(); arena.holdings.tidy()")
        newcomer(LEAVE)
        self.bury(newcomer)
        wait_until(self.is_as_before, "everything of the guests is taken back")
        self.arena.validate()
        assert self.look() == self.sums

    def work(self, cluster: str) -> Process:
        """Let the second and a newcomer work in bounded time, as far as they can; return the newcomer."""
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
