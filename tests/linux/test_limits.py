"""A node may use as much memory as is installed, or as the control groups above the process allow."""

from __future__ import annotations

import builtins
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from other_processes import Process

from dask_shm_plugin.exceptions import DescriptorsExhausted
from dask_shm_plugin.linux import limits
from dask_shm_plugin.linux.limits import Limit, head_room, memory_limit, tightest

GIB = 1 << 30
PHYSICAL = 64 * GIB


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that simulates a machine of 64 GiB with given control groups and limits."""

    def elsewhere(path: str, *rest: Any) -> Any:
        is_of_interest = str(path).startswith(("/sys/fs/cgroup", "/proc/meminfo")) or str(path).endswith("/cgroup")
        assert is_of_interest, f"{path} should not be read"
        return builtins.open(f"{tmp_path}{path}", *rest)

    def machine(membership: str | None, limited: dict[str, str]) -> None:
        files = {f"/sys/fs/cgroup{path}": text for path, text in limited.items()}
        if membership is not None:
            files["/proc/self/cgroup"] = membership
        for path, text in files.items():
            file = tmp_path / path[1:]
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)

    monkeypatch.setattr(limits, "open", elsewhere, raising=False)
    monkeypatch.setattr(limits, "_physical", lambda: PHYSICAL)
    return machine


def test_the_memory_limit_of_this_machine_is_at_most_its_memory() -> None:
    """The limit is also greater than zero."""
    assert 0 < memory_limit() <= psutil.virtual_memory().total


@pytest.mark.parametrize(
    ("membership", "limited", "expected"),
    [
        pytest.param(None, {}, PHYSICAL, id="no control groups"),
        pytest.param("0::/\n", {}, PHYSICAL, id="the root has no limit"),
        pytest.param("0::/\n", {"/memory.max": f"{GIB}\n"}, GIB, id="the root of a container has one"),
        pytest.param("0::/a/b\n", {"/a/b/memory.max": "max\n"}, PHYSICAL, id="max is no limit"),
        pytest.param("0::/a/b\n", {"/a/b/memory.max": f"{2 * GIB}\n"}, 2 * GIB, id="version 2"),
        pytest.param(
            "0::/a/b\n", {"/a/b/memory.max": "max\n", "/a/memory.max": f"{3 * GIB}\n"}, 3 * GIB, id="an ancestor"
        ),
        pytest.param(
            "0::/a/b\n",
            {"/a/b/memory.max": f"{GIB}\n", "/a/memory.max": f"{3 * GIB}\n"},
            GIB,
            id="the least of several",
        ),
        pytest.param(
            "0::/a/b\n", {"/a/b/memory.max": f"{3 * GIB}\n", "/a/memory.max": f"{GIB}\n"}, GIB, id="the least is above"
        ),
        pytest.param("0::/a\n", {"/a/memory.max": f"{99 * GIB}\n"}, PHYSICAL, id="more than is installed"),
        pytest.param("0::/a\n", {"/b/memory.max": f"{GIB}\n"}, PHYSICAL, id="somebody else's"),
        pytest.param(
            "0::/a\n",
            {"/a/memory.max": f"{3 * GIB}\n", "/a/memory.high": f"{2 * GIB}\n"},
            2 * GIB,
            id="where the kernel begins to stall",
        ),
        pytest.param(
            "0::/a\n", {"/a/memory.max": f"{3 * GIB}\n", "/a/memory.high": "max\n"}, 3 * GIB, id="it stalls nowhere"
        ),
        pytest.param(
            "0::/a/b\n",
            {"/a/b/memory.max": "max\n", "/a/memory.max": "max\n", "/a/memory.high": f"{GIB}\n"},
            GIB,
            id="an ancestor stalls",
        ),
        pytest.param(
            "0::/a/b\n", {"/a/memory.max": f"{GIB}\n"}, GIB, id="an ancestor of a group without the controller"
        ),
        pytest.param("0::/a\n", {"/a/memory.max": "nonsense"}, PHYSICAL, id="what cannot be read is no limit"),
        pytest.param("0::/a:b\n", {"/a:b/memory.max": f"{GIB}"}, GIB, id="a colon in the path"),
        pytest.param(
            "12:cpu:/x\n5:memory:/a/b\n",
            {"/memory/a/b/memory.limit_in_bytes": f"{2 * GIB}\n", "/cpu/x/memory.limit_in_bytes": "1\n"},
            2 * GIB,
            id="version 1",
        ),
        pytest.param(
            "5:memory:/a/b\n", {"/memory/a/memory.limit_in_bytes": f"{2 * GIB}\n"}, 2 * GIB, id="version 1, an ancestor"
        ),
        pytest.param(
            "5:memory:/a\n",
            {"/memory/a/memory.limit_in_bytes": "9223372036854771712\n"},
            PHYSICAL,
            id="version 1, none",
        ),
        pytest.param(
            "5:memory:/docker/1234\n",
            {"/memory/memory.limit_in_bytes": f"{GIB}\n"},
            GIB,
            id="version 1, in a container that sees its own group as the root",
        ),
        pytest.param(
            "7:cpu,memory,pids:/a\n",
            {"/memory/a/memory.limit_in_bytes": f"{GIB}\n"},
            GIB,
            id="version 1, with other controllers",
        ),
        pytest.param(
            "7:memory_pressure:/a\n",
            {"/memory/a/memory.limit_in_bytes": f"{GIB}\n"},
            PHYSICAL,
            id="another controller of a similar name",
        ),
        pytest.param(
            "5:memory:/a\n0::/b\n",
            {"/memory/a/memory.limit_in_bytes": f"{3 * GIB}\n", "/unified/b/memory.max": f"{2 * GIB}\n"},
            2 * GIB,
            id="both versions",
        ),
        pytest.param("0::/../../elsewhere\n", {"/memory.max": f"{GIB}\n"}, GIB, id="a group outside of our namespace"),
        pytest.param("", {"/memory.max": f"{GIB}\n"}, PHYSICAL, id="a member of none"),
    ],
)
def test_every_limit_above_this_process_counts(
    machine: Callable[..., None], membership: str | None, limited: dict[str, str], expected: int
) -> None:
    """Limits of version 1 and version 2 of control groups are read, in containers and outside."""
    machine(membership, limited)
    assert memory_limit() == expected


def test_the_tightest_limit_has_a_name(machine: Callable[..., None]) -> None:
    """The name tells a user which limit to raise."""
    machine("0::/jobs/1\n", {"/jobs/1/memory.max": f"{20 * GIB}\n", "/jobs/memory.max": f"{8 * GIB}\n"})
    assert tightest() == Limit("control group /sys/fs/cgroup/jobs", 8 * GIB)


def test_a_process_without_free_descriptors_does_not_take_memory_as_unlimited(process: Callable[[], Process]) -> None:
    """Limits that cannot be read are unknown; the error says which limit on descriptors to raise."""
    one = process()
    one("from dask_shm_plugin.linux import limits; limits.head_room()")
    one("limit = resource.getrlimit(resource.RLIMIT_NOFILE)")
    one("resource.setrlimit(resource.RLIMIT_NOFILE, (0, limit[1]))")
    for question in ("limits.head_room()", "limits.memory_limit()"):
        with pytest.raises(DescriptorsExhausted, match="ulimit -n"):
            one(question)
    one("resource.setrlimit(resource.RLIMIT_NOFILE, limit)")
    assert one("limits.head_room()") > 0


def test_without_proc_the_free_memory_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The free memory is less than the available memory, and greater than zero."""
    monkeypatch.setattr(limits, "_read", lambda path: b"")
    assert 0 < limits._available() < psutil.virtual_memory().total


class TestHeadRoom:
    """The head-room is the available memory, or less if a control group has less left, minus a margin."""

    MARGIN = 512 << 20

    @pytest.fixture(autouse=True)
    def forget(self) -> Iterator[None]:
        """Clear the caches, so that the margin is computed anew for each simulated machine."""
        limits._known_limit.cache_clear()
        limits._limited_groups.cache_clear()
        yield
        limits._known_limit.cache_clear()
        limits._limited_groups.cache_clear()

    def test_the_head_room_of_this_machine_is_at_most_about_its_available_memory(self) -> None:
        """The tolerance of 1 GiB allows for memory that is freed between the two measurements."""
        assert head_room() < psutil.virtual_memory().available + GIB

    @pytest.mark.parametrize(
        ("membership", "files", "expected"),
        [
            pytest.param("0::/\n", {}, 9 * GIB - MARGIN, id="what the machine has available"),
            pytest.param(
                "0::/a\n",
                {"/a/memory.max": f"{8 * GIB}", "/a/memory.current": f"{5 * GIB}"},
                3 * GIB - MARGIN,
                id="what the group has left",
            ),
            pytest.param(
                "0::/a\n",
                {
                    "/a/memory.max": f"{8 * GIB}",
                    "/a/memory.current": f"{5 * GIB}",
                    "/a/memory.stat": f"anon 7\ninactive_file {2 * GIB}\nactive_file 5\n",
                },
                5 * GIB - MARGIN,
                id="cached files count as free",
            ),
            pytest.param(
                "0::/a/b\n",
                {
                    "/a/b/memory.max": "max",
                    "/a/b/memory.current": "1",
                    "/a/memory.max": f"{8 * GIB}",
                    "/a/memory.current": f"{7 * GIB}",
                },
                GIB - MARGIN,
                id="an ancestor",
            ),
            pytest.param(
                "0::/a\n",
                {
                    "/a/memory.max": f"{8 * GIB}",
                    "/a/memory.high": f"{6 * GIB}",
                    "/a/memory.current": f"{5 * GIB}",
                },
                GIB - MARGIN,
                id="what is left before the kernel stalls",
            ),
            pytest.param(
                "0::/a\n",
                {"/a/memory.max": "max", "/a/memory.high": f"{6 * GIB}", "/a/memory.current": f"{2 * GIB}"},
                4 * GIB - MARGIN,
                id="a group that stalls and does not kill",
            ),
            pytest.param(
                "5:memory:/a\n",
                {"/memory/a/memory.limit_in_bytes": f"{8 * GIB}", "/memory/a/memory.usage_in_bytes": f"{6 * GIB}"},
                2 * GIB - MARGIN,
                id="version 1",
            ),
            pytest.param(
                "0::/a\n",
                {"/a/memory.max": f"{GIB}", "/a/memory.current": f"{2 * GIB}"},
                -GIB - GIB // 10,
                id="beyond the limit",
            ),
        ],
    )
    def test_every_group_above_this_process_counts(
        self,
        machine: Callable[..., None],
        tmp_path: Path,
        membership: str,
        files: dict[str, str],
        expected: int,
    ) -> None:
        """Limits and usage of both versions of control groups are read."""
        machine(membership, files)
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {9 * GIB >> 10} kB\n")
        assert head_room() == expected

    def test_the_limit_of_another_group_counts_at_once_after_a_move(
        self, machine: Callable[..., None], tmp_path: Path
    ) -> None:
        """A limit that a group did not have before counts after one second."""
        files = {f"/{group}/memory.current": f"{GIB}" for group in "ab"}
        machine("0::/a\n", files | {"/a/memory.max": "max", "/b/memory.max": f"{3 * GIB}"})
        (tmp_path / "proc/meminfo").write_text(f"MemTotal: 1 kB\nMemAvailable: {9 * GIB >> 10} kB\n")
        assert head_room() == 9 * GIB - self.MARGIN
        machine("0::/b\n", {})
        assert head_room() == 2 * GIB - self.MARGIN
        machine("0::/a\n", {"/a/memory.max": f"{2 * GIB}"})
        time.sleep(1)
        assert head_room() == GIB - self.MARGIN
