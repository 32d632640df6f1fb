"""Every kind of value arrives as on stock Dask, in whichever way it travels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest
from clusters import local_cluster
from describing import assert_descriptions_equal, assert_same, describe, differences
from distributed import Client, Future
from observing import addresses, is_shared, totals
from values import BUFFERS, KINDS, LARGE, SIZES, make

Case = tuple[str, str]
Cases = Sequence[Case]
#: The description of a value that arrived, and whether the value lay in the arena.
Outcome = tuple[Any, bool]
CASES: list[Case] = [(kind, size) for kind in KINDS for size in SIZES]
#: The number of cases that travel together; if a batch fails, each of its cases travels alone.
BATCH = 20
#: Timeout (s) of a batch, which is then recorded as lost.
SECONDS = 30
#: The ways on which another process wrote the value: a large one certainly lies in the arena.
MAPPED = ("scattered", "broadcast", "fetched", "passed_on", "gathered", "gathered_directly", "result", "returned")
WAYS = (*MAPPED, "kept", "contained")
#: One way of each kind: enough for a test with other versions of the libraries.
QUICK = ("scattered", "fetched", "gathered", "kept")
OPTIONS = {"threshold": "16 KiB", "capacity": "256 MiB"}

Outcomes = dict[str, dict[Case, Any]]


def along(ways: Sequence[str]) -> pytest.MarkDecorator:
    """Run a test for each of some ways; all but the quick ways are slow tests."""
    slow = pytest.mark.slow
    return pytest.mark.parametrize("way", [pytest.param(way, marks=() if way in QUICK else slow) for way in ways])


def look(value: Any) -> Outcome:
    """Describe a value where it arrived, and tell whether it lies in the arena."""
    return describe(value), is_shared(value)


def look_each(*values: Any) -> list[Outcome]:
    """Describe several values where they arrived."""
    return [look(value) for value in values]


def look_inside(values: Sequence[Any]) -> list[Outcome]:
    """Describe the elements of a value where it arrived."""
    return look_each(*values)


def together(*values: Any) -> list[Any]:
    """Return values as they came, in one container."""
    return list(values)


def make_together(cases: Cases) -> tuple[Any, ...]:
    """Return new values in one container."""
    return tuple(make(kind, SIZES[size]) for kind, size in cases)


class Journey:
    """Sends all kinds of value along all ways through one cluster, one batch at a time."""

    def __init__(self, client: Client, ways: Sequence[str]) -> None:
        self.client, self.ways = client, ways
        self.a, self.b = addresses(client)
        self.outcomes: Outcomes = {way: {} for way in ways}

    def travel(self) -> Outcomes:
        """Go all ways, and return the outcomes by way and case."""
        for start in range(0, len(CASES), BATCH):
            cases = CASES[start : start + BATCH]
            self.made_on_a = dict(zip(cases, self.make(cases, self.a), strict=True))
            self.made_on_b = dict(zip(cases, self.make(cases, self.b), strict=True))
            for way in self.ways:
                self.go(way, cases)
        return self.outcomes

    def go(self, way: str, cases: Cases) -> None:
        """Send a batch along one way; an error is an outcome too, and must not hide those of other kinds."""
        try:
            found: Sequence[Any] = getattr(self, way)(cases)
        except TimeoutError:
            found = ["did not arrive"] * len(cases)
        except Exception as error:
            if len(cases) > 1:
                for case in cases:
                    self.go(way, [case])
                return
            found = [f"{type(error).__name__}: {error}"]
        self.outcomes[way].update(zip(cases, found, strict=True))

    def make(self, cases: Cases, worker: str) -> list[Future]:
        """Let a worker make values."""
        kinds, sizes = zip(*cases, strict=True)
        return self.client.map(make, kinds, [SIZES[size] for size in sizes], workers=[worker], pure=False)

    def scatter(self, values: Sequence[Any], **options: Any) -> list[Future]:
        """Scatter values, without a hash: Dask cannot make a token of each kind."""
        return self.client.scatter(list(values), hash=False, **options)

    def submit(self, function: Callable[..., Any], *args: Any, on: str) -> Future:
        """Submit a task to one worker."""
        return self.client.submit(function, *args, workers=[on], pure=False)

    def scattered(self, cases: Cases) -> Sequence[Outcome]:
        futures = self.scatter(make_together(cases), workers=[self.a])
        return self.submit(look_each, *futures, on=self.a).result(timeout=SECONDS)

    def broadcast(self, cases: Cases) -> Sequence[Outcome]:
        futures = self.scatter(make_together(cases), broadcast=True)
        return self.submit(look_each, *futures, on=self.b).result(timeout=SECONDS)

    def fetched(self, cases: Cases) -> Sequence[Outcome]:
        futures = [self.made_on_a[case] for case in cases]
        return self.submit(look_each, *futures, on=self.b).result(timeout=SECONDS)

    def kept(self, cases: Cases) -> Sequence[Outcome]:
        """Look at values on the worker that made them, after another worker has fetched them."""
        futures = [self.made_on_a[case] for case in cases]
        return self.submit(look_each, *futures, on=self.a).result(timeout=SECONDS)

    def passed_on(self, cases: Cases) -> Sequence[Outcome]:
        """Look at values that a worker received, returned, and sent on inside of a container."""
        inner = self.submit(together, *(self.made_on_a[case] for case in cases), on=self.b)
        return self.submit(look_inside, inner, on=self.a).result(timeout=SECONDS)

    def contained(self, cases: Cases) -> Sequence[Outcome]:
        inner = self.submit(make_together, cases, on=self.b)
        return self.submit(look_inside, inner, on=self.a).result(timeout=SECONDS)

    def gathered(self, cases: Cases) -> Sequence[Outcome]:
        return look_each(*self.client.gather([self.made_on_b[case] for case in cases]))

    def gathered_directly(self, cases: Cases) -> Sequence[Outcome]:
        return look_each(*self.client.gather([self.made_on_b[case] for case in cases], direct=True))

    def result(self, cases: Cases) -> Sequence[Outcome]:
        return [look(self.made_on_b[case].result(timeout=SECONDS)) for case in cases]

    def returned(self, cases: Cases) -> Sequence[Outcome]:
        """Look at values that the client gathered and scattered again."""
        futures = self.scatter(self.client.gather([self.made_on_b[case] for case in cases]), workers=[self.a])
        return self.submit(look_each, *futures, on=self.a).result(timeout=SECONDS)


@pytest.fixture(scope="module")
def ways(request: pytest.FixtureRequest) -> list[str]:
    """The ways that any selected test needs, in the order of `WAYS`."""
    asked = {item.callspec.params.get("way") for item in request.session.items if hasattr(item, "callspec")}
    return [way for way in WAYS if way in asked]


@pytest.fixture(scope="module")
def expected(nothing_leaks: None, ways: list[str]) -> Outcomes:
    """The outcomes without the plugin."""
    with local_cluster(2, options=None) as client:
        return Journey(client, ways).travel()


@pytest.fixture(scope="module")
def actual(nothing_leaks: None, ways: list[str]) -> Outcomes:
    """The outcomes with the plugin, and under ``"counted"`` the counters at the end."""
    with local_cluster(2, OPTIONS) as client:
        return Journey(client, ways).travel() | {"counted": {("totals", ""): totals(client)}}


@pytest.mark.timeout(300)
@along(WAYS)
def test_stock_dask_carries_every_kind(expected: Outcomes, way: str) -> None:
    """Otherwise the expected outcomes would be errors, and show nothing."""
    errors = {case: outcome for case, outcome in expected[way].items() if isinstance(outcome, str)}
    assert not errors
    assert set(expected[way]) == set(CASES)


@pytest.mark.timeout(300)
@along(WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_value_arrives_as_stock_dask_brings_it(expected: Outcomes, actual: Outcomes, way: str, kind: str) -> None:
    """Type, content, dtype, shape, strides, order and writeable flag are those of a cluster without the plugin."""
    for size in SIZES:
        outcome = actual[way][kind, size]
        assert not isinstance(outcome, str), f"{size}: {outcome}"
        assert_descriptions_equal(outcome[0], expected[way][kind, size][0])


@along(MAPPED)
def test_a_large_value_arrives_through_the_arena(actual: Outcomes, way: str) -> None:
    """Values of buffers must be mapped: otherwise these tests would compare stock Dask with itself."""
    assert {kind for kind in BUFFERS if not actual[way][kind, "large"][1]} == set()


@along(WAYS)
def test_a_small_value_stays_outside_the_arena(actual: Outcomes, way: str) -> None:
    """A value below the threshold is not shared."""
    assert {kind for kind in KINDS if actual[way][kind, "small"][1]} == set()


@pytest.mark.slow
def test_most_large_values_were_published(actual: Outcomes, ways: list[str]) -> None:
    """For some kinds, a test cannot see whether a value lies in the arena; the counters show that most do."""
    assert actual["counted"]["totals", ""].published > len(ways) / 3 * len(BUFFERS)


def changed(value: np.ndarray, place: int = 0) -> np.ndarray:
    """Return a copy that differs in one element."""
    value = value.copy()
    value.flat[place] += 1
    return value


ARRAY = np.arange(12.0).reshape(3, 4)
DIFFERENT = {
    "content": (ARRAY, changed(ARRAY, 7)),
    "dtype": (ARRAY, ARRAY.astype("f4")),
    "byte_order": (ARRAY, ARRAY.astype(">f8")),
    "shape": (ARRAY, ARRAY.reshape(4, 3)),
    "order": (ARRAY, np.asfortranarray(ARRAY)),
    "strides": (ARRAY[:, ::2].copy(), ARRAY[:, ::2]),
    "writeable": (ARRAY, np.broadcast_to(ARRAY, ARRAY.shape)),
    "subclass": (ARRAY, np.asmatrix(ARRAY)),
    "mask": (np.ma.masked_less(ARRAY, 3), np.ma.masked_less(ARRAY, 4)),
    "bytes_or_bytearray": (b"abc", bytearray(b"abc")),
    "list_or_tuple": ([1, 2], (1, 2)),
    "integer_or_bool": ([1], [True]),
    "negative_zero": (0.0, -0.0),
    "deep": ({"a": [ARRAY, {"b": ARRAY}]}, {"a": [ARRAY, {"b": changed(ARRAY)}]}),
    "aliased": ([ARRAY, ARRAY], [ARRAY, ARRAY.copy()]),
    "order_of_keys": ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
    "column_type": (pd.DataFrame({"x": [1, 2]}), pd.DataFrame({"x": [1.0, 2.0]})),
    "column_name": (pd.DataFrame({"x": [1, 2]}), pd.DataFrame({"y": [1, 2]})),
    "index": (pd.Series([1, 2]), pd.Series([1, 2], index=[0, 1])),
    "closure": (KINDS["closure"](4), KINDS["closure"](5)),
}


@pytest.mark.parametrize("pair", DIFFERENT.values(), ids=DIFFERENT)
def test_the_description_tells_different_values_apart(pair: tuple[Any, Any]) -> None:
    """The comparison can fail: each property that a user could notice is part of the description."""
    assert list(differences(describe(pair[0]), describe(pair[1])))
    with pytest.raises(AssertionError, match="differ"):
        assert_same(*pair)


@pytest.mark.parametrize("kind", KINDS)
def test_the_description_depends_on_nothing_but_the_value(kind: str) -> None:
    """Two values that were made in the same way have the same description."""
    assert_same(make(kind, LARGE), make(kind, LARGE))
