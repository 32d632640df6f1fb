"""Processes that attach what another process has put, and tell how long it took them."""

from __future__ import annotations

import importlib
import multiprocessing
import time
import zlib
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import machine
import numpy as np


class Answer(NamedTuple):
    """Seconds to attach a value and to read one element of every page; the sum of those; a checksum, if wanted."""

    attach: float
    read: float
    total: int
    checksum: int


def timed(attach: Callable[[Any], np.ndarray], name: Any, is_whole: bool) -> tuple[np.ndarray, Answer]:
    """Attach a value and read it."""
    start = time.perf_counter()
    x = attach(name)
    attached = time.perf_counter()
    total = machine.read_pages(x)
    read = time.perf_counter()
    return x, Answer(attached - start, read - attached, total, zlib.crc32(x) if is_whole else 0)


def serve(pipe: Connection, module: str, whereabouts: Any) -> None:
    """Attach and detach what the other end of the pipe says, until it says None; what goes wrong is sent as text."""
    try:
        reader = importlib.import_module(module).Reader(whereabouts)
        pipe.send("ready")
        while (order := pipe.recv()) is not None:
            x, answer = timed(reader.attach, *order)
            pipe.send(answer)
            pipe.recv()
            del x
            reader.detach()
            pipe.send("detached")
    except Exception as error:
        # Not the error itself: some of those that extensions raise cannot be pickled.
        pipe.send(Failed(f"{type(error).__name__}: {error}"))


class Failed(Exception):
    """Something went wrong in a process that reads."""


class Process:
    """The end of such a process that gives the orders."""

    def __init__(self, module: str, whereabouts: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(theirs, module, whereabouts), daemon=True)
        self._process.start()
        theirs.close()
        self._receive()

    def _receive(self) -> Any:
        answer = self._pipe.recv()
        if isinstance(answer, Failed):
            raise answer
        return answer

    def attach(self, name: Any, is_whole: bool) -> Answer:
        """Let it attach a value and read it."""
        self._pipe.send((name, is_whole))
        return self._receive()

    def detach(self) -> None:
        """Let it forget the value."""
        self._pipe.send("detach")
        self._receive()

    def close(self) -> None:
        """End it."""
        self._pipe.send(None)
        self._process.join()
