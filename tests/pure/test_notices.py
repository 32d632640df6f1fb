"""What is said of an error is words: whoever keeps what was logged keeps no value by that."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator

import pytest

from dask_shm_plugin import notices
from dask_shm_plugin.exceptions import SharedMemoryError, TableFull


class Value:
    """Stands for a large one."""


@pytest.fixture
def nothing_said() -> Iterator[None]:
    """Let this process warn as a new one would."""
    before = set(notices._told)
    notices._told.clear()
    yield
    notices._told.clear()
    notices._told.update(before)


def fail_with(value: Value) -> None:
    """Raise an error from a frame that has a value."""
    raise TableFull(f"there is no row for {type(value).__name__}")


@pytest.mark.usefixtures("nothing_said")
@pytest.mark.parametrize("say", [lambda error: notices.refused(error, 1), notices.kept_private])
def test_a_record_that_is_kept_keeps_no_value(
    say: Callable[[SharedMemoryError], None], caplog: pytest.LogCaptureFixture
) -> None:
    """An error leads to its frames, and these to values and blocks: they would stay as long as the record."""
    value = Value()
    gone = weakref.ref(value)
    caplog.set_level(logging.DEBUG, "dask_shm_plugin")
    try:
        fail_with(value)
    except TableFull as error:
        say(error)
    del value
    gc.collect()
    assert any("there is no row for Value" in text for text in caplog.messages)
    assert gone() is None
