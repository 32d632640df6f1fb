"""What ``fuzz.py`` attacks: handles, whereabouts, the bytes of a rendezvous, the words of a table.

Every block holds one number in all its bytes, so that bytes of another block are recognised wherever they turn up. Each
target is a generator: it attacks once, and yields what came of it. Whatever is not a documented exception or the right
bytes is raised.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import os
import random
import stat
from collections.abc import Callable, Iterator
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from dask_shm_plugin import codec, handles, layout, memberbook, membership, rendezvous
from dask_shm_plugin.arena import Arena
from dask_shm_plugin.block import Block, Descriptor
from dask_shm_plugin.codec import Published, Serialized
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.handles import Handle, Span
from dask_shm_plugin.layout import Row, claims_offset
from dask_shm_plugin.memberbook import Member
from dask_shm_plugin.segment import PAGE, Whereabouts
from dask_shm_plugin.views import ATLAS

CAPACITY = 4 << 20
WORD = 1 << 64


class Wrong(Exception):
    """Something came of an attack that must not."""


def insist(holds: object, otherwise: str) -> None:
    """Raise where something does not hold."""
    if not holds:
        raise Wrong(otherwise)


def number(chance: random.Random, near: int = 0) -> int:
    """Return a number that somebody might not have thought of."""
    edge = chance.choice([0, 1, PAGE, 1 << 16, 1 << 32, 1 << 40, 1 << 63, WORD])
    return chance.choice([near + chance.choice([-1, 1, PAGE, -PAGE]), edge, edge - 1, chance.randrange(WORD), -edge])


def scribbled(chance: random.Random, word: int) -> int:
    """Return a word as somebody might leave it."""
    flipped = word ^ 1 << chance.randrange(64)
    return chance.choice([flipped, flipped, number(chance, word) % WORD, chance.randrange(WORD)])


def block_of(arena: Arena, mark: int, size: int) -> Block:
    """Make a block that holds one number."""
    with arena.draft(size) as draft:
        draft.write(0, memoryview(bytes([mark]) * size))
        return draft.seal()


class Peer:
    """Another process that is a member of the same arena; it does what it is told, and watches over what it sees."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            with contextlib.suppress(EOFError):
                _obey(theirs)
            os._exit(0)
        theirs.close()

    def __call__(self, order: str, *arguments: Any) -> Any:
        """Let it do something; raise what it raises."""
        self._connection.send((order, arguments))
        insist(self._connection.poll(20), "the peer hangs")
        try:
            is_good, result = self._connection.recv()
        except EOFError:
            raise Wrong(f"the peer has died with {os.waitpid(self.pid, 0)[1]}") from None
        if not is_good:
            raise result
        return result

    def end(self) -> None:
        """Let it end."""
        self._connection.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _obey(connection: Connection) -> None:
    camp: Any = None

    def attach(at: Whereabouts, arena_id: bytes) -> list[tuple[Row, int]]:
        nonlocal camp
        if camp is not None:
            camp.strike()
        camp = Camp(Arena.attach(at, arena_id, warm=CAPACITY), 100)
        return camp.known()

    def join(cluster: str) -> tuple[bytes, list[tuple[Row, int]], Whereabouts]:
        nonlocal camp
        camp = Camp(membership.join(cluster, "nanny", "peer", capacity=lambda: CAPACITY), 100)
        return camp.arena.arena_id, camp.known(), camp.arena.segment.whereabouts

    orders: dict[str, Callable[..., Any]] = {
        "attach": attach,
        "join": join,
        "act": lambda seed: camp.act(random.Random(seed), []),
        "watch": lambda: camp.watch(),
    }
    while True:
        order, arguments = connection.recv()
        try:
            answer = True, orders[order](*arguments)
        except Exception as error:
            answer = False, Wrong(f"peer: {type(error).__name__}: {error}")
        connection.send(answer)


class Camp:
    """What one process has in an arena: blocks, and views of them that it looks at again and again."""

    def __init__(self, arena: Arena, first_mark: int) -> None:
        self.arena, self._marks = arena, first_mark
        self.blocks: list[tuple[Block, int]] = []
        self.views: list[tuple[memoryview, int]] = []
        for size in (100, PAGE, 3 * PAGE + 5):
            self.publish(size)

    def known(self) -> list[tuple[Row, int]]:
        """Return the blocks that it has, and what is in them."""
        return [(block.row, mark) for block, mark in self.blocks]

    def publish(self, size: int) -> None:
        """Make a block, and look at it."""
        self._marks = self._marks % 250 + 1
        block = block_of(self.arena, self._marks, size)
        self.blocks.append((block, self._marks))
        self.views.append((block.view(0, size), self._marks))

    def watch(self) -> None:
        """Insist that what it sees is what it has seen."""
        for view, mark in self.views:
            insist(bytes(view) == bytes([mark]) * len(view), f"a view of {mark} shows {sorted(set(view))}")

    def drop(self, chance: random.Random) -> None:
        """Give up one that it has."""
        if len(self.blocks) > 2:
            at = chance.randrange(len(self.blocks))
            self.blocks.pop(at)[0].close()
            del self.views[at]
            self.arena.holdings.tidy()

    def follow(self, row: Row, mark: int) -> None:
        """Attach what a descriptor names; whatever it sees there must be what its maker put there."""
        with self.arena.attach_block(Descriptor(self.arena.arena_id, row)) as block:
            view = block.view(0, 100)
            insist(set(view) == {mark}, f"{row} shows {sorted(set(view))}, not {mark}")

    def act(self, chance: random.Random, known: list[tuple[Row, int]]) -> list[str]:
        """Do some of what members do; return the reasons for which it was refused."""
        arena, refused = self.arena, []
        rows = [row for row, _ in known] or [self.blocks[0][0].row]
        deeds: list[Callable[[], Any]] = [
            lambda: self.publish(chance.randrange(100, 5 * PAGE)),
            lambda: self.publish(chance.randrange(100, 5 * PAGE)),
            lambda: self.drop(chance),
            lambda: self.follow(*chance.choice(known or self.known())),
            arena.inspect,
            arena.roster.reclaim_dead,
            arena.trimmer.trim_all,
            arena.stats,
            lambda: arena.roster.add_role("worker", f"tcp://{chance.random()}"),
            lambda: arena.roster.remove_role("worker", "tcp://other"),
            arena.roster.roles,
            lambda: (arena.weights.weigh(), arena.weights.count_holders(rows), arena.weights.size_of(rows[0])),
            lambda: (arena.holders(rows[0]), arena.budget.private_memory(os.getpid())),
            lambda: arena.roster.is_live(Member(number(chance), number(chance))),
        ]
        for deed in chance.choices(deeds, k=5):
            try:
                deed()
            except SharedMemoryError as error:
                refused.append(error.reason)
        self.watch()
        return refused

    def strike(self) -> None:
        """Give everything up, and see that the process has left the arena."""
        self.views.clear()
        while self.blocks:
            self.blocks.pop()[0].close()
        gc.collect()
        self.arena.close()
        self.arena.holdings.tidy()
        self.arena.finish_leaving()
        insist(self.arena.has_left, "a process without views has not left its arena")


# ----------------------------------------------------------------------------------------------------------- table


def attack_tables(chance: random.Random) -> Iterator[str]:
    """Words of a table change under two members, who then go on with their work."""
    peer = Peer()
    camp: Camp | None = None
    try:
        while True:
            if camp is None:
                camp = Camp(Arena.create(CAPACITY, warm=CAPACITY), 0)
                theirs = peer("attach", camp.arena.segment.whereabouts, camp.arena.arena_id)
            spoilt = [_scribble(chance, camp.arena) for _ in range(chance.choice([1, 1, 2, 3]))]
            try:
                refused = camp.act(chance, theirs)
                refused += peer("act", chance.random()) if chance.random() < 0.4 else []
            except (Wrong, Exception) as error:
                raise Wrong(f"{error!r} after {spoilt}") from error
            yield "corrupt" if "corrupt" in refused else "refused" if refused else "went on"
            if camp.arena.is_damaged or len(camp.blocks) > 20 or chance.random() < 0.1:
                peer("watch")
                camp.strike()
                camp = None
    finally:
        peer.end()


def _scribble(chance: random.Random, arena: Arena) -> tuple[int, int, int]:
    """Change one word, but for those of which ``docs/concepts/who-may-share.md`` says that nothing can be done."""
    rows, members = 24, 3
    first, count = chance.choice(
        [
            (0, 8),
            (layout.MEMBERS_AT, memberbook._ENTRY * members),
            (layout.ROLES_AT, 128),
            (layout.BLOCKS_AT, 8 * rows),
            (layout.BLOCKS_AT, 8 * rows),
            (claims_offset(0) // 8, rows),
            (claims_offset(1) // 8, rows),
        ]
    )
    at = 8 * (first + chance.randrange(count))
    before = int.from_bytes(os.pread(arena.segment.fd, 8, at), "little")
    after = scribbled(chance, before)
    if at >= claims_offset(0) and after < before:
        after = min(before + 1, WORD - 1)  # not a claim that was taken away
    os.pwrite(arena.segment.fd, after.to_bytes(8, "little"), at)
    return at // 8, before, after


# --------------------------------------------------------------------------------------------------------- handles


def attack_handles(chance: random.Random) -> Iterator[str]:
    """Fields of a handle change on its way, with or without a checksum that fits."""
    cluster = f"fuzz-{chance.random()}"
    arena = membership.join(cluster, "worker", "here", capacity=lambda: CAPACITY)
    assert arena is not None
    published: dict[int, Published] = {}
    old: list[Handle] = []
    mark = 0
    while True:
        if len(published) < 6 or chance.random() < 0.02:
            if len(published) >= 6:
                # Its place is used again, and its handle is replayed.
                old = [*old[-20:], published.pop(chance.choice(list(published))).handle]
                arena.holdings.tidy()
            mark = mark % 250 + 1
            published[mark] = codec.publish(Serialized.of(_value(mark), {}), arena)
        if old and chance.random() < 0.1:
            came, expected, is_forged = handles._receive(*_fields(chance.choice(old))), None, False
        else:
            expected = chance.choice(list(published))
            fields, is_forged = _changed(chance, published[expected].handle, list(published.values()))
            came = handles._receive(*fields)
        if isinstance(came, handles.Unresolved):
            yield came.reason
        elif is_forged:
            yield "forged"
        else:
            insist(expected is not None, "a replayed handle gave a value")
            insist(_is_value(came, expected or 0), f"a handle of {expected} gave something else")
            yield "right"
        del came


def _value(mark: int) -> dict[str, Any]:
    return {"large": np.full(2 * PAGE + 7 * mark, mark, np.uint8), "other": np.full(PAGE, mark, np.uint8), "text": "t"}


def _is_value(value: Any, mark: int) -> bool:
    wanted = _value(mark)
    return set(value) == set(wanted) and all(np.array_equal(value[key], wanted[key]) for key in wanted)


def _fields(handle: Handle) -> list[Any]:
    return [getattr(handle, field.name) for field in dataclasses.fields(handle)]


def _changed(chance: random.Random, handle: Handle, others: list[Published]) -> tuple[list[Any], bool]:
    """Return the fields of a handle with something changed, and whether its checksum fits all the same."""
    odd = [None, b"", "text", 1.5, (), [], {}, number(chance), 10**5000, np.uint8(3), Row(0, 0)]
    fields = _fields(handle)
    parts = list(handle.parts)
    spans = [at for at, part in enumerate(parts) if isinstance(part, Span)]
    at = chance.choice(spans)
    span = parts[at]
    what = chance.choice(["index", "generation", "offset", "length", "part", "row", "field", "drop", "byte", "nothing"])
    if what == "index":
        parts[at] = span._replace(row=Row(number(chance, span.row.index), span.row.generation))
    elif what == "generation":
        parts[at] = span._replace(row=Row(span.row.index, number(chance, span.row.generation)))
    elif what in ("offset", "length"):
        parts[at] = span._replace(**{what: chance.choice([number(chance, getattr(span, what)), chance.choice(odd)])})
    elif what == "row":
        other = chance.choice(others).handle.parts
        parts[at] = chance.choice([part for part in other if isinstance(part, Span)])
    elif what == "part":
        parts[chance.randrange(len(parts))] = chance.choice(odd)
    elif what == "drop":
        chance.choice([lambda: parts.pop(at), lambda: parts.append(span), lambda: chance.shuffle(parts)])()
    elif what == "field":
        fields[chance.randrange(len(fields))] = chance.choice(odd)
    elif what == "byte":
        header = bytearray(handle.header)
        header[chance.randrange(len(header))] ^= 1 << chance.randrange(8)
        fields[1] = bytes(header)
    if what not in ("field", "byte"):
        fields[2] = tuple(parts)
    is_forged = what not in ("byte", "field", "nothing") and chance.random() < 0.5
    if is_forged:
        with contextlib.suppress(Exception):
            fields[-1] = handles._checksum(*fields[:-1])
    return fields, is_forged


# ----------------------------------------------------------------------------------------- whereabouts, rendezvous


def attack_whereabouts(chance: random.Random) -> Iterator[str]:
    """Somebody says that an arena is where something else is."""
    peer = Peer()
    arena_id, _, at = peer("join", f"fuzz-{chance.random()}")
    folder = Path(f"/dev/shm/{rendezvous.NAME_PREFIX}folder")
    folder.mkdir(exist_ok=True)
    os.mkfifo(folder / "fifo")
    foreign = folder / "foreign"
    with open(f"/proc/{at.pid}/fd/{at.fd}", "rb") as memory:
        start, size = memory.read(layout.SHARED_BYTES), os.fstat(memory.fileno()).st_size
    held = [os.open(folder / "fifo", os.O_RDWR), os.open("/dev/zero", os.O_RDWR), os.open(folder, os.O_RDONLY)]
    held += os.pipe()
    try:
        while True:
            if chance.random() < 0.05:
                with foreign.open("wb") as file:
                    file.write(_spoilt(chance, start, 1 << 16) if chance.random() < 0.9 else b"")
                    file.truncate(chance.choice([0, 1, PAGE, layout.TABLE_BYTES, size - 1, size, 2 * size]))
            here = os.open(foreign, os.O_RDWR | os.O_CREAT, 0o600)
            fd = chance.choice([*held, here])
            status = os.fstat(fd)
            place = chance.choice([at, Whereabouts(os.getpid(), fd, status.st_dev, status.st_ino)])
            if chance.random() < 0.6:
                place = place._replace(**{chance.choice(place._fields): number(chance, chance.choice(place))})
            try:
                arena = Arena.attach(place, arena_id)
            except SharedMemoryError as error:
                yield error.reason
            else:
                insist(arena.arena_id == arena_id, "another arena was joined")
                arena.close()
                insist(arena.has_left, "an arena without views was not left")
                yield "joined"
            finally:
                os.close(here)
    finally:
        peer.end()


def attack_rendezvous(chance: random.Random) -> Iterator[str]:
    """A rendezvous says something else than its members have written, or is something else."""
    peer, cluster = Peer(), f"fuzz-{chance.random()}"
    arena_id, theirs, _ = peer("join", cluster)
    path = Path(f"/dev/shm{rendezvous.name_for(cluster)}")
    aside = path.with_name(f"aside-{path.name}")  # not a name that would be purged
    said = path.read_bytes()
    try:
        while True:
            is_replaced = chance.random() < 0.2
            if is_replaced:
                path.rename(aside)
                _put_something(chance, path, said)
            else:
                path.write_bytes(_spoilt(chance, said, 200))
                if chance.random() < 0.1:
                    os.truncate(path, chance.randrange(2 * len(said)))
            try:
                create = chance.choice([None, lambda: CAPACITY])
                arena = membership.join(cluster, "worker", "here", capacity=create)
            except SharedMemoryError as error:
                yield error.reason
            else:
                if arena is not None and arena.arena_id == arena_id:
                    for row, mark in theirs:
                        Camp.follow(_Visitor(arena), row, mark)  # type: ignore[arg-type]
                gc.collect()
                membership.leave(cluster, "worker", "here")
                insist(arena is None or not membership._lingering, "an arena without views was not left")
                yield "none" if arena is None else "joined" if arena.arena_id == arena_id else "new"
            if is_replaced:
                _remove(path)
                aside.rename(path)
            path.write_bytes(said)
            peer("watch")
    finally:
        peer.end()


class _Visitor:
    """As much of a camp as is needed to follow a descriptor."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena


def _put_something(chance: random.Random, path: Path, said: bytes) -> None:
    kind = chance.choice(["folder", "fifo", "link", "dangling", "mode", "empty"])
    if kind == "folder":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path, 0o600)
    elif kind in ("link", "dangling"):
        path.symlink_to("/etc/passwd" if kind == "link" else "/dev/shm/nothing")
    else:
        path.touch(0o600)
        path.write_bytes(said if kind == "mode" else b"")
        path.chmod(chance.randrange(0o1000) if kind == "mode" else 0o600)


def _remove(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.rmdir() if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()


def _spoilt(chance: random.Random, content: bytes, reach: int) -> bytes:
    spoilt = bytearray(content)
    for _ in range(chance.choice([0, 1, 1, 2, 5, 30])):
        at = chance.randrange(min(reach, len(spoilt)) // 8) * 8
        word = int.from_bytes(spoilt[at : at + 8], "little")
        spoilt[at : at + 8] = scribbled(chance, word).to_bytes(8, "little")
    return bytes(spoilt)


TARGETS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "handles": attack_handles,
    "whereabouts": attack_whereabouts,
    "rendezvous": attack_rendezvous,
    "table": attack_tables,
}


def held() -> tuple[int, int]:
    """Count descriptors, and mappings of arenas: what must not grow."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(ATLAS)
