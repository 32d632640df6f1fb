"""Facts about processes, read from ``/proc``."""

from __future__ import annotations


def start_time(pid: int) -> int:
    """Return the start time of a process, in clock ticks since boot, or 0 if there is no such process."""
    return _number_about(pid, 19)


def parent(pid: int) -> int:
    """Return the pid of a process's parent, or 0 if there is no such process."""
    return _number_about(pid, 1)


def _number_about(pid: int, field: int) -> int:
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            # The program's name is in parentheses and may contain any character, parentheses and spaces too.
            return int(file.read().rpartition(b")")[2].split()[field])
    except (OSError, IndexError, ValueError):
        return 0
