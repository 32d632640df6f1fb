"""Keep one copy of each large Dask value on each node that needs it.

>>> from dask_shm_plugin import SharedMemoryPlugin
>>> client.register_plugin(SharedMemoryPlugin())  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dask_shm_plugin.plugin import SharedMemoryPlugin, born, explain, is_shared, stats, unregister
    from dask_shm_plugin.preload import dask_setup
    from dask_shm_plugin.roles.nanny import SharedMemoryNanny
    from dask_shm_plugin.roles.scheduler import SharedMemoryScheduler
    from dask_shm_plugin.roles.worker import SharedMemoryWorker

__version__ = "0.1.0"
__all__ = [
    "SharedMemoryNanny",
    "SharedMemoryPlugin",
    "SharedMemoryScheduler",
    "SharedMemoryWorker",
    "born",
    "dask_setup",
    "explain",
    "is_shared",
    "stats",
    "unregister",
]

_HOMES = {
    "SharedMemoryNanny": "roles.nanny",
    "SharedMemoryPlugin": "plugin",
    "SharedMemoryScheduler": "roles.scheduler",
    "SharedMemoryWorker": "roles.worker",
    "born": "plugin",
    "dask_setup": "preload",
    "explain": "plugin",
    "is_shared": "plugin",
    "stats": "plugin",
    "unregister": "plugin",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first access: ``import dask_shm_plugin`` alone loads no other module."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
