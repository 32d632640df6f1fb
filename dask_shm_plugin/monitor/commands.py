"""The command line: ``dask shm list``, ``show``, ``top``, ``purge`` and ``doctor``.

The commands need no scheduler. They read the arenas of this user on this machine, and change nothing but ``purge``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable

import click

from dask_shm_plugin.exceptions import SharedMemoryError
from dask_shm_plugin.monitor import text
from dask_shm_plugin.monitor.seen import Snapshot

# ``dask`` imports this module for each of its commands, on every system: the rest is imported when it is needed.

_as_json = click.option("--json", "is_json", is_flag=True, help="Print everything as JSON.")


@click.group()
def shm() -> None:
    """Look at the shared memory of Dask clusters on this machine."""
    if not sys.platform.startswith("linux"):
        raise click.ClickException(f"shared memory needs Linux, this is {sys.platform}")


@shm.command("list")
@_as_json
def list_arenas(is_json: bool) -> None:
    """List all arenas of this user."""
    found = _chosen(None)
    if is_json:
        click.echo(text.as_json([one.to_json() for one in found]))
    else:
        _print(text.arenas(found) if found else ["no arenas"])


@shm.command()
@click.argument("arena", required=False)
@click.option(
    "--by", "order", type=click.Choice(["size", "age"]), default="size", help="Largest or oldest blocks first."
)
@click.option("--limit", default=100, show_default=True, help="Print at most so many blocks of an arena.")
@_as_json
def show(arena: str | None, order: str, limit: int, is_json: bool) -> None:
    """Show the members and blocks of ARENA (the first digits of its id), or of all arenas."""
    found = _chosen(arena)
    if not found:
        raise click.ClickException(f"there is no arena {arena}" if arena else "there are no arenas of this user")
    if is_json:
        click.echo(text.as_json([one.to_json() for one in found]))
        return
    for one in found:
        _print([*text.arena(one, order, limit), ""])


@shm.command()
@click.option("--interval", default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--count", default=0, help="Stop after so many looks; 0 means never.")
def top(interval: float, count: int) -> None:
    """Watch arenas and their largest blocks; s sorts by size, a by age, h by holders, q quits."""
    from dask_shm_plugin.monitor.top import watch

    watch(interval, count)


@shm.command()
@click.option("--dry-run", "is_trial", is_flag=True, help="Say what would be removed, and remove nothing.")
def purge(is_trial: bool) -> None:
    """Remove the files in /dev/shm that dead processes of this user have left."""
    from dask_shm_plugin.node import rendezvous

    did = "would be removed" if is_trial else "removed"
    try:
        names = rendezvous.purge(is_trial=is_trial)
    except SharedMemoryError as error:
        raise click.ClickException(str(error)) from error
    _print([f"/dev/shm{name}: no process attends it; {did}" for name in names] or ["the dead have left nothing"])


@shm.command()
@_as_json
def doctor(is_json: bool) -> None:
    """Check this machine, and measure the gain that sharing brings here; status 1 if sharing would be off."""
    from dask_shm_plugin.monitor import doctor

    findings = doctor.examine()
    if is_json:
        click.echo(text.as_json([finding._asdict() for finding in findings]))
    else:
        _print(doctor.report(findings))
    if any(finding.verdict == doctor.OFF for finding in findings):
        sys.exit(1)


def _chosen(arena: str | None) -> list[Snapshot]:
    """Return the snapshots of the arenas whose id begins so, with their large pages."""
    from dask_shm_plugin.monitor.arenas import snapshots

    return [one for one in snapshots(measure_large=True) if one.arena.startswith(arena or "")]


def _print(lines: Iterable[str]) -> None:
    click.echo("\n".join(lines))
