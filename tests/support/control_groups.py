"""Control groups for the tests, of the version that this machine has."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

import pytest

#: For each version: the folder of the groups, the file with the limit, and the file that counts killed processes.
_VERSIONS = [
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.oom_control"),
    (Path("/sys/fs/cgroup"), "memory.max", "memory.events"),
]


@dataclass(frozen=True)
class ControlGroup:
    """A group that limits memory, and perhaps an inner group without a limit."""

    folder: Path
    events: str

    @property
    def inner(self) -> Path:
        """The folder of the inner group."""
        return self.folder / "inner"

    def enter(self, pid: int) -> None:
        """Move a process into the inner group if there is one, otherwise into this group."""
        self.procs.write_text(str(pid))

    @property
    def procs(self) -> Path:
        """The file to which a process writes its pid to enter the group."""
        return (self.inner if self.inner.exists() else self.folder) / "cgroup.procs"

    def nest(self) -> None:
        """Make the inner group, and enable the memory controller in it."""
        control = self.folder / "cgroup.subtree_control"
        if control.exists():
            control.write_text("+memory")
        self.inner.mkdir()

    def killed(self) -> int:
        """Return the number of processes that the kernel has killed in this group for lack of memory."""
        counts = dict(line.split() for line in (self.folder / self.events).read_text().splitlines())
        return int(counts["oom_kill"])

    def remove(self) -> bool:
        """Remove the groups, and return whether they are gone. A group with members cannot be removed."""
        for folder in (self.inner, self.folder):
            with contextlib.suppress(OSError):
                folder.rmdir()
        return not self.folder.exists()


def make_control_group(name: str, size: int) -> ControlGroup:
    """Make a group with a limit in bytes. Skip the test if that is not permitted."""
    for root, limit, events in _VERSIONS:
        group = ControlGroup(root / name, events)
        with contextlib.suppress(OSError):
            group.folder.mkdir()
            try:
                (group.folder / limit).write_text(str(size))
                # Raises unless this is a control group: in a plain folder, the file of events does not exist.
                group.killed()
            except OSError:
                group.remove()
            else:
                return group
    pytest.skip("making a control group is not permitted")
