"""Policies of the Active Memory Manager that know nodes: shared replicas are one copy, and get a second holder."""

from __future__ import annotations

import abc
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from distributed.active_memory_manager import (
    ActiveMemoryManagerExtension,
    ActiveMemoryManagerPolicy,
    ReduceReplicas,
    Suggestion,
    SuggestionGenerator,
)

from dask_shm_plugin.scheduling.nodes import Nodes, arena_of, is_large

_SOON_S = 0.1
"""How long after news the second holders are chosen: one look serves all news of this time."""


class _Policy(ActiveMemoryManagerPolicy):
    """A policy that makes all its suggestions at once, and none if that fails.

    Parameters
    ----------
    nodes
        The arenas and published values that are known.
    guarded
        Calls a function, and returns None if it fails.
    """

    def __init__(self, nodes: Nodes, guarded: Callable[..., Any]) -> None:
        self._nodes, self._guarded = nodes, guarded

    def run(self) -> SuggestionGenerator:
        """Yield the suggestions; Dask sends its choices in return, which are not needed."""
        for suggestion in self._guarded(lambda: list(self._suggestions())) or ():  # noqa: UP028 (a list takes no choices)
            yield suggestion

    @abc.abstractmethod
    def _suggestions(self) -> Iterator[Suggestion]:
        """Yield the replicas that are to be made and dropped."""


class ReduceReplicasPerNode(_Policy):
    """Drop superfluous copies, as ``ReduceReplicas`` does. Replicas that share memory are one copy, and stay together.

    Of several copies, those on workers that do not run are dropped first, then those with fewest holders.
    """

    def _suggestions(self) -> Iterator[Suggestion]:
        for ts in self.manager.scheduler.replicated_tasks:
            coming, going = self.manager.pending.get(ts, (set(), set()))
            holders = ({*(ts.who_has or ())} | coming) - going
            copies = self._nodes.copies(ts, holders) if is_large(ts) else []
            if any(len(copy) > 1 for copy in copies):
                for copy in copies[_wanted_copies(ts) :]:
                    for _ in copy:
                        yield Suggestion("drop", ts, set(copy))
            else:  # each replica is a copy, and Dask chooses among all of them
                for _ in range(len(holders) - _wanted_copies(ts)):
                    yield Suggestion("drop", ts)


def _wanted_copies(ts: Any) -> int:
    """Return how many copies the tasks that wait for a value may need: as many as Dask keeps."""
    waiters = ts.waiters or ()
    if len(waiters) < 20:  # as Dask does: very many are not looked at one by one
        waiters = {waiter.processing_on or waiter for waiter in waiters}
    return max(1, len(waiters))


class SecondHolders(_Policy):
    """Let a second worker of the node hold each published value, so that a worker's death loses none.

    None is suggested while the user has stopped the Active Memory Manager. A second holder is asked for once, and again
    when a worker of the node has come or gone: a policy of the user, which drops it, would otherwise do so for ever.
    """

    def __init__(self, nodes: Nodes, guarded: Callable[..., Any]) -> None:
        super().__init__(nodes, guarded)
        self.keys: set[Any] | None = None
        """The keys that the next run looks at; None for all."""
        self._asked: weakref.WeakKeyDictionary[Any, set[Any]] = weakref.WeakKeyDictionary()

    def _suggestions(self) -> Iterator[Suggestion]:
        workers, keys = self._nodes.workers(), self.keys
        self.keys = None
        is_on = self.manager.scheduler.extensions["amm"].running
        if not is_on or all(len(there) < 2 for there in workers.values()):
            return
        for ts, holders in self._nodes.holders(keys):
            for arena_id, there in holders.items():
                neighbours = workers[arena_id] - there
                if len(there) == 1 and neighbours and self._asked.get(ts) != workers[arena_id]:
                    self._asked[ts] = workers[arena_id]
                    yield Suggestion("replicate", ts, neighbours)


class Replicas:
    """Manages the replicas of shared values, from its creation to :meth:`stop`.

    Policies that the user has configured are left alone.

    Parameters
    ----------
    scheduler
        A running scheduler.
    nodes
        The arenas and published values that are known.
    guarded
        Calls a function, and returns None if it fails.
    """

    def __init__(self, scheduler: Any, nodes: Nodes, guarded: Callable[..., Any]) -> None:
        self._scheduler, self._nodes = scheduler, nodes
        self._deaths_absorbed: Counter[str] = Counter()
        self._is_due = False
        self._manager = scheduler.extensions["amm"]
        self._replaced = [policy for policy in self._manager.policies if type(policy) is ReduceReplicas]
        self._own = [ReduceReplicasPerNode(nodes, guarded) for _ in self._replaced]
        self._exchange(self._replaced, self._own)
        self._told: set[Any] = set()
        self._second_holders = SecondHolders(nodes, guarded)
        # A manager of its own runs soon after news, without the policies of the user.
        self._seconds = ActiveMemoryManagerExtension(scheduler, {self._second_holders}, register=False, start=True)

    def stop(self) -> None:
        """Put Dask's policy back in place, unless the user has taken ours out."""
        self._seconds.stop()
        if self._manager.policies.issuperset(self._own):
            self._exchange(self._own, self._replaced)

    def _exchange(self, old: list[Any], new: list[Any]) -> None:
        self._manager.policies.difference_update(old)
        for policy in new:
            self._manager.add_policy(policy)

    def choose_soon(self, keys: Iterable[Any]) -> None:
        """Choose second holders of newly published keys, within 0.1 s."""
        self._told.update(keys)
        if self._told and not self._is_due:
            self._is_due = True
            self._scheduler.loop.call_later(_SOON_S, self._choose)

    def choose_all(self) -> None:
        """Choose second holders of all published values, now: a worker is gone."""
        if self._seconds.running:
            self._seconds.run_once()

    def _choose(self) -> None:
        self._is_due = False
        self._second_holders.keys, self._told = self._told, set()
        self.choose_all()

    def will_lose(self, ws: Any) -> None:
        """Note that a worker is about to be lost; count it if others of its node hold values that it has published."""
        arena_id = arena_of(ws)
        if arena_id is not None and any(
            ws in there.get(arena_id, ()) and len(there[arena_id]) > 1 for _, there in self._nodes.holders()
        ):
            self._deaths_absorbed[arena_id] += 1

    def report(self) -> dict[str, dict[str, int]]:
        """Return by arena the replicas that take no memory, and how often a worker was lost without losing values."""
        free: Counter[str] = Counter()
        for _, holders in self._nodes.holders():
            for arena_id, there in holders.items():
                free[arena_id] += len(there) - 1
        return {
            arena_id: {"free_replicas": free[arena_id], "deaths_absorbed": self._deaths_absorbed[arena_id]}
            for arena_id in {*free, *self._deaths_absorbed}
        }
