"""The C library of this room, and the names of NumPy's C interface that it needs, through ``ctypes``."""

from __future__ import annotations

import ctypes
import functools
import importlib
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

_FILE = Path(__file__).with_name("_born.so")
_HANDLER_CAPSULE = b"mem_handler"
# Slots of NumPy's table of functions: stable since NumPy 1.22, whose feature version is 15.
_FEATURE_VERSION, _SET_HANDLER, _DEFAULT_HANDLER = 211, 304, 306
_OLDEST_FEATURES = 15
_NUMPYS_OWN = b"default_allocator"
_WAS_PRIVATE = 2


class Setup(ctypes.Structure):
    """What the library is told about an arena; see ``Setup`` in ``_born.c``."""

    _fields_ = (
        ("area", ctypes.c_uint64),
        ("span", ctypes.c_uint64),
        ("base_offset", ctypes.c_uint64),
        ("device", ctypes.c_uint64),
        ("inode", ctypes.c_uint64),
        ("page", ctypes.c_uint64),
        ("fd", ctypes.c_int),
    )


class Figures(NamedTuple):
    """Bytes of chunks in use, idle with and without pages, and copy-on-write; how often one was handed out, added, not had;
    their number.
    """

    used: int
    idle: int
    bare: int
    private: int
    reused: int
    added: int
    missed: int
    living: int


class Library(NamedTuple):
    """The loaded library.

    Attributes
    ----------
    functions
        The functions of ``_born.c``.
    numpys_handler
        The address of NumPy's own handler.
    set_handler
        ``PyDataMem_SetHandler``: sets the handler of the current context, and returns the one before.
    numpys_capsule, capsule, block_capsule
        NumPy's own handler, that of the library, and that of the library for blocks of the client, as ``set_handler`` takes
        them.
    """

    functions: Any
    numpys_handler: int
    set_handler: Callable[[object], object]
    numpys_capsule: object
    capsule: object
    block_capsule: object

    def begin(self, setup: Setup, granules: int) -> bool:
        """Begin with an empty area; return whether that is possible."""
        return bool(self.functions.born_begin(ctypes.byref(setup), granules, self.numpys_handler))

    def take_gone(self, seconds: float, *, every: bool = False) -> tuple[int, bool] | None:
        """Take out a chunk that is gone, or idle for longer than ``seconds``, beyond the limit, or at all.

        Returns
        -------
        tuple of int and bool, or None
            Its address, and whether pages were taken from it that are not there again.
        """
        is_emptied = ctypes.c_int()
        address = self.functions.born_take_gone(int(seconds * 1000), every, ctypes.byref(is_emptied))
        return (address, bool(is_emptied.value)) if address else None

    def used(self) -> Iterator[tuple[int, int]]:
        """Yield address and length of each chunk that is in use and shared; each is looked up when it is its turn."""
        start, length = ctypes.c_uint64(), ctypes.c_uint64()
        for number in itertools.count():
            outcome = self.functions.born_is_used(number, ctypes.byref(start), ctypes.byref(length))
            if outcome < 0:
                return
            if outcome:
                yield start.value, length.value

    def make_private(self, address: int, length: int) -> tuple[int, int, bool] | None:
        """Make the chunk around some bytes copy-on-write; return its address and length if it is, and whether it was before."""
        start, whole = ctypes.c_uint64(), ctypes.c_uint64()
        outcome = self.functions.born_make_private(address, length, ctypes.byref(start), ctypes.byref(whole))
        return (start.value, whole.value, outcome == _WAS_PRIVATE) if outcome else None

    def stands_by(self, *, ends: bool = False) -> bool:
        """Tell whether a chunk is on standby; if ``ends``, it is gone now."""
        return bool(self.functions.born_stands_by(ends))

    def figures(self) -> Figures:
        """Return the present figures."""
        words = (ctypes.c_uint64 * len(Figures._fields))()
        self.functions.born_figures(words)
        return Figures(*words)


@functools.cache
def load() -> Library | str:
    """Load the library; return the reason if it cannot be used in this process."""
    if not getattr(sys, "_is_gil_enabled", lambda: True)():
        return "this Python runs without the GIL"
    if not _FILE.exists():
        return "the package was installed without its C library, which needs a C compiler"
    try:
        functions, table = ctypes.CDLL(str(_FILE)), _numpys_table()
        _declare(functions)
        if ctypes.CFUNCTYPE(ctypes.c_uint)(table[_FEATURE_VERSION])() < _OLDEST_FEATURES:
            return "this version of NumPy is too old"
        numpys_capsule = ctypes.cast(table[_DEFAULT_HANDLER], ctypes.POINTER(ctypes.py_object))[0]
        handler = _pointer_in(numpys_capsule, _HANDLER_CAPSULE)
        if ctypes.string_at(handler) != _NUMPYS_OWN:
            return "NumPy's own allocator was replaced"
        new = ctypes.pythonapi.PyCapsule_New
        new.restype, new.argtypes = ctypes.py_object, [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
        capsule, block_capsule = (
            new(ctypes.addressof(ctypes.c_char.in_dll(functions, name)), _HANDLER_CAPSULE, None)
            for name in ("born_handler", "born_block_handler")
        )
        set_handler = ctypes.PYFUNCTYPE(ctypes.py_object, ctypes.py_object)(table[_SET_HANDLER])
    except Exception as error:
        return f"the C library does not fit this Python or NumPy ({error})"
    return Library(functions, handler, set_handler, numpys_capsule, capsule, block_capsule)


def _declare(functions: Any) -> None:
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    for name, result, arguments in (
        ("born_begin", ctypes.c_int, [pointer, pointer, pointer]),
        ("born_limit", None, [size] * 5),
        ("born_stop", None, []),
        ("born_wait", None, [ctypes.c_uint64, ctypes.c_int]),
        ("born_wanted", size, []),
        ("born_end", ctypes.c_int, []),
        ("born_wake", None, []),
        ("born_add", ctypes.c_int, [size, size, ctypes.c_int, ctypes.c_int]),
        ("born_length", size, [size]),
        ("born_stands_by", ctypes.c_int, [ctypes.c_int]),
        ("born_make_private", ctypes.c_int, [size, size, pointer, pointer]),
        ("born_take_gone", size, [ctypes.c_uint64, ctypes.c_int, pointer]),
        ("born_is_used", ctypes.c_int, [ctypes.c_int, pointer, pointer]),
        ("born_figures", None, [pointer]),
    ):
        function = getattr(functions, name)
        function.restype, function.argtypes = result, arguments


def _numpys_table() -> Any:
    try:
        module = importlib.import_module("numpy._core._multiarray_umath")
    except ImportError:  # before NumPy 2
        module = importlib.import_module("numpy.core._multiarray_umath")
    return ctypes.cast(_pointer_in(module._ARRAY_API, None), ctypes.POINTER(ctypes.c_void_p))


def _pointer_in(capsule: object, name: bytes | None) -> int:
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return int(get(capsule, name))
