"""The members of an arena: their roles, whether they are alive, and the reclaiming of dead members' references."""

from __future__ import annotations

import contextlib

from dask_shm_plugin.arena.guard import GuardedTable
from dask_shm_plugin.exceptions import ArenaUnavailable, TableCorrupt
from dask_shm_plugin.linux import locks
from dask_shm_plugin.linux.segment import Segment
from dask_shm_plugin.table.layout import DIRECTORY_BYTES, BlockId, Extent, directory_offset
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.table.roles import RoleEntry
from dask_shm_plugin.table.table import Table


class Roster:
    """The members of an arena, from the point of view of one member.

    Parameters
    ----------
    access
        The guarded table of the arena.
    segment
        The segment; locks on its file prove which members are alive.
    member
        This process.

    Attributes
    ----------
    drafts_of_dead
        Drafts that were reclaimed here, and whose pages are still to be given back.

    Notes
    -----
    Thread-safe.
    """

    def __init__(self, access: GuardedTable, segment: Segment, member: Member) -> None:
        self.drafts_of_dead: list[Extent] = []
        self._access, self._segment, self._member = access, segment, member
        self._workers: tuple[bytes, dict[str, list[Member]]] = (b"", {})

    def is_live(self, member: Member) -> bool:
        """Tell whether this incarnation of a member is in the table: it has neither left nor been reclaimed."""
        with contextlib.suppress(TableCorrupt, ArenaUnavailable):
            return self._access.table.members.is_live(member)
        return False

    def is_running(self, member: Member) -> bool:
        """Tell whether the process of a member itself is alive, and not only a forked child of it."""
        return self.is_live(member) and not locks.is_orphaned(self._segment.fd, member.slot)

    def add_role(self, kind: str, address: str) -> None:
        """Note in the table that this process plays a role at an address, for the other members."""
        self._access.run(lambda table: table.add_role(self._member, kind, address))

    def remove_role(self, kind: str, address: str) -> None:
        """Undo :meth:`add_role`."""
        self._access.run(lambda table: table.remove_role(self._member, kind, address))

    def roles(self) -> list[RoleEntry]:
        """Return the roles of all members; takes no mutex, so an entry that is being written is left out."""
        return self._access.table.roles()

    def holders_of(self, row: BlockId) -> list[Member]:
        """Return the members that refer to a block; takes no mutex, so the answer may be out of date."""
        return self._access.table.holders_of(row)

    def workers_at(self, address: str) -> list[Member]:
        """Return the members that have a worker at an address; several if some have died and are not reclaimed yet."""
        return self.workers().get(address, [])

    def workers(self) -> dict[str, list[Member]]:
        """Return the members that have a worker, by its address.

        Makes no system call, and takes 3 µs if no role was added or removed since the last call (November 2026).
        """
        table = self._access.table
        fingerprint, workers = self._workers
        if table.fingerprint_of_roles() != fingerprint:
            fingerprint, workers = table.fingerprint_of_roles(), {}
            for role in table.roles():
                if role.kind == "worker":
                    workers.setdefault(role.address, []).append(role.member)
            self._workers = fingerprint, workers
        return workers

    def reclaim_dead(self) -> bool:
        """Reclaim the references of members that are proved dead; return whether any space became free.

        If a forked child of a dead process is alive, it may read the blocks of that process, so these are kept. The
        drafts are reclaimed all the same, because neither the child nor another process will seal them.
        """
        # The locks are queried without the mutex: an incarnation that is proved dead stays dead.
        table, fd = self._access.table, self._segment.fd
        others = [member for member in table.members.live() if member != self._member]
        dead = [member for member in others if not locks.is_held(fd, member.slot)]
        orphans = [member for member in others if table.has_drafts(member) and locks.is_orphaned(fd, member.slot)]
        if not dead and not orphans:
            return False

        def reclaim(table: Table) -> bool:
            table.count_trim()  # a draft may have lost pages that other processes remember
            freed = [extent for member in dead + orphans for extent in table.reclaim_drafts(member)]
            self.drafts_of_dead.extend(freed)
            for member in dead:
                with contextlib.suppress(OSError):  # some kernels take no pages back
                    self._segment.give_back(directory_offset(member.slot), DIRECTORY_BYTES)
                freed += table.reclaim(member)
            return bool(freed)

        return self._access.run(reclaim)
