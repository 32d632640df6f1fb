"""Tests of `distributed` that may fail with the plugin, each with its reason.

Patterns as of the shell (`*`, `?`); square brackets stand for themselves. A reason says what the test looks at that the
plugin is meant to change, or what stands in the records of `docs/design.md`. What is a bug does not stand here.
"""

from __future__ import annotations

MAY_DIFFER: dict[str, str] = {}
