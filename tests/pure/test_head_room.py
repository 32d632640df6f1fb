"""A control group at its limit gives no error, it kills: so head-room is read before pages are made."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from other_processes import Process, publish, wait_until

from dask_shm_plugin import limits
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.exceptions import ArenaFull, NoHeadRoom

MIB = 1 << 20
GROUPS = [
    (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes"),
    (Path("/sys/fs/cgroup"), "memory.max"),
]


@pytest.fixture
def confined(process: Callable[[], Process]) -> Iterator[Process]:
    """Start a process in a control group of 400 MiB."""
    one = process()
    for root, limit in GROUPS:
        group = root / f"dask-shm-test-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        try:
            (group / limit).write_text(str(400 * MIB))
            (group / "cgroup.procs").write_text(str(one("os.getpid()")))
            yield one
        except OSError:
            continue
        finally:
            one.kill()
            wait_until(lambda group=group: _removed(group), "the control group is empty")
        return
    pytest.skip("making a control group is not permitted")


def _removed(group: Path) -> bool:
    with contextlib.suppress(OSError):
        group.rmdir()
    return not group.exists()


def test_what_would_kill_is_an_exception(confined: Process) -> None:
    """The process lives on, and shares what fits."""
    confined("arena = Arena.create(1 << 30, warm=1 << 30)")
    confined("data = memoryview(bytes(1 << 20))")
    with pytest.raises(NoHeadRoom, match="control group") as caught:
        confined("""
            with arena.draft(600 << 20) as draft:
                for number in range(600):
                    draft.write(number << 20, data)
            """)
    assert isinstance(caught.value, ArenaFull)
    confined("""
        with arena.draft(100 << 20) as draft:
            for number in range(100):
                draft.write(number << 20, data)
            block = draft.seal()
        """)
    assert confined("block.view(99 << 20, 1 << 20) == data")


def test_warm_memory_is_given_back_for_what_is_needed(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """Free pages elsewhere in the arena are of more use to the new block than to nobody."""
    first, kept = publish(arena, b"x" * (MIB // 4)), publish(arena, b"k" * (MIB // 4))
    first.close()
    wait_until(lambda: arena.stats().used == MIB // 4, "the first is free")
    resident = arena.stats().resident
    monkeypatch.setattr(limits, "head_room", lambda: MIB // 2 if arena.stats().resident < resident else 0)
    with publish(arena, b"y" * (MIB // 2)) as block:
        assert block.view(0, 3) == b"yyy"
    assert kept.view(0, 3) == b"kkk"
    kept.close()


def test_without_head_room_warm_pages_are_written_all_the_same(arena: Arena, monkeypatch: pytest.MonkeyPatch) -> None:
    """They exist; nothing new is needed. When head-room returns, so does sharing."""
    publish(arena, b"x" * (MIB // 4)).close()
    wait_until(lambda: arena.stats().used == 0, "the block is free")
    monkeypatch.setattr(limits, "head_room", lambda: 0)
    publish(arena, b"y" * (MIB // 4)).close()
    with pytest.raises(NoHeadRoom):
        publish(arena, b"z" * (MIB // 2))
    monkeypatch.undo()
    publish(arena, b"z" * (MIB // 2)).close()
