"""An exception that comes at any instruction locks nobody out, leaves no block behind, and makes no table look damaged.

``DASK_SHM_INTERRUPTS=10000`` in the environment makes these tests longer.
"""

from __future__ import annotations

import os

import interruptions
import pytest

MOST = int(os.environ.get("DASK_SHM_INTERRUPTS", "1500"))


@pytest.mark.slow
@pytest.mark.parametrize("how", ["signals", "threads"])
def test_interrupts_at_any_instruction_leave_nothing_behind(how: str) -> None:
    """They come while a process publishes, attaches and releases; a neighbour that works in the same arena never waits in vain."""
    said = interruptions.run(MOST, how)
    assert said["interrupts"] >= MOST
    assert said["rounds"] > 0
    assert not [what for what in said if what.startswith(("wrong", "refused"))]
    # Nothing is held that nobody has, and what is mapped goes with the membership.
    assert (said["held"], said["claims"], said["damaged"], said["left"], said["mapped"]) == (0, 0, False, True, 0)
    neighbour = said["neighbour"]
    assert neighbour.keys() == {"rounds", "used", "damaged"}
    assert (neighbour["used"], neighbour["damaged"]) == (0, False)
