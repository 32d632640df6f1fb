"""The crash matrix: role × step × before or after it × killed, stopped, or killed while a forked child lives."""

from __future__ import annotations

import itertools
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from other_processes import JOIN, LEAVE, Process, join, publish, wait_until
from sampling import sample
from two_members import NEVER, OFTEN, MemberPair

from dask_shm_plugin.arena import housekeeping
from dask_shm_plugin.node import membership, rendezvous
from dask_shm_plugin.node.rendezvous import exists, name_for

pytestmark = pytest.mark.slow

KILLED, ORPHANING, STOPPED = "killed", "killed while a child lives", "stopped"
FATES = {
    KILLED: "lambda: os.kill(os.getpid(), signal.SIGKILL)",
    # The fork must not wait for the mutex, which the process itself may hold.
    ORPHANING: "lambda: (arena and setattr(arena._mutex, '_patience', 0), fork_and_die())",
    STOPPED: "lambda: os.kill(os.getpid(), signal.SIGSTOP)",
}


class Role(NamedTuple):
    """The code that a victim runs, and the steps of the protocol that it passes.

    ``mutex`` is the number of times that it takes the mutex, ``prepare`` the code that runs before the step is armed,
    and ``is_alone`` tells whether it has an arena of its own.
    """

    act: str
    steps: str
    mutex: int = 0
    prepare: str = ""
    is_alone: bool = False


ROLES = {
    "creates the arena": Role(
        JOIN, "enter, purge, create segment, make pages, lock, join, unlock, list, attend", is_alone=True
    ),
    "joins late": Role(JOIN, "enter, open segment, lock, join, make pages, unlock, list, attend"),
    "publishes": Role(
        """
        with arena.draft(8192): pass
        draft = arena.draft(8192)
        draft.write(0, memoryview(b"victim"))
        block = draft.seal()
        view = block.view(0, 8192)
        seen = bytes(view)
        publish(arena, b"gone").close()
        arena.holdings.tidy()
        arena.trimmer.trim_all()
        """,
        "reserve, abandon, tidy, write, make pages, seal, map, release, give pages back",
        4,
        JOIN,
    ),
    "reads": Role(
        """
        block, other = map(arena.attach_block, found)
        view, short = block.view(0, 8192), other.view(0, 4096)
        seen = bytes(view)
        short = None
        other.close()
        arena.holdings.tidy()
        """,
        "acquire, map, unmap, tidy, release",
        3,
        JOIN,
    ),
    "lists": Role(
        "arena.directory.add(b'name', b'data'); arena.directory.remove(b'name')", "list value, cross out", 0, JOIN
    ),
    "receives": Role(
        """
        received = arena.receptions.open(8192)
        received.make_pages(8192)
        received.bytes()[:6] = b"victim"
        block = received.seal()
        """,
        "reserve, make pages, seal",
        0,
        JOIN,
    ),
    "bears arrays": Role(
        """
        array = newborn(np.ones, 1 << 17, np.uint8)
        switch.seal(array.ctypes.data, array.nbytes)
        del array
        switch.switch_off(arena)
        """,
        "add chunk, remap, seal chunk, drop chunk",
        0,
        f"{JOIN}; from births import *; switch.switch_on(arena, None, 3600)",
    ),
    "bears arrays in a block": Role(
        """
        with switch.block():
            array = np.ones(1 << 20, np.uint8)
            switch.seal(array.ctypes.data, array.nbytes)
        """,
        "add chunk, shorten, remap, seal chunk",
        0,
        f"{JOIN}; from births import *; switch.switch_on(arena, None, 3600, has_worker=False)".replace("1 <<", "64 <<"),
        is_alone=True,
    ),
    "cleans up behind the dead": Role("arena.roster.reclaim_dead()", "reclaim, release", 1, JOIN),
    "cleans up the drafts of the dead": Role("arena.roster.reclaim_dead()", "reclaim drafts", 0, JOIN),
    "restores the rendezvous": Role("membership._restore(cluster)", "enter, list, attend", 0, JOIN),
    "leaves": Role(LEAVE, "enter, list, tidy, leave, reclaim", 2, f"{JOIN}; publish(arena, b'gone').close()"),
    "leaves last": Role(LEAVE, "enter, list, remove, leave, reclaim", 0, JOIN, is_alone=True),
}


def moments() -> Iterator[tuple[str, str, int]]:
    """Yield each role with each moment of its steps, and how often the moment is passed before the fate strikes."""
    for name, role in ROLES.items():
        steps = [(step, 0) for step in role.steps.split(", ")]
        steps += itertools.product(("lock", "unlock"), range(role.mutex))
        for (step, skip), when in itertools.product(steps, ("before", "after")):
            yield name, f"{when} {step}", skip


@pytest.fixture(scope="module")
def armed(prefix: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    """Start a process with crash points, from which the others are forked."""
    first = Process.start(tmp_path_factory.mktemp("armed"), "env", "DASK_SHM_CRASHPOINTS=1")
    first(
        "segment.NAME_PREFIX = rendezvous.NAME_PREFIX = prefix; housekeeping._INTERVAL_S = every",
        prefix=prefix,
        every=OFTEN,
    )
    yield first
    first.kill_all()


@pytest.fixture(scope="module")
def member_pair(armed: Process, own_names: None) -> Iterator[MemberPair]:
    """Start two members that live through all cells."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(housekeeping, "_INTERVAL_S", OFTEN)
        one = MemberPair(armed, f"tcp://{secrets.token_hex(8)}")
        yield one
        one.end()
        membership.leave(one.cluster, "nanny", "tcp://here")


@pytest.fixture(autouse=True)
def nothing_is_left(member_pair: MemberPair, prefix: str) -> Iterator[None]:
    """Check after each cell that no name is left but that of the member_pair."""
    yield
    rendezvous.purge()
    assert {f"/{path.name}" for path in Path("/dev/shm").glob(f"{prefix}*")} == {name_for(member_pair.cluster)}


class Victim:
    """A process that plays a role and is killed or stopped at one moment of it."""

    def __init__(self, member_pair: MemberPair, name: str, moment: str, skip: int, fate: str) -> None:
        self.member_pair, self.role = member_pair, ROLES[name]
        self.cluster = f"tcp://{secrets.token_hex(8)}" if self.role.is_alone else member_pair.cluster
        self.process = member_pair.fork()
        self.buried: list[Process] = [self.process]
        self.process(self.role.prepare or "arena = None", cluster=self.cluster)
        if "behind" in name or "drafts of" in name:
            member_pair.look_after_the_dead(NEVER)
            self.buried.append(member_pair.corpse(with_child="drafts" in name))
        if "restores" in name:
            member_pair.look_after_the_dead(NEVER)
            os.unlink(f"/dev/shm{name_for(member_pair.cluster)}")
        self.process(f"crashpoints.arm(moment, {FATES[fate]}, skip=skip)", moment=moment, skip=skip)
        self.process.begin(self.role.act, found=member_pair.found)

    def bury(self) -> None:
        """End all processes that were started for the victim."""
        for process in self.buried:
            self.member_pair.bury(process)

    def check_all(self) -> None:
        """Check that nothing of the victim is left, for other members and for processes that join its arena."""
        self.member_pair.look_after_the_dead(OFTEN)
        for child in itertools.chain.from_iterable(process.forked for process in self.buried[1:]):
            child.kill()
        if self.role.is_alone:
            arena = wait_until(lambda: join(self.cluster), "a process can join the victim's arena")
            publish(arena, b"x").close()
            wait_until(lambda: arena.stats()[3:] == (0, 1), "nothing of the victim is left in its own arena")
            arena.validate()
            membership.leave(self.cluster, "nanny", "tcp://here")
            assert not exists(name_for(self.cluster))
        wait_until(
            self.member_pair.can_be_found,
            "newcomers can find both members, through the first rendezvous or a restored one",
        )
        self.member_pair.check()


@pytest.mark.parametrize(("role", "moment", "skip"), list(moments()))
def test_a_member_that_is_killed_leaves_nothing(member_pair: MemberPair, role: str, moment: str, skip: int) -> None:
    """The other members reclaim everything by themselves; no value changes, and processes can join."""
    victim = Victim(member_pair, role, moment, skip, KILLED)
    assert victim.process.is_killed(), "the victim did not reach the step"
    victim.check_all()
    victim.bury()


@pytest.mark.parametrize(("role", "moment", "skip"), sample(moments(), 3))
def test_a_member_that_is_killed_while_its_child_lives_leaves_only_what_the_child_sees(
    member_pair: MemberPair, role: str, moment: str, skip: int
) -> None:
    """The mutex and its drafts are free at once; its claims stay only as long as the child lives."""
    victim = Victim(member_pair, role, moment, skip, ORPHANING)
    child = victim.process.adopted()
    assert victim.process.is_killed(), "the victim did not reach the step"
    member_pair.look_after_the_dead(OFTEN)
    table = member_pair.arena._access.table
    wait_until(lambda: not any(map(table.has_drafts, member_pair.guests())), "the drafts of the victim are free")
    publish(member_pair.arena, b"\xff" * (256 << 10)).close()
    assert child("'seen' not in globals() or bytes(view) == seen")
    if victim.role.is_alone:
        victim.check_all()
    child.kill()
    victim.check_all()
    victim.bury()


@pytest.mark.parametrize(("role", "moment", "skip"), sample(moments(), 3))
def test_a_stopped_member_stops_no_other_process(member_pair: MemberPair, role: str, moment: str, skip: int) -> None:
    """Other processes succeed or get an error in time, take nothing from the stopped member, and it can go on."""
    victim = Victim(member_pair, role, moment, skip, STOPPED)
    assert victim.process.is_stopped(), "the victim did not reach the step"
    member_pair.look_after_the_dead(OFTEN)
    guests = member_pair.guests()
    newcomer = member_pair.work(victim.cluster)
    victim.buried.append(newcomer)
    assert victim.process.is_stopped()
    assert guests <= member_pair.guests() or "behind" in role or "drafts of" in role
    victim.process.go_on()
    victim.process.end()
    if role == "creates the arena":
        assert newcomer("visited") in (None, victim.process("arena.arena_id"))
    newcomer.kill()
    victim.process(LEAVE)
    victim.process.kill()
    victim.check_all()
    victim.bury()


def test_every_step_below_dask_is_in_the_matrix(armed: Process) -> None:
    """A step that is added to the package must be added to the roles that pass it."""
    steps = {moment.partition(" ")[2] for _, moment, _ in moments()}
    assert steps == set(armed("dict(crashpoints.STEPS)"))
