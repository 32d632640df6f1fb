"""Which tests of `distributed` are run: files, and for a quick run the tests in them that move data."""

from __future__ import annotations

ALL = [
    "distributed/tests/test_*.py",
    "distributed/protocol/tests/test_*.py",
    "distributed/shuffle/tests/test_*.py",
    "distributed/diagnostics/tests/test_*.py",
    "distributed/deploy/tests/test_local.py",
]

QUICK: dict[str, str] = {}
