"""Explain, for one value on one worker, whether it is shared, and the reason."""

from __future__ import annotations

from typing import Any, NamedTuple

from dask_shm_plugin.transfer.answers import Answers
from dask_shm_plugin.transfer.publisher import Publisher
from dask_shm_plugin.values import adoption, aliases, codec


class Explanation(NamedTuple):
    """The state of a value on one worker, in a word, and the reason, in a sentence."""

    state: str
    why: str


def explain(worker: Any, key: Any, answers: Answers, publisher: Publisher, threshold: int) -> Explanation:
    """Explain the value of a key, and say if it was sent as bytes; to be called on the worker's event loop.

    Parameters
    ----------
    worker, answers, publisher
        The worker, and its parts that answer requests and publish values.
    key
        The key.
    threshold
        Smallest value to share, in bytes.
    """
    state, why = _explain(worker, key, answers, publisher, threshold)
    reason = answers.last_reason(key)
    return Explanation(state, f"{why}; it was sent as bytes: {reason}" if reason else why)


def _explain(worker: Any, key: Any, answers: Answers, publisher: Publisher, threshold: int) -> Explanation:
    task = worker.state.tasks.get(key)
    box = [publisher.in_memory(key)]
    if box[0] is None:
        where = "it is spilled to disk" if key in worker.data else "the worker does not have it"
        return Explanation("on disk" if key in worker.data else "absent", where)
    if key in worker.state.actors:
        return Explanation("private", "it is an actor, and actors are never shared")
    entry = publisher.entry(key)
    if entry is not None and entry.is_adopted:
        return Explanation("adopted", "the worker has given up its private copy for the shared one")
    if entry is not None and entry.published is not None and not codec.is_shared(box[0]):
        return Explanation(
            "private copy kept", f"a shared copy exists, too; {_why_private(box, task, has_entry=entry is not None)}"
        )
    if not answers.is_large(key):
        size = (task.nbytes or 0) if task else 0
        return Explanation("private", f"Dask measures it as {size} bytes, less than shm.threshold ({threshold})")
    if codec.is_shared(box[0]):
        return Explanation("shared", "the worker maps it from the arena")
    if answers.is_of_small_items(key, box[0]):
        return Explanation("private", "it has very many small parts, and is sent as bytes")
    return Explanation(
        "private",
        f"no process of this machine has asked for it yet; if one does: {_why_private(box, task, has_entry=entry is not None)}",
    )


def _why_private(box: list[Any], task: Any, *, has_entry: bool) -> str:
    """Return the reason why a value in a box of its own would keep its private copy, or would not."""
    if not adoption.may_adopt(box[0]):
        return f"the type {type(box[0]).__qualname__} cannot be rebuilt exactly, so the owner keeps its own copy"
    if task is not None and any(user.state in ("executing", "long-running") for user in task.dependents):
        return "a task uses it now"
    # The references of the worker's data, and of the entry.
    if not aliases.is_alone(box, 1 + has_entry):
        return "something else in the worker can reach its memory: a view, a cache, a global or an attribute"
    return "nothing else reaches it, so the shared copy replaces the private one"
