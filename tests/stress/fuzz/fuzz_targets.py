"""The targets of the fuzzer: handles, whereabouts, the bytes of a rendezvous, and the words of a table.

All bytes of a block have the same value, so that bytes of another block are recognised wherever they appear. Each
target is a generator: it attacks once, and yields the outcome. An outcome that is neither a documented exception nor
the right bytes is raised as an error.
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

from dask_shm_plugin.arena.arena import Arena
from dask_shm_plugin.arena.block import Block, Descriptor
from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.linux.segment import Whereabouts
from dask_shm_plugin.mapping.atlas import ATLAS
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.table import layout
from dask_shm_plugin.table import members as member_entries
from dask_shm_plugin.table.layout import BlockId, claims_offset
from dask_shm_plugin.table.members import Member
from dask_shm_plugin.units import PAGE
from dask_shm_plugin.values import codec, handles
from dask_shm_plugin.values.codec import Published, Serialized
from dask_shm_plugin.values.handles import Handle, Span

CAPACITY = 4 << 20
WORD = 1 << 64


class WrongOutcome(Exception):
    """An attack had an outcome that it must not have."""


def require(holds: object, otherwise: str) -> None:
    """Raise an error unless a condition holds."""
    if not holds:
        raise WrongOutcome(otherwise)


def unexpected_number(chance: random.Random, near: int = 0) -> int:
    """Return a number that code may not expect: near ``near``, near a limit, negative, or any word."""
    edge = chance.choice([0, 1, PAGE, 1 << 16, 1 << 32, 1 << 40, 1 << 63, WORD])
    return chance.choice([near + chance.choice([-1, 1, PAGE, -PAGE]), edge, edge - 1, chance.randrange(WORD), -edge])


def damaged_word(chance: random.Random, word: int) -> int:
    """Return a damaged word: one bit is flipped, or the word is replaced."""
    flipped = word ^ 1 << chance.randrange(64)
    return chance.choice([flipped, flipped, unexpected_number(chance, word) % WORD, chance.randrange(WORD)])


def filled_block(arena: Arena, mark: int, size: int) -> Block:
    """Make a block in which all bytes have the value ``mark``."""
    with arena.draft(size) as draft:
        draft.write(0, memoryview(bytes([mark]) * size))
        return draft.seal()


class Peer:
    """Another process that is a member of the same arena. It carries out orders, and checks its views."""

    def __init__(self) -> None:
        self._connection, theirs = Pipe()
        self.pid = os.fork()
        if self.pid == 0:
            self._connection.close()
            with contextlib.suppress(EOFError):
                _carry_out_orders(theirs)
            os._exit(0)
        theirs.close()

    def __call__(self, order: str, *arguments: Any) -> Any:
        """Let the peer carry out an order; return its result, or raise its error."""
        self._connection.send((order, arguments))
        require(self._connection.poll(20), "the peer hangs")
        try:
            is_good, result = self._connection.recv()
        except EOFError:
            raise WrongOutcome(f"the peer has died with {os.waitpid(self.pid, 0)[1]}") from None
        if not is_good:
            raise result
        return result

    def end(self) -> None:
        """Let the peer end, and wait for it."""
        self._connection.close()
        with contextlib.suppress(ChildProcessError):
            os.waitpid(self.pid, 0)


def _carry_out_orders(connection: Connection) -> None:
    user: Any = None

    def attach(at: Whereabouts, arena_id: bytes) -> list[tuple[BlockId, int]]:
        nonlocal user
        if user is not None:
            user.leave_arena()
        user = ArenaUser(Arena.attach(at, arena_id, warm=CAPACITY), 100)
        return user.known_blocks()

    def join(cluster: str) -> tuple[bytes, list[tuple[BlockId, int]], Whereabouts]:
        nonlocal user
        user = ArenaUser(membership.join(cluster, "nanny", "peer", capacity=lambda: CAPACITY), 100)
        return user.arena.arena_id, user.known_blocks(), user.arena.segment.whereabouts

    orders: dict[str, Callable[..., Any]] = {
        "attach": attach,
        "join": join,
        "act": lambda seed: user.do_random_operations(random.Random(seed), []),
        "watch": lambda: user.check_views(),
    }
    while True:
        order, arguments = connection.recv()
        try:
            answer = True, orders[order](*arguments)
        except Exception as error:
            answer = False, WrongOutcome(f"peer: {type(error).__name__}: {error}")
        connection.send(answer)


class ArenaUser:
    """A member of an arena, with blocks, and with views of them whose bytes it checks repeatedly."""

    def __init__(self, arena: Arena, first_mark: int) -> None:
        self.arena, self._marks = arena, first_mark
        self.blocks: list[tuple[Block, int]] = []
        self.views: list[tuple[memoryview, int]] = []
        for size in (100, PAGE, 3 * PAGE + 5):
            self.publish(size)

    def known_blocks(self) -> list[tuple[BlockId, int]]:
        """Return the ids of its blocks, and the value of their bytes."""
        return [(block.row, mark) for block, mark in self.blocks]

    def publish(self, size: int) -> None:
        """Make a block and a view of it."""
        self._marks = self._marks % 250 + 1
        block = filled_block(self.arena, self._marks, size)
        self.blocks.append((block, self._marks))
        self.views.append((block.view(0, size), self._marks))

    def check_views(self) -> None:
        """Check that no view has changed."""
        for view, mark in self.views:
            require(bytes(view) == bytes([mark]) * len(view), f"a view of {mark} shows {sorted(set(view))}")

    def release_one(self, chance: random.Random) -> None:
        """Release one of its blocks and the view of it, if it has more than two."""
        if len(self.blocks) > 2:
            at = chance.randrange(len(self.blocks))
            self.blocks.pop(at)[0].close()
            del self.views[at]
            self.arena.holdings.tidy()

    def check_block(self, row: BlockId, mark: int) -> None:
        """Attach the block that a descriptor names, and check that it has the bytes that its maker wrote."""
        with self.arena.attach_block(Descriptor(self.arena.arena_id, row)) as block:
            view = block.view(0, 100)
            require(set(view) == {mark}, f"{row} shows {sorted(set(view))}, not {mark}")

    def do_random_operations(self, chance: random.Random, known_blocks: list[tuple[BlockId, int]]) -> list[str]:
        """Do some random operations of a member; return the reasons of those that were refused."""
        arena, refused = self.arena, []
        rows = [row for row, _ in known_blocks] or [self.blocks[0][0].row]
        deeds: list[Callable[[], Any]] = [
            lambda: self.publish(chance.randrange(100, 5 * PAGE)),
            lambda: self.publish(chance.randrange(100, 5 * PAGE)),
            lambda: self.release_one(chance),
            lambda: self.check_block(*chance.choice(known_blocks or self.known_blocks())),
            arena.inspect,
            arena.roster.reclaim_dead,
            arena.trimmer.trim_all,
            arena.stats,
            lambda: arena.roster.add_role("worker", f"tcp://{chance.random()}"),
            lambda: arena.roster.remove_role("worker", "tcp://other"),
            arena.roster.roles,
            lambda: (arena.shares.share(), arena.shares.count_holders(rows), arena.shares.sizes_of(rows)),
            lambda: (arena.allocator.holders(rows[0]), arena.budget.private_memory(os.getpid())),
            lambda: arena.roster.is_live(Member(unexpected_number(chance), unexpected_number(chance))),
        ]
        for deed in chance.choices(deeds, k=5):
            try:
                deed()
            except SharedMemoryError as error:
                refused.append(error.reason)
        self.check_views()
        return refused

    def leave_arena(self) -> None:
        """Release everything, and check that the process has left the arena."""
        self.views.clear()
        while self.blocks:
            self.blocks.pop()[0].close()
        gc.collect()
        self.arena.close()
        self.arena.holdings.tidy()
        self.arena.finish_leaving()
        require(self.arena.has_left, "a process without views has not left its arena")


# ----------------------------------------------------------------------------------------------------------- table


def attack_tables(chance: random.Random) -> Iterator[str]:
    """Change words of a table that two members use, and let the members go on with their work."""
    peer = Peer()
    user: ArenaUser | None = None
    try:
        while True:
            if user is None:
                user = ArenaUser(Arena.create(CAPACITY, warm=CAPACITY), 0)
                theirs = peer("attach", user.arena.segment.whereabouts, user.arena.arena_id)
            spoilt = [_damage_table(chance, user.arena) for _ in range(chance.choice([1, 1, 2, 3]))]
            try:
                refused = user.do_random_operations(chance, theirs)
                refused += peer("act", chance.random()) if chance.random() < 0.4 else []
            except (WrongOutcome, Exception) as error:
                raise WrongOutcome(f"{error!r} after {spoilt}") from error
            yield "corrupt" if "corrupt" in refused else "refused" if refused else "went on"
            if user.arena.is_damaged or len(user.blocks) > 20 or chance.random() < 0.1:
                peer("watch")
                user.leave_arena()
                user = None
    finally:
        peer.end()


def _damage_table(chance: random.Random, arena: Arena) -> tuple[int, int, int]:
    """Change one word, except in the ways that are not prevented according to ``docs/concepts/who-may-share.md``."""
    rows, members = 24, 3
    first, count = chance.choice(
        [
            (0, 8),
            (layout.MEMBERS_AT, member_entries._ENTRY * members),
            (layout.ROLES_AT, 128),
            (layout.BLOCKS_AT, 8 * rows),
            (layout.BLOCKS_AT, 8 * rows),
            (claims_offset(0) // 8, rows),
            (claims_offset(1) // 8, rows),
        ]
    )
    at = 8 * (first + chance.randrange(count))
    before = int.from_bytes(os.pread(arena.segment.fd, 8, at), "little")
    after = damaged_word(chance, before)
    if at >= claims_offset(0) and after < before:
        after = min(before + 1, WORD - 1)  # the removal of a claim is not prevented
    os.pwrite(arena.segment.fd, after.to_bytes(8, "little"), at)
    return at // 8, before, after


# --------------------------------------------------------------------------------------------------------- handles


def attack_handles(chance: random.Random) -> Iterator[str]:
    """Change fields of a handle on its way, with or without a checksum that fits."""
    cluster = f"fuzz-{chance.random()}"
    arena = membership.join(cluster, "worker", "here", capacity=lambda: CAPACITY)
    assert arena is not None
    published: dict[int, Published] = {}
    old: list[Handle] = []
    mark = 0
    while True:
        if len(published) < 6 or chance.random() < 0.02:
            if len(published) >= 6:
                # The place of the released value is used again, and its handle is replayed later.
                old = [*old[-20:], published.pop(chance.choice(list(published))).handle]
                arena.holdings.tidy()
            mark = mark % 250 + 1
            published[mark] = codec.publish(Serialized.of(_value(mark), {}), arena)
        if old and chance.random() < 0.1:
            came, expected, is_forged = handles._receive(*_fields(chance.choice(old))), None, False
        else:
            expected = chance.choice(list(published))
            fields, is_forged = _changed_fields(chance, published[expected].handle, list(published.values()))
            came = handles._receive(*fields)
        if isinstance(came, handles.Unresolved):
            yield came.reason
        elif is_forged:
            yield "forged"
        else:
            require(expected is not None, "a replayed handle gave a value")
            require(_is_value(came, expected or 0), f"a handle of {expected} gave something else")
            yield "right"
        del came


def _value(mark: int) -> dict[str, Any]:
    return {"large": np.full(2 * PAGE + 7 * mark, mark, np.uint8), "other": np.full(PAGE, mark, np.uint8), "text": "t"}


def _is_value(value: Any, mark: int) -> bool:
    wanted = _value(mark)
    return set(value) == set(wanted) and all(np.array_equal(value[key], wanted[key]) for key in wanted)


def _fields(handle: Handle) -> list[Any]:
    return [getattr(handle, field.name) for field in dataclasses.fields(handle)]


def _changed_fields(chance: random.Random, handle: Handle, others: list[Published]) -> tuple[list[Any], bool]:
    """Return the fields of a handle with a random change, and whether the checksum was made to fit."""
    odd = [None, b"", "text", 1.5, (), [], {}, unexpected_number(chance), 10**5000, np.uint8(3), BlockId(0, 0)]
    fields = _fields(handle)
    parts = list(handle.parts)
    spans = [at for at, part in enumerate(parts) if isinstance(part, Span)]
    at = chance.choice(spans)
    span = parts[at]
    what = chance.choice(["index", "generation", "offset", "length", "part", "row", "field", "drop", "byte", "nothing"])
    if what == "index":
        parts[at] = span._replace(row=BlockId(unexpected_number(chance, span.row.index), span.row.generation))
    elif what == "generation":
        parts[at] = span._replace(row=BlockId(span.row.index, unexpected_number(chance, span.row.generation)))
    elif what in ("offset", "length"):
        parts[at] = span._replace(
            **{what: chance.choice([unexpected_number(chance, getattr(span, what)), chance.choice(odd)])}
        )
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
    """Give the place of another file, or another place, as the whereabouts of an arena."""
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
                    file.write(_damaged(chance, start, 1 << 16) if chance.random() < 0.9 else b"")
                    file.truncate(chance.choice([0, 1, PAGE, layout.TABLE_BYTES, size - 1, size, 2 * size]))
            here = os.open(foreign, os.O_RDWR | os.O_CREAT, 0o600)
            fd = chance.choice([*held, here])
            status = os.fstat(fd)
            place = chance.choice([at, Whereabouts(os.getpid(), fd, status.st_dev, status.st_ino)])
            if chance.random() < 0.6:
                place = place._replace(
                    **{chance.choice(place._fields): unexpected_number(chance, chance.choice(place))}
                )
            try:
                arena = Arena.attach(place, arena_id)
            except SharedMemoryError as error:
                yield error.reason
            else:
                require(arena.arena_id == arena_id, "another arena was joined")
                arena.close()
                require(arena.has_left, "an arena without views was not left")
                yield "joined"
            finally:
                os.close(here)
    finally:
        peer.end()


def attack_rendezvous(chance: random.Random) -> Iterator[str]:
    """Change the bytes of a rendezvous, or replace its file by something else."""
    peer, cluster = Peer(), f"fuzz-{chance.random()}"
    arena_id, theirs, _ = peer("join", cluster)
    path = Path(f"/dev/shm{rendezvous.name_for(cluster)}")
    aside = path.with_name(f"aside-{path.name}")  # this name is not purged
    said = path.read_bytes()
    try:
        while True:
            is_replaced = chance.random() < 0.2
            if is_replaced:
                path.rename(aside)
                _replace_file(chance, path, said)
            else:
                path.write_bytes(_damaged(chance, said, 200))
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
                        ArenaUser.check_block(_ArenaOnly(arena), row, mark)  # type: ignore[arg-type]
                gc.collect()
                membership.leave(cluster, "worker", "here")
                require(arena is None or not membership._lingering, "an arena without views was not left")
                yield "none" if arena is None else "joined" if arena.arena_id == arena_id else "new"
            if is_replaced:
                _remove_path(path)
                aside.rename(path)
            path.write_bytes(said)
            peer("watch")
    finally:
        peer.end()


class _ArenaOnly:
    """The part of an `ArenaUser` that is needed to check the block of a descriptor."""

    def __init__(self, arena: Arena) -> None:
        self.arena = arena


def _replace_file(chance: random.Random, path: Path, said: bytes) -> None:
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


def _remove_path(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        path.rmdir() if stat.S_ISDIR(path.lstat().st_mode) else path.unlink()


def _damaged(chance: random.Random, content: bytes, reach: int) -> bytes:
    spoilt = bytearray(content)
    for _ in range(chance.choice([0, 1, 1, 2, 5, 30])):
        at = chance.randrange(min(reach, len(spoilt)) // 8) * 8
        word = int.from_bytes(spoilt[at : at + 8], "little")
        spoilt[at : at + 8] = damaged_word(chance, word).to_bytes(8, "little")
    return bytes(spoilt)


TARGETS: dict[str, Callable[[random.Random], Iterator[str]]] = {
    "handles": attack_handles,
    "whereabouts": attack_whereabouts,
    "rendezvous": attack_rendezvous,
    "table": attack_tables,
}


def count_resources() -> tuple[int, int]:
    """Return the number of descriptors, and of mappings of arenas. Neither may grow."""
    gc.collect()
    return len(os.listdir("/proc/self/fd")), len(ATLAS)
