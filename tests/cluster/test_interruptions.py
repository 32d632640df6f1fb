"""An exception at any instruction leaves no lock held and no block behind, and makes no table look damaged.

``DASK_SHM_INTERRUPTS=10000`` in the environment makes these tests longer.
"""

from __future__ import annotations

import os

import interruptions
import pytest

pytestmark = pytest.mark.slow

MIN_INTERRUPTS = int(os.environ.get("DASK_SHM_INTERRUPTS", "1500"))


@pytest.mark.parametrize("how", ["signals", "threads"])
def test_interrupts_at_any_instruction_leave_nothing_behind(how: str) -> None:
    """They hit a process that publishes, attaches and releases; another member works on without waiting in vain."""
    said = interruptions.run(MIN_INTERRUPTS, how)
    assert said["interrupts"] >= MIN_INTERRUPTS
    assert said["rounds"] > 0
    assert not [what for what in said if what.startswith(("wrong", "refused"))]
    # No claim remains without a user, and all mappings end with the membership.
    assert (said["held"], said["claims"], said["damaged"], said["left"], said["mapped"]) == (0, 0, False, True, 0)
    neighbour = said["neighbour"]
    assert neighbour.keys() - {"full"} == {"rounds", "used", "damaged"}
    assert (neighbour["used"], neighbour["damaged"]) == (0, False)
