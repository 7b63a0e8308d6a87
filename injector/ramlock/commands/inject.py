"""`ramlock inject`: bring the shim into a VM that runs already."""
# SPDX-License-Identifier: GPL-2.0-or-later

from typing import Any

import click

from ramlock import __version__, guarantee, vms
from ramlock.api import VM
from ramlock.commands.common import (
    emit,
    emit_json,
    follow_discards_option,
    force_option,
    lock_options,
    monitor_option,
    one_vm_options,
    read_size,
    seconds_option,
    which_vm,
)
from ramlock.deadline import Deadline
from ramlock.errors import NoMonitor, Refused, Short, TimedOut
from ramlock.sizes import Size, format_size


def _list_steps(ctx: click.Context, param: click.Parameter, value: bool) -> None:
    if value:
        from ramlock.teststeps import STEPS

        emit("\n".join(STEPS))
        ctx.exit()


@click.command()
@one_vm_options
@click.option("--guarantee", "size", callback=read_size, metavar="SIZE", help="Guest RAM to guarantee then.")
@click.option("--socket", metavar="PATH", help="Where the shim listens, as the VM's process sees it.")
@click.option("--allow-uid", type=click.IntRange(0, 2**32 - 2), metavar="UID", help="Another user who may set it.")
@lock_options
@follow_discards_option
@monitor_option
@click.option("--wait/--no-wait", default=True, help="Wait until the guarantee is locked (default), or return at once.")
@seconds_option("--timeout", "How long to wait for QEMU's main thread to be idle, each time; not for --guarantee.", 2.0)
@click.option(
    "--allow-seccomp",
    is_flag=True,
    help="Also under a seccomp filter that is not QEMU's own; one that forbids what the shim does kills the VM.",
)
@click.option(
    "--allow-probable",
    is_flag=True,
    help="Also where guest RAM is only a guess (see ramlock locate), which may lock other memory of QEMU's.",
)
@force_option
@click.option("--upgrade", is_flag=True, help="Replace a shim of another version; what is locked stays locked.")
@click.option("--json", "as_json", is_flag=True, help="Print what was done as JSON; times in µs.")
@click.option("--list-steps", is_flag=True, hidden=True, is_eager=True, expose_value=False, callback=_list_steps)
def command(
    pid: int | None,
    vm: str | None,
    size: Size | None,
    socket: str | None,
    allow_uid: int | None,
    order: str | None,
    prefault: bool | None,
    hold_budget: int | None,
    threads: int | None,
    host_reserve: int | None,
    follow_discards: bool,
    monitor: bool,
    wait: bool,
    timeout: float,
    allow_seccomp: bool,
    allow_probable: bool,
    force: bool,
    upgrade: bool,
    as_json: bool,
) -> None:
    """Bring the shim into a VM that runs already.

    QEMU's main thread is away for about a millisecond; its vCPUs are never stopped. If the shim is there already, it is
    used as it is, and told to follow discards if that is asked for.

    Examples:

    \b
    Then ramlock set and status work as on a VM started by ramlock run:
      ramlock inject --vm web
    With half of its RAM guaranteed at once:
      ramlock inject --pid 4711 --guarantee 50%
    What would stand in the way; where guest RAM is; how to take it out again:
      ramlock preflight --vm web
      ramlock locate --vm web
      ramlock eject --vm web
    """
    from ramlock import install  # takes libraries that --help need not

    machine = VM.find(which_vm(pid, vm))
    options = install.Options(
        socket,
        allow_uid,
        timeout,
        upgrade,
        allow_seccomp=allow_seccomp,
        allow_probable=allow_probable,
        follow_discards=follow_discards,
        monitor=monitor,
    )
    with machine.injected(options) as (session, outcome):
        now: Any = None
        failed: Short | TimedOut | None = None
        offered = _offer_monitor(session.vm) if monitor else None
        if size is not None:
            from ramlock.commands.set import place_and_follow

            if outcome.source == "none":  # what could not be held against what is seen from outside is not locked
                raise Refused(
                    "the shim is in the VM, but its guest RAM is not known yet; nothing was locked",
                    "try again when the VM has started",
                )
            wish = guarantee.Wish(size, order, prefault, hold_budget, threads, host_reserve)
            try:
                now = place_and_follow(
                    session, wish, Deadline(None), wait=wait, patient=False, force=force, vouched=True
                )
            except (Short, TimedOut) as error:  # the shim is in all the same, and so is the guarantee
                now, failed = error.guarantee, error
        if as_json:
            extra: dict[str, Any] = {} if offered is None else {"monitor": offered is True}
            if now is not None:
                extra["guarantee"] = now.raw
            emit_json(_json(outcome) | extra)
            if failed is not None:
                raise failed
            _require(offered)
            return
        emit(f"{session.label}: {_words(outcome)}")
        emit(f"socket: {outcome.socket}")
        if outcome.follows:
            emit("what the guest gives back is given to the host")
        if outcome.unadopted is not None:
            emit(f"locked by a former shim and not taken over: {outcome.unadopted}")
        if now is not None:
            emit(f"guarantee: {format_size(now.requested)}, {format_size(now.locked)} locked")
        if failed is not None:
            raise failed
        _require(offered)
        if offered is not None:
            when = "offers the commands" if offered else "will offer the commands when the VM has been set up"
            emit(f"QEMU's monitor: {when}")


def _offer_monitor(vm: vms.Vm) -> bool | NoMonitor:
    """Have QEMU's monitor offer the commands; that it cannot is told when all else is done."""
    from ramlock.monitor import offer

    try:
        return offer(vm)
    except NoMonitor as error:
        return error


def _require(offered: bool | NoMonitor | None) -> None:
    if isinstance(offered, NoMonitor):
        raise offered


def _json(outcome: Any) -> dict[str, Any]:
    stopped = outcome.stopped_us
    result = {
        "socket": outcome.socket,
        "already": outcome.already,
        "version": outcome.version,
        "source": outcome.source,
        "attempts": outcome.attempts,
        "stopped-us": None if stopped is None else round(stopped, 1),
        "traced-us": round(outcome.traced_us, 1),
    }
    if outcome.follows:
        result["follow-discards"] = True
    if outcome.replaced is not None:
        result["replaced"] = outcome.replaced
    if outcome.unadopted is not None:
        result["unadopted"] = outcome.unadopted
    return result


def _words(outcome: Any) -> str:
    if outcome.already:
        other = "" if outcome.version == __version__ else f"; this is ramlock {__version__}, replace it with --upgrade"
        return f"ramlock {outcome.version} is in it already{other}"
    took = "" if outcome.stopped_us is None else f"; QEMU's main thread was away for {outcome.stopped_us / 1000:.2f} ms"
    former = f", in place of {outcome.replaced}" if outcome.replaced else ""
    return f"ramlock {outcome.version} is in it now{former}{took}"
