"""A client that works all the time: it moves values in every way, and checks each wherever it arrives.

    python workload.py <address of the scheduler> <number of this client> <seconds after which something hangs>

Started by the chaos run, which writes to its standard input: "stop", or "die <file>", for which it submits a task that
ends its worker. Values that were wrong, and errors that Dask reported, are notes; see ``tasks``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import sys
import threading
import time
from typing import Any

import tasks
from distributed import Client, Future
from tasks import note

_HOARD = 24
_SLOTS = 6
_SWITCHED_ON_AGAIN = 0.03
_REPLICATES_WITHIN = 45.0


class Workload:
    """One client's operations.

    Parameters
    ----------
    client
        Whose.
    number
        What distinguishes the values of this client from those of all others.
    """

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.operation = ""
        self.since = time.monotonic()
        self._number = number << 32
        self._has_plugin = "DASK_DISTRIBUTED__CLIENT__PRELOAD" in os.environ
        self._random = random.Random(number)
        self._hoard: list[tuple[Future, int]] = []
        self._keys = [f"again-{number}-{slot}" for slot in range(_SLOTS)]
        self._operations = [
            self.broadcast, self.fetch, self.fetch, self.nested, self.own_copy, self.replicate, self.views, self.writers,
            self.forked, self.hoard, self.hoard,
        ]  # fmt: skip

    def step(self) -> None:
        """Do one of the operations; what Dask says about the dead is no failure."""
        operation = self._random.choice(self._operations)
        if self._has_plugin and self._random.random() < _SWITCHED_ON_AGAIN:
            operation = self.switch_on_again
        self.operation, self.since = operation.__name__, time.monotonic()
        try:
            right, shared = operation()
        except Exception as error:
            note("error", operation=self.operation, kind=type(error).__name__, text=str(error)[:200])
        else:
            note("checked", count=right, shared=shared)

    def switch_on_again(self) -> tuple[int, int]:
        """Register the plugin once more, as each new client of a cluster may: living values must not notice."""
        from dask_shm_plugin import SharedMemoryPlugin

        number = self.new()
        made = self.client.submit(tasks.make, number, pure=False)
        self.client.register_plugin(SharedMemoryPlugin())
        return self._check_everywhere(made, number)

    def release(self) -> None:
        """Let go of everything."""
        self._hoard.clear()

    def new(self, many: int = 1) -> int:
        """Return a number that was never used, and leave room behind it."""
        self._number += many
        return self._number - many

    # -- the operations; each returns how many values were checked, and how many of them were shared

    def broadcast(self) -> tuple[int, int]:
        """Scatter to all, and look everywhere."""
        number = self.new()
        return self._check_everywhere(self.client.scatter(tasks.value(number), broadcast=True, hash=False), number)

    def fetch(self) -> tuple[int, int]:
        """Make a value here and look at it there, under a key that was used before for other contents."""
        number = self.new()
        key = self._keys.pop(0) if self._keys else f"new-{number}"
        made = self.client.submit(tasks.make, number, key=key, pure=False)
        seen = self._check_everywhere(made, number)
        del made
        # Only after everything went well: whatever failed may still refer to the value of that key.
        self._keys.append(key)
        return seen

    def nested(self) -> tuple[int, int]:
        """Two values in one object."""
        number = self.new(2)
        made = self.client.submit(tasks.make_nested, number, pure=False)
        return self._sum([self._submit(tasks.check_nested, made, number, worker) for worker in self._two()])

    def own_copy(self) -> tuple[int, int]:
        """Write to what was gathered: the next who gathers must not see it."""
        number = self.new()
        made = self.client.submit(tasks.make, number, pure=False)
        mine = made.result()
        right, shared = int(tasks.is_right(mine, number, "client")), int(tasks.is_shared(mine))
        if mine.flags.writeable:
            mine[:] = 0
        return right + int(tasks.is_right(made.result(), number, "client, again")), shared

    def replicate(self) -> tuple[int, int]:
        """Copy a result to all workers."""
        number = self.new()
        made = self.client.submit(tasks.make, number, pure=False)
        # With stock Dask, too, the death of a worker costs this 30 s, and all other calls of it on the scheduler wait for
        # that (distributed 2026.8.0): a few deaths in a row look like a hang.
        self.client.sync(self.client._replicate, [made], callback_timeout=_REPLICATES_WITHIN)
        return self._check_everywhere(made, number)

    def views(self) -> tuple[int, int]:
        """Pass views of a shared array on, and look at them where they arrive."""
        number = self.new(tasks.ROWS)
        rows = self.client.submit(tasks.make_rows, number, pure=False)
        parts = [self._submit(tasks.row_of, rows, row, self._one()) for row in range(tasks.ROWS)]
        del rows
        looking = [self._submit(tasks.check, part, number + row, self._one()) for row, part in enumerate(parts)]
        right, shared = self._sum(looking)
        gathered = self.client.gather(parts)
        return right + sum(tasks.is_right(part, number + n, "client, view") for n, part in enumerate(gathered)), shared

    def writers(self) -> tuple[int, int]:
        """Let a task change its input in place: its result is the new value, and earlier views keep the old one."""
        number, other = self.new(), self.new()
        made = self.client.submit(tasks.make, number, pure=False)
        before = made.result()
        changed = self._submit(tasks.rewrite, made, other, self._one())
        del made
        right, shared = self._check_everywhere(changed, other)
        return right + int(tasks.is_right(before, number, "client, after a write")), shared

    def forked(self) -> tuple[int, int]:
        """Let a task fork: its child looks at the value, too."""
        number = self.new()
        made = self.client.submit(tasks.make, number, pure=False)
        return self._sum([self._submit(tasks.check_in_child, made, number, self._one())])

    def hoard(self) -> tuple[int, int]:
        """Keep more values than a worker holds in memory, and look at old ones."""
        for _ in range(4):
            number = self.new()
            self._hoard.append((self.client.submit(tasks.make, number, pure=False), number))
        del self._hoard[:-_HOARD]
        some = self._random.sample(self._hoard, min(4, len(self._hoard)))
        return self._sum([self._submit(tasks.check, made, number, self._one()) for made, number in some])

    # -- inside

    def _workers(self) -> list[str]:
        return list(self.client.scheduler_info(n_workers=-1)["workers"]) or [""]

    def _one(self) -> str:
        return self._random.choice(self._workers())

    def _two(self) -> list[str]:
        return (self._workers() * 2)[:2]

    def _submit(self, task: Any, made: Future, argument: int, worker: str) -> Future:
        return self.client.submit(
            task, made, argument, pure=False, workers=[worker] if worker else None, allow_other_workers=bool(worker)
        )

    def _check_everywhere(self, made: Future, number: int) -> tuple[int, int]:
        return self._sum([self._submit(tasks.check, made, number, worker) for worker in self._workers()])

    def _sum(self, looking: list[Future]) -> tuple[int, int]:
        seen = self.client.gather(looking)
        return sum(right for right, _ in seen), sum(shared for _, shared in seen)


def watch(workload: Workload, patience: float) -> None:
    """End this process when an operation takes longer than anything can; what hangs is noted."""
    while time.monotonic() - workload.since < patience:
        time.sleep(0.5)
    note("hang", operation=workload.operation, seconds=patience)
    faulthandler.dump_traceback(all_threads=True)
    futures = list(workload.client.futures)
    asking = threading.Thread(target=tell, args=(workload.client, futures), daemon=True)
    asking.start()
    asking.join(10)
    os._exit(3)


def tell(client: Client, keys: list[str]) -> None:
    """Print what the scheduler knows of the futures that are not there yet."""

    def ask(dask_scheduler: Any) -> list[str]:
        known = [dask_scheduler.tasks.get(key) for key in keys]
        return [
            f"{task!r} on {task.processing_on} waits for {task.waiting_on}, asked for on {task.worker_restrictions}, "
            f"held by {task.who_has}: {dask_scheduler.story(task)[-8:]}"
            for task in known
            if task is not None and task.state not in ("memory", "released")
        ]

    print("\n".join(client.run_on_scheduler(ask)), file=sys.stderr, flush=True)


def die(client: Client, marker: str) -> None:
    """Submit a task that ends its worker, and forget it when it is done."""
    future = client.submit(tasks.die_once, marker, pure=False)
    future.add_done_callback(lambda _: None)
    _DYING.append(future)
    del _DYING[:-4]


_DYING: list[Future] = []


def main() -> None:
    """Work until told to stop, or until there is no scheduler any more."""
    address, number, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    tasks.stacks_on_signal()
    stopping = threading.Event()
    client = Client(address, timeout=60, set_as_default=False)
    workload = Workload(client, number)

    def obey() -> None:
        for line in sys.stdin:
            command, _, argument = line.strip().partition(" ")
            if command == "stop":
                return stopping.set()
            with contextlib.suppress(Exception):
                die(client, argument)
        os._exit(2)  # whoever started this is gone
        return None

    threading.Thread(target=obey, daemon=True).start()
    threading.Thread(target=watch, args=(workload, patience), daemon=True).start()
    while not stopping.is_set():
        if client.status != "running":
            os._exit(4)
        workload.step()
    _DYING.clear()
    workload.release()
    client.close()


if __name__ == "__main__":
    main()
