"""Settings: they come from Dask's configuration, arguments override them, and invalid ones are refused at once."""

from __future__ import annotations

import os
import subprocess
import sys

import dask.config
import pytest

from dask_shm_plugin import SharedMemoryPlugin, config
from dask_shm_plugin.linux import limits


def test_defaults_are_known_to_dask():
    """The plugin adds its namespace to Dask's configuration."""
    SharedMemoryPlugin()
    assert dask.config.get("shm.threshold") == "1 MiB"


def test_every_default_satisfies_the_schema():
    """The two files that describe the settings agree on names and types."""
    import yaml

    folder = os.path.dirname(config.__file__)
    with open(f"{folder}/dask_shm.yaml") as file:
        defaults = yaml.safe_load(file)["shm"]
    with open(f"{folder}/dask_shm-schema.yaml") as file:
        properties = yaml.safe_load(file)["properties"]["shm"]["properties"]
    assert set(defaults) == set(properties) == set(config.Options._fields)
    kinds = {"string": str, "integer": int, "number": float}
    for name, value in defaults.items():
        declared = properties[name]["type"]
        assert isinstance(value, tuple(kinds[k] for k in ([declared] if isinstance(declared, str) else declared)))
        assert value in properties[name].get("enum", [value])


def test_arguments_override_the_configuration():
    """An argument of the constructor overrides the configuration, and the other settings come from there."""
    with dask.config.set({"shm.threshold": "3 MiB", "shm.warm": 5}):
        options = SharedMemoryPlugin(threshold="2 MiB").options
    assert (options.threshold, options.warm) == (2 << 20, 5)


def test_the_repr_tells_all_settings():
    """In a notebook it shows which settings hold, also those of the configuration."""
    with dask.config.set({"shm.publish": "on-completion", "shm.born": "off"}):
        text = repr(SharedMemoryPlugin(capacity="2 GiB", warm=1))
    assert text == (
        "SharedMemoryPlugin(capacity='2 GiB', threshold=1048576, publish='on-completion', views='copy-on-write', warm=1.0, shuffle='auto', born='off')"
    )


def test_defaults_survive_a_temporary_setting(monkeypatch):
    """Dask forgets a namespace that was first set temporarily; the plugin's defaults still apply."""
    SharedMemoryPlugin()
    monkeypatch.delitem(dask.config.config, "shm", raising=False)
    assert config.options({}).threshold == 1 << 20


def test_an_environment_variable_is_a_setting():
    """``DASK_SHM__THRESHOLD`` sets ``shm.threshold``, as with every setting of Dask."""
    told = subprocess.run(
        [sys.executable, "-c", "import dask_shm_plugin as p; print(p.SharedMemoryPlugin().options.threshold)"],
        env={**os.environ, "DASK_SHM__THRESHOLD": "123 KiB"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(told.stdout) == 123 << 10


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"capacity": "lots"}, "shm.capacity"),
        ({"capacity": -1}, "shm.capacity"),
        ({"capacity": "-5%"}, "shm.capacity"),
        ({"capacity": "120%"}, "shm.capacity"),
        ({"capacity": True}, "shm.capacity"),
        ({"capacity": [1]}, "shm.capacity"),
        ({"threshold": "-1"}, "shm.threshold"),
        ({"threshold": -1}, "shm.threshold"),
        ({"threshold": "50%"}, "shm.threshold"),
        ({"publish": "sometimes"}, "shm.publish"),
        ({"views": "writeable"}, "shm.views"),
        ({"warm": "hot"}, "shm.warm"),
        ({"shuffle": "on"}, "shm.shuffle"),
        ({"shuffle": True}, "shm.shuffle"),
        ({"warm": float("nan")}, "shm.warm"),
        ({"warm": float("inf")}, "shm.warm"),
    ],
)
def test_an_invalid_setting_is_refused_at_construction(setting, named):
    """The error comes at once and names the setting, for arguments and in the configuration."""
    with pytest.raises((TypeError, ValueError), match=named):
        SharedMemoryPlugin(**setting)
    configured = dask.config.set({f"shm.{name}": value for name, value in setting.items()})
    with configured, pytest.raises((TypeError, ValueError), match=named):
        SharedMemoryPlugin()


def test_a_bare_off_in_a_file_is_off():
    """YAML reads it as a boolean."""
    with dask.config.set({"shm.shuffle": False}):
        assert SharedMemoryPlugin().options.shuffle == "off"


def test_an_unknown_option_is_refused():
    """A misspelt setting is an error, as an argument and in the configuration."""
    with pytest.raises(TypeError, match="treshold"):
        SharedMemoryPlugin(treshold="1 MiB")
    with dask.config.set({"shm.treshold": 1}), pytest.raises(ValueError, match=r"shm\.treshold"):
        SharedMemoryPlugin()


def test_a_percentage_is_a_share_of_the_memory_limit(monkeypatch):
    """The number of bytes follows from the memory limit of each node."""
    monkeypatch.setattr(limits, "memory_limit", lambda: 1000)
    assert config.options({"capacity": "25%"}).capacity_here() == 250
    assert config.options({"capacity": "1 kB"}).capacity_here() == 1000


@pytest.mark.parametrize(("capacity", "is_share"), [("50%", True), ("1 GiB", False), (1 << 30, False)])
def test_a_percentage_of_the_machine_is_a_share(
    monkeypatch: pytest.MonkeyPatch, capacity: str | int, is_share: bool
) -> None:
    """Several arenas of a cluster on one machine divide it; a number of bytes, or a part of a container, is each one's own."""
    options = config.options({"capacity": capacity})
    monkeypatch.setattr(limits, "tightest", lambda: limits.Limit(limits.PHYSICAL, 1 << 34))
    assert options.is_share is is_share
    monkeypatch.setattr(limits, "tightest", lambda: limits.Limit("control group /sys/fs/cgroup/x", 1 << 30))
    assert not options.is_share
