"""Processes that run the functions they are sent, one at a time."""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from multiprocessing.connection import Connection
from typing import Any


class Failed(Exception):
    """A function has raised in the other process. Carries text: not every exception can be pickled."""


class Remote:
    """Another process, as seen by the process that gives orders."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe

    def ask(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call a function there, with the process's subject and some arguments, and return the result."""
        self._pipe.send((function, arguments))
        return self.receive()

    def receive(self) -> Any:
        """Wait for a result."""
        result, error = self._pipe.recv()
        if error:
            raise Failed(error)
        return result


@contextlib.contextmanager
def remote(subject: Callable[..., AbstractContextManager[Any]], *arguments: Any) -> Iterator[Remote]:
    """Start a process that enters ``subject(*arguments)``, and end it afterwards."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, subject, arguments))
    process.start()
    theirs.close()
    other = Remote(pipe)
    try:
        other.receive()
        yield other
    finally:
        with contextlib.suppress(OSError):  # it may have ended by itself
            pipe.send(None)
        process.join()


def _serve(pipe: Connection, subject: Callable[..., AbstractContextManager[Any]], arguments: tuple[Any, ...]) -> None:
    try:
        with subject(*arguments) as it:
            pipe.send((None, None))
            while (order := pipe.recv()) is not None:
                function, arguments = order
                pipe.send((function(it, *arguments), None))
    except Exception as error:
        pipe.send((None, f"{type(error).__name__}: {error}"))
        raise
