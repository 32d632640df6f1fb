"""A client that works without a pause: it moves values in many ways, and checks them wherever they arrive.

    python workload.py <address of the scheduler> <number of this client> <seconds after which an operation is hung>

The chaos run starts this program and writes to its standard input: "stop", or "die <file>". After the latter, this
client submits a task that ends its worker. Wrong values, and errors that Dask reports, are noted; see ``tasks``.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import random
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import tasks
from distributed import Client, Future
from tasks import note

_MAX_KEPT, _MAX_LARGE = 24, 3
_REUSED_KEYS = 6
_REGISTER_PROBABILITY = 0.03
_REPLICATE_TIMEOUT_S = 45.0


class Workload:
    """The operations of one client.

    Parameters
    ----------
    client
        The client.
    number
        The number of the client, from which the numbers of its values follow.
    """

    def __init__(self, client: Client, number: int) -> None:
        self.client = client
        self.operation = ""
        self.since = time.monotonic()
        self._number = number << 32
        self._has_plugin = "DASK_DISTRIBUTED__CLIENT__PRELOAD" in os.environ
        self._random = random.Random(number)
        self._hoard: list[tuple[Future, int]] = []
        self._large: list[tuple[Future, int]] = []
        self._keys = [f"again-{number}-{slot}" for slot in range(_REUSED_KEYS)]
        self._operations = [
            self.broadcast, self.fetch, self.fetch, self.nested, self.own_copy, self.replicate, self.views,
            self.writers, self.forked, self.hoard, self.hoard, self.large, self.large,
        ]  # fmt: skip

    def step(self) -> None:
        """Do one of the operations. An error is noted, but is no failure: after a death, Dask may report errors."""
        operation = self._random.choice(self._operations)
        if self._has_plugin and self._random.random() < _REGISTER_PROBABILITY:
            operation = self.switch_on_again
        self.operation, self.since = operation.__name__, time.monotonic()
        try:
            right, shared = operation()
        except Exception as error:
            note("error", operation=self.operation, kind=type(error).__name__, text=str(error)[:200])
        else:
            note("checked", count=right, shared=shared)

    def switch_on_again(self) -> tuple[int, int]:
        """Register the plugin once more, as each new client of a cluster may. Existing values must not be affected."""
        from dask_shm_plugin import SharedMemoryPlugin

        number = self.new_number()
        made = self.client.submit(tasks.make, number, pure=False)
        self.client.register_plugin(SharedMemoryPlugin())
        return self._check_everywhere(made, number)

    def release(self) -> None:
        """Release all values that are kept."""
        self._hoard.clear()
        self._large.clear()

    def new_number(self, many: int = 1) -> int:
        """Return the first of ``many`` numbers that were never used."""
        self._number += many
        return self._number - many

    # -- the operations; each returns the number of right values, and the number of shared ones

    def broadcast(self) -> tuple[int, int]:
        """Scatter a value to all workers, and check it on each of them."""
        number = self.new_number()
        return self._check_everywhere(self.client.scatter(tasks.value(number), broadcast=True, hash=False), number)

    def fetch(self) -> tuple[int, int]:
        """Make a value on one worker and check it on all, under a key that an earlier value had."""
        number = self.new_number()
        key = self._keys.pop(0) if self._keys else f"new-{number}"
        made = self.client.submit(tasks.make, number, key=key, pure=False)
        seen = self._check_everywhere(made, number)
        del made
        # Only if all went well: after a failure, something may still refer to the value of that key.
        self._keys.append(key)
        return seen

    def nested(self) -> tuple[int, int]:
        """Check two values in one object."""
        number = self.new_number(2)
        made = self.client.submit(tasks.make_nested, number, pure=False)
        return self._gather_counts(
            [self._submit(tasks.check_nested, made, number, worker) for worker in self._two_workers()]
        )

    def own_copy(self) -> tuple[int, int]:
        """Write to a gathered value. The next call that gathers it must not see the write."""
        number = self.new_number()
        made = self.client.submit(tasks.make, number, pure=False)
        mine = made.result()
        right, shared = int(tasks.is_right(mine, number, "client")), int(tasks.is_shared(mine))
        if mine.flags.writeable:
            mine[:] = 0
        return right + int(tasks.is_right(made.result(), number, "client, again")), shared

    def replicate(self) -> tuple[int, int]:
        """Replicate a result to all workers, and check it on each of them."""
        number = self.new_number()
        made = self.client.submit(tasks.make, number, pure=False)
        # In stock Dask, too, the death of a worker delays this call by 30 s, and the scheduler runs only one such call
        # at a time (distributed 2026.8.0). So a few deaths in a row look like a hang.
        self.client.sync(self.client._replicate, [made], callback_timeout=_REPLICATE_TIMEOUT_S)
        return self._check_everywhere(made, number)

    def views(self) -> tuple[int, int]:
        """Pass views of a shared array on, and check them where they arrive."""
        number = self.new_number(tasks.ROWS)
        rows = self.client.submit(tasks.make_rows, number, pure=False)
        parts = [self._submit(tasks.row_of, rows, row, self._random_worker()) for row in range(tasks.ROWS)]
        del rows
        looking = [
            self._submit(tasks.check, part, number + row, self._random_worker()) for row, part in enumerate(parts)
        ]
        right, shared = self._gather_counts(looking)
        gathered = self.client.gather(parts)
        return right + sum(tasks.is_right(part, number + n, "client, view") for n, part in enumerate(gathered)), shared

    def writers(self) -> tuple[int, int]:
        """Let a task change its input in place. Its result is the new value, and earlier views keep the old one."""
        number, other = self.new_number(), self.new_number()
        made = self.client.submit(tasks.make, number, pure=False)
        before = made.result()
        changed = self._submit(tasks.rewrite, made, other, self._random_worker())
        del made
        right, shared = self._check_everywhere(changed, other)
        return right + int(tasks.is_right(before, number, "client, after a write")), shared

    def forked(self) -> tuple[int, int]:
        """Let a task fork, and check the value in its child, too."""
        number = self.new_number()
        made = self.client.submit(tasks.make, number, pure=False)
        return self._gather_counts([self._submit(tasks.check_in_child, made, number, self._random_worker())])

    def hoard(self) -> tuple[int, int]:
        """Keep more values than a worker holds in memory, and check some of them again."""
        for _ in range(4):
            number = self.new_number()
            self._hoard.append((self.client.submit(tasks.make, number, pure=False), number))
        del self._hoard[:-_MAX_KEPT]
        some = self._random.sample(self._hoard, min(4, len(self._hoard)))
        return self._gather_counts(
            [self._submit(tasks.check, made, number, self._random_worker()) for made, number in some]
        )

    def large(self) -> tuple[int, int]:
        """Keep values that have two holders or more, and check one again: none may be computed again, or be lost."""
        if len(self._large) >= _MAX_LARGE:
            made, number = self._large.pop(self._random.randrange(len(self._large)))
            if made.status != "finished":
                note("lost", number=number, status=made.status, story=story_of(self.client, made.key))
                return 0, 0
            return self._gather_counts([self._submit(tasks.check, made, number, self._random_worker())])
        number = self.new_number()
        if self._random.random() < 0.5:
            made = self.client.scatter(tasks.value(number, tasks.LARGE), hash=False)
        else:
            made = self.client.submit(tasks.make, number, tasks.LARGE, pure=False)
        right, shared = self._gather_counts(
            [self._submit(tasks.check, made, number, worker) for worker in self._two_workers()]
        )
        if shared == 2 and len(self.client.who_has([made])[made.key]) >= 2:
            note("settled", number=number)
            self._large.append((made, number))
        return right, shared

    # -- inside

    def _workers(self) -> list[str]:
        return list(self.client.scheduler_info(n_workers=-1)["workers"]) or [""]

    def _random_worker(self) -> str:
        return self._random.choice(self._workers())

    def _two_workers(self) -> list[str]:
        return (self._workers() * 2)[:2]

    def _submit(self, task: Any, made: Future, argument: int, worker: str) -> Future:
        return self.client.submit(
            task, made, argument, pure=False, workers=[worker] if worker else None, allow_other_workers=bool(worker)
        )

    def _check_everywhere(self, made: Future, number: int) -> tuple[int, int]:
        return self._gather_counts([self._submit(tasks.check, made, number, worker) for worker in self._workers()])

    def _gather_counts(self, looking: list[Future]) -> tuple[int, int]:
        seen = self.client.gather(looking)
        return sum(right for right, _ in seen), sum(shared for _, shared in seen)


def exit_on_hang(workload: Workload, patience: float) -> None:
    """If an operation takes longer than any operation should, note the hang and end this process."""
    while time.monotonic() - workload.since < patience:
        time.sleep(0.5)
    note("hang", operation=workload.operation, seconds=patience)
    faulthandler.dump_traceback(all_threads=True)
    futures = list(workload.client.futures)
    asking = threading.Thread(target=print_unfinished, args=(workload.client, futures), daemon=True)
    asking.start()
    asking.join(10)
    os._exit(3)


def print_unfinished(client: Client, keys: list[str]) -> None:
    """Print the scheduler's information about the futures that are not finished."""

    def ask(dask_scheduler: Any) -> list[str]:
        known = [dask_scheduler.tasks.get(key) for key in keys]
        return [
            f"{task!r} on {task.processing_on} waits for {task.waiting_on}, asked for on {task.worker_restrictions}, "
            f"held by {task.who_has}: {dask_scheduler.story(task)[-8:]}"
            for task in known
            if task is not None and task.state not in ("memory", "released")
        ]

    print("\n".join(client.run_on_scheduler(ask)), file=sys.stderr, flush=True)


def story_of(client: Client, key: str) -> list[str]:
    """Return the last things that the scheduler knows about a key, which it may have forgotten, and about its sharing."""

    def ask(dask_scheduler: Any) -> list[str]:
        def told() -> Iterator[str]:
            for _, message in dask_scheduler.get_events("dask-shm"):
                for what in ("published", "withdrawn"):
                    if key in message[what]:
                        yield f"{what} by {message['holder'] or 'a client'}"

        return [*(str(event)[:300] for event in dask_scheduler.story(key)[-12:]), *told()]

    return client.run_on_scheduler(ask)


def submit_exit(client: Client, marker: str) -> None:
    """Submit a task that ends its worker, and keep only the last few of these futures."""
    future = client.submit(tasks.die_once, marker, pure=False)
    future.add_done_callback(lambda _: None)
    _exit_futures.append(future)
    del _exit_futures[:-4]


_exit_futures: list[Future] = []


def main() -> None:
    """Work until "stop" is read, or until the scheduler is gone."""
    address, number, patience = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    tasks.print_stacks_on_signal()
    stopping = threading.Event()
    client = Client(address, timeout=60, set_as_default=False)
    workload = Workload(client, number)

    def obey() -> None:
        for line in sys.stdin:
            command, _, argument = line.strip().partition(" ")
            if command == "stop":
                return stopping.set()
            with contextlib.suppress(Exception):
                submit_exit(client, argument)
        os._exit(2)  # the process that started this one is gone
        return None

    threading.Thread(target=obey, daemon=True).start()
    threading.Thread(target=exit_on_hang, args=(workload, patience), daemon=True).start()
    while not stopping.is_set():
        if client.status != "running":
            os._exit(4)
        workload.step()
    _exit_futures.clear()
    workload.release()
    client.close()


if __name__ == "__main__":
    main()
