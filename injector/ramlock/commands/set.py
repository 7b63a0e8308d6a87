"""`ramlock set`: set how much guest RAM is guaranteed, and wait until it is."""
# SPDX-License-Identifier: GPL-2.0-or-later

import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import click

from ramlock import guarantee
from ramlock.api import VM, Session, Show
from ramlock.commands.common import (
    emit,
    emit_state,
    force_option,
    json_option,
    lock_options,
    read_size,
    seconds_option,
    selector,
    vm_options,
    warn,
)
from ramlock.deadline import Deadline
from ramlock.errors import ControlError, Interrupted, Short, TimedOut
from ramlock.reply import Guarantee
from ramlock.sizes import Size, format_size


@click.command()
@click.argument("size", callback=read_size, metavar="SIZE")
@vm_options
@lock_options
@click.option("--wait/--no-wait", default=True, help="Wait until it is locked (default), or return at once.")
@seconds_option("--timeout", "Wait no longer than this, and also wait out a shortage.")
@force_option
@json_option
def command(
    size: Size,
    pid: int | None,
    vm: str | None,
    socket: Path | None,
    order: str | None,
    prefault: bool | None,
    hold_budget: int | None,
    threads: int | None,
    host_reserve: int | None,
    wait: bool,
    timeout: float | None,
    force: bool,
    as_json: bool,
) -> None:
    """Set how much guest RAM is guaranteed.

    Examples:

    \b
    Raise it, and see it happen:
      ramlock set 3G --vm web
    Half of guest RAM, as it is now; all of it, also what is plugged in later:
      ramlock set 50% --vm web
      ramlock set all --pid 4711
    From a script, with a minute of patience, also for memory that is short just now:
      ramlock set 3G --vm web --timeout 60 --json
    Though it does not seem to fit; it still stops short of what would get the VM killed:
      ramlock set 3G --vm web --force
    Let go of everything:
      ramlock set 0 --vm web

    The guarantee belongs to the VM: Ctrl-C ends the waiting, not the guarantee. Several `set` at once: the last wins,
    also in mid-flight.
    """
    machine = VM(selector(pid, vm, socket))
    deadline = Deadline(timeout)
    patience = guarantee.START_TIME if timeout is None else timeout
    with machine.session(patience=patience, deadline=deadline) as session:
        now = place_and_follow(
            session,
            guarantee.Wish(size, order, prefault, hold_budget, threads, host_reserve),
            deadline,
            wait=wait,
            patient=timeout is not None,
            force=force,
            as_json=as_json,
            vouched=socket is None,
        )
        try:
            if as_json:
                emit_state(session.vm, now.raw)
            else:
                emit(f"{session.label}: {format_size(now.requested)} guaranteed, {format_size(now.locked)} locked")
        except KeyboardInterrupt:
            raise _left(now) from None


def place_and_follow(
    session: Session,
    wish: guarantee.Wish,
    deadline: Deadline,
    *,
    wait: bool,
    patient: bool,
    force: bool = False,
    as_json: bool = False,
    vouched: bool = True,
) -> Guarantee:
    """Set the guarantee and, with `wait`, follow it to its end. Raises what guarantee.place() and follow() raise.

    With `force` it is tried also when it does not seem to fit. With `as_json` the state is also printed when the
    guarantee is not reached; `vouched` as for guarantee.place().
    """
    try:
        placed = session.place(wish, deadline, force=force, patient=patient, followed=wait, warn=warn, vouched=vouched)
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted while the guarantee was being set", "see with ramlock status whether it was"
        ) from None
    if not wait:
        return placed
    try:
        with _progress(session.label, placed) as show:
            return session.follow(placed, deadline, patient=patient, show=show)
    except KeyboardInterrupt:
        raise _left(placed) from None
    except (Short, TimedOut):
        if as_json:
            with suppress(ControlError):
                last = guarantee.query(session.vm.client, Deadline(guarantee.LAST_LOOK))
                emit_state(session.vm, last.raw)
        raise


def _left(placed: Guarantee) -> Interrupted:
    return Interrupted(
        f"interrupted; the guarantee is set and stays at {format_size(placed.requested)}",
        "watch it with ramlock status, or set another one",
    )


@contextmanager
def _progress(label: str, placed: Guarantee) -> Iterator[Show]:
    """Show a bar on stderr when that is a terminal."""
    if not sys.stderr.isatty():
        yield lambda held, requested: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    start = placed.held
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TextColumn("{task.fields[sizes]}", markup=False),
        TimeElapsedColumn(),
    )
    # Drawn when there is news, by this thread: a thread that redraws would only take time from the guest.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as bar:
        task = bar.add_task(label, total=max(abs(placed.requested - start), 1), sizes="")

        def show(held: int, requested: int) -> None:
            sizes = f"{format_size(held)} of {format_size(requested)}"
            bar.update(task, completed=abs(held - start), sizes=sizes)
            bar.refresh()

        yield show
