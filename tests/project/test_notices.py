"""Log records about an error contain only text, so that a record that is kept keeps no value."""

from __future__ import annotations

import gc
import logging
import weakref
from collections.abc import Callable, Iterator

import pytest

from dask_shm_plugin import notices
from dask_shm_plugin.exceptions import SharedMemoryError, TableFull


class Value:
    """Stands for a large value."""


@pytest.fixture
def no_earlier_warnings() -> Iterator[None]:
    """Let this process repeat its warnings, as a new process would."""
    before = set(notices._told)
    notices._told.clear()
    yield
    notices._told.clear()
    notices._told.update(before)


def fail_with(value: Value) -> None:
    """Raise an error from a frame that refers to a value."""
    raise TableFull(f"there is no row for {type(value).__name__}")


@pytest.mark.usefixtures("no_earlier_warnings")
@pytest.mark.parametrize("say", [lambda error: notices.refused(error, 1), notices.kept_private])
def test_a_record_that_is_kept_keeps_no_value(
    say: Callable[[SharedMemoryError], None], caplog: pytest.LogCaptureFixture
) -> None:
    """An error refers to its frames, and these to values and blocks, which would all live as long as the record."""
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
