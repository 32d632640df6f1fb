"""Control groups of the tests' own, in whichever version this machine has."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest

#: Where the groups of each version are, its file of the limit, and the one that counts the killed.
_VERSIONS = [
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.oom_control"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.events"),
]


@dataclass(frozen=True)
class ControlGroup:
    """A group that limits memory, and perhaps one inside of it that limits nothing."""

    folder: Path
    events: str

    @property
    def inner(self) -> Path:
        """The group inside."""
        return self.folder / "inner"

    def enter(self, pid: int) -> None:
        """Make a process a member; of the inner group if there is one."""
        self.procs.write_text(str(pid))

    @property
    def procs(self) -> Path:
        """The file to which a process writes its pid to become a member."""
        return (self.inner if self.inner.exists() else self.folder) / "cgroup.procs"

    def nest(self) -> None:
        """Make the inner group, and let it have the files of the memory controller."""
        control = self.folder / "cgroup.subtree_control"
        if control.exists():
            control.write_text("+memory")
        self.inner.mkdir()

    def killed(self) -> int:
        """Count the processes that the kernel has killed here for a lack of memory."""
        counts = dict(line.split() for line in (self.folder / self.events).read_text().splitlines())
        return int(counts["oom_kill"])

    def remove(self) -> bool:
        """Remove the groups, and tell whether they are gone: not while they have members."""
        for folder in (self.inner, self.folder):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return not self.folder.exists()


def make_control_group(name: str, size: int) -> ControlGroup:
    """Make a group with a limit in bytes; skip the test where that is not permitted."""
    for root, limit, events in _VERSIONS:
        group = ControlGroup(root / name, events)
        with contextlib.suppress(OSError):
            group.folder.mkdir()
            try:
                (group.folder / limit).write_text(str(size))
                # Nothing but a control group has the file of its events from the beginning.
                group.killed()
            except OSError:
                group.remove()
            else:
                return group
    pytest.skip("making a control group is not permitted")
