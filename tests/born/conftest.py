"""Fixtures for tests that need no Dask cluster."""

from arena_fixtures import *  # noqa: F403 - pytest looks for fixtures here
