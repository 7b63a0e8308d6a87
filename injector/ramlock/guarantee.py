"""Set a guarantee over a session and follow it until it is reached.

Theory of operation: the shim's events say when something changed, its reply to query-ram-minguarantee says what is
true. So an event is never believed to be the end: it only makes us ask. The query also tells, by its generation,
whether the guarantee is still ours.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from ramlock import host, procfs, reply
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import (
    CommandError,
    LimitTooLow,
    NoAnswer,
    NoPermission,
    NotFound,
    NotOurs,
    Refused,
    Short,
    Superseded,
    TimedOut,
)
from ramlock.reply import Guarantee, State
from ramlock.sizes import Size, format_apart, format_size
from ramlock.teststeps import step

ANSWER_TIME = 10.0
"""Seconds that a shim has to answer a command."""
START_TIME = 30.0
"""Seconds that guest RAM may take to become known when the caller sets no time limit."""
STALL_TIME = 120.0
"""Seconds without any progress after which locking is given up on when the caller sets no time limit."""
_TELL_TIME = 2.0
"""Seconds that the shim has to know what it was told."""
_POLL = 1.0
_START_POLL = 0.1
LAST_LOOK = 1.0
"""Seconds for one more query after the deadline, to say what was reached."""


Tell = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Wish:
    """What the user asked for; None leaves a setting as it is."""

    size: Size
    order: str | None = None
    prefault: bool | None = None
    hold_budget: int | None = None
    """Microseconds."""
    threads: int | None = None
    host_reserve: int | None = None
    """Bytes; 0 for the default."""

    def arguments(self, ram: int) -> dict[str, Any]:
        """Return the arguments of set_ram_minguarantee; a percentage is resolved once, here."""
        arguments: dict[str, Any] = {"all": True} if self.size.kind == "all" else {"size": self.size.resolve(ram)}
        if self.order is not None:
            arguments["order"] = self.order
        if self.prefault is not None:
            arguments["prefault"] = self.prefault
        if self.hold_budget is not None:
            arguments["hold-budget"] = self.hold_budget
        if self.threads is not None:
            arguments["threads"] = self.threads
        if self.host_reserve is not None:
            arguments["host-reserve"] = self.host_reserve
        return arguments


def query(client: Client, deadline: Deadline | None = None) -> Guarantee:
    """Ask for the state of the guarantee. Raises ControlError and CommandError."""
    deadline = deadline or Deadline(None)
    return reply.parse(client.execute("query-ram-minguarantee", deadline=deadline.within(ANSWER_TIME)))


class Admission(Protocol):
    """What is done around setting a guarantee, by whoever knows more of the host than the VM does."""

    def check(self, now: Guarantee) -> None:
        """Raise Refused when the guarantee cannot be held, given the state `now` before it is set."""

    def inform(self, client: Client) -> None:
        """Tell the shim what it cannot see; called again and again while the guarantee is followed."""


def place(
    client: Client,
    wish: Wish,
    *,
    pid: int | None,
    deadline: Deadline,
    vouched: bool = False,
    tell: Tell | None = None,
    admission: Admission | None = None,
) -> Guarantee:
    """Set the guarantee of the VM whose QEMU is `pid`; return its state right after.

    `vouched` is whether the caller named that process: one that is only found behind a socket gets no higher limit
    unless it looks like QEMU.

    Where the shim has to be told where guest RAM is, `tell` does so.
    Waits while guest RAM is not known yet. Raises Refused (LimitTooLow) and NoPermission when nothing was changed,
    NotOurs when such a process needs a higher limit, Superseded when someone else set another one in the same moment,
    TimedOut when it is set and nothing more is known,
    NoAnswer when the shim did not answer in time.
    """
    started = deadline.within(START_TIME)
    while True:
        before = _known(client, started, tell)
        tell = None
        if admission is not None:
            admission.check(before)
            admission.inform(client)
        arguments = wish.arguments(before.ram)
        may_raise = _raise_limit(before, wish, pid, vouched)
        try:
            step("set-guarantee")
            client.execute("set_ram_minguarantee", arguments, deadline=deadline.within(ANSWER_TIME))
        except CommandError as error:
            if error.reason == "waiting" and started.remaining > 2 * _START_POLL:
                time.sleep(_START_POLL)
                continue
            raise _refusal(error, before, wish, may_raise) from error
        try:
            after = query(client, deadline)
        except NoAnswer:
            if not deadline.expired:
                raise
            raise TimedOut(
                "the guarantee is set; how much of it is reached was not answered in time",
                "see how far it is with ramlock status",
            ) from None
        if after.generation > before.generation + 1 and not _matches(after, arguments):
            raise _superseded(after)
        return after


def follow(
    client: Client,
    placed: Guarantee,
    *,
    deadline: Deadline,
    patient: bool,
    show: Callable[[int, int], None],
    admission: Admission | None = None,
) -> Guarantee:
    """Wait until the guarantee `placed` is reached; `show` is told the bytes held and the bytes requested.

    With `patient` a shortage is waited out until the deadline. Raises Short, TimedOut (the guarantee stays set in both
    cases) and Superseded.
    """
    now = placed
    stalled = Deadline(STALL_TIME)
    while True:
        if now.generation != placed.generation:
            raise _superseded(now)
        show(now.held, now.requested)
        if now.state is State.IDLE:
            return now
        if now.state is State.SHORT and (deadline.expired or not patient):
            raise short(now)
        if deadline.expired:
            raise _timed_out(now, "in time")
        if stalled.expired and not patient:
            raise _timed_out(now, f"and nothing has changed for {STALL_TIME:.0f} s")
        if admission is not None:
            admission.inform(client)
        _wait_for_news(client, now, deadline.within(_POLL), show)
        try:
            latest = query(client, Deadline(LAST_LOOK) if deadline.expired else deadline)
        except NoAnswer:
            if deadline.expired:
                raise _timed_out(now, "in time") from None
            raise
        if latest.held != now.held:
            stalled = Deadline(STALL_TIME)
        now = latest


def short(now: Guarantee) -> Short:
    """Return the error that says why `now` is short."""
    desc = f": {now.why.desc or now.why.reason}" if now.why else ""
    held, requested = format_apart(now.held, now.requested)
    error = Short(
        f"{held} of {requested} can be locked now{desc}",
        _SHORT_HINTS.get(now.why.reason if now.why else "", "the guarantee stays set; see ramlock status"),
    )
    error.guarantee = now
    return error


_SHORT_HINTS = {
    "rlimit": "it stays set; raise RLIMIT_MEMLOCK of QEMU (prlimit --memlock) or ask for less",
    "cgroup": "it stays set; raise the memory limit of QEMU's cgroup or ask for less",
    "host-memory": "it stays set; free memory on the host or ask for less",
    "numa-node": "it stays set; free memory of the node that the VM's memory is bound to, or ask for less",
    "map-count": "it stays set; raise vm.max_map_count or ask for less",
    "no-ram": "this VM has no guest RAM",
}


def _wait_for_news(client: Client, now: Guarantee, until: Deadline, show: Callable[[int, int], None]) -> None:
    """Return after an event that is worth a query, or at `until`; show progress events on the way."""
    while (event := client.event(until)) is not None:
        if event.name != "RAM_MINGUARANTEE_PROGRESS":
            return
        held = event.data.get("locked" if now.prefault else "armed")
        requested = event.data.get("requested")
        if isinstance(held, int) and isinstance(requested, int):
            show(held, requested)


def _known(client: Client, deadline: Deadline, tell: Tell | None) -> Guarantee:
    """Query until guest RAM is known. Raises Refused when that does not come, NoAnswer when no answer does."""
    now = query(client, deadline)
    patience = Deadline(0)
    if now.told and tell is not None:
        tell()
        patience = deadline.within(_TELL_TIME)
        now = query(client, deadline)
    while now.state is State.WAITING:
        reason = now.why.reason if now.why else "starting"
        if reason == "no-symbols" and tell is not None and not patience.expired:
            tell()  # what it took may have changed under its eyes
        elif reason == "no-symbols":
            raise Refused(
                "this QEMU does not export its symbols, and nobody has told the shim where its guest RAM is",
                "run ramlock set or status with --pid, as root or as the user who started the VM",
            )
        # With nothing left for the next answer this one is the last.
        if deadline.remaining <= 2 * _START_POLL:
            raise Refused(
                "the VM is still starting, its guest RAM is not known yet; nothing was changed",
                "try again in a moment",
            )
        time.sleep(_START_POLL)
        now = query(client, deadline)
    return now


def _raise_limit(before: Guarantee, wish: Wish, pid: int | None, vouched: bool) -> bool:
    """Raise QEMU's RLIMIT_MEMLOCK when the wish needs it; tell whether our rights sufficed.

    From outside, because QEMU's sandbox forbids it inside. Raises NotOurs when it would be a stranger's.
    """
    step("set-limit")
    if before.memlock_limit is None or pid is None:
        return True
    if wish.size.resolve(before.ram) > before.ram:
        return True  # the shim will refuse that, and then nothing shall be touched
    try:
        process = procfs.read(pid)
        need = limit_needed(before, wish, process.locked, vfio=host.has_vfio(pid))
        if need is not None and need <= before.memlock_limit:
            return True
        if not vouched and not procfs.looks_like_qemu(process.exe, process.cmdline):
            raise NotOurs(
                f"process {pid}, which serves that socket, does not look like QEMU; its locked-memory limit stays",
                f"if it is the VM, say so with --pid {pid}",
            )
        reached = host.raise_memlock(pid, need)
    except NotOurs:
        raise
    except (PermissionError, ProcessLookupError, NotFound):
        return False
    return reached is None or (need is not None and reached >= need)


def limit_needed(before: Guarantee, wish: Wish, locked: int, *, vfio: bool = False) -> int | None:
    """Return the bytes of RLIMIT_MEMLOCK that the wish needs, None for no limit; `locked` is the process's VmLck.

    `all` also has to hold for memory that is plugged in later, so it takes the limit away; any other wish gets what it
    needs and no more. A hostile VM shall not talk us into more by its reply: the kernel's figures bound what it says.
    With `vfio` it has devices of the host, which may pin all of guest RAM at any time, and a little more.
    """
    if wish.size.kind == "all":
        return None
    total = host.total_memory()
    others = min(before.foreign, locked)
    slack = min(before.ram, total) + host.VFIO_SLACK if vfio else 0
    return min(wish.size.resolve(before.ram) + others + host.SLACK, total) + max(slack - others, 0)


def _refusal(error: CommandError, before: Guarantee, wish: Wish, may_raise: bool) -> Refused | NoPermission:
    """Turn the shim's refusal into what the user can act upon; in every case the former guarantee is intact."""
    size = wish.size.resolve(before.ram)
    said = "" if wish.size.kind == "bytes" else f" ({wish.size})"
    if error.reason == "range":
        asked, ram = format_apart(size, before.ram)
        return Refused(f"{asked}{said} is more than the guest RAM of {ram}", "ask for less, or say all")
    if error.reason == "no-ram":
        return Refused("this VM has no guest RAM that could be locked", "give the VM memory (-m)")
    if error.reason == "waiting":
        return Refused("the VM is still starting, its guest RAM is not known yet", "try again in a moment")
    if error.reason == "rlimit":
        asked, limit = format_apart(size, before.memlock_limit or 0)
        of = "" if before.memlock_limit is None else f" of {limit}"
        what = f"{asked}{said} is more than QEMU's locked-memory limit{of} allows"
        # To a root without CAP_SYS_RESOURCE there is no better user to send to.
        if not may_raise and os.geteuid() != 0:
            return NoPermission(what + ", and this user may not raise it", "run ramlock set as root")
        return LimitTooLow(what, "raise RLIMIT_MEMLOCK before QEMU starts (ulimit -l, LimitMEMLOCK=), or ask for less")
    return Refused(error.message, error.hint)


def _matches(now: Guarantee, arguments: dict[str, Any]) -> bool:
    if arguments.get("all"):
        return now.all
    return not now.all and now.requested == arguments["size"]


def _superseded(now: Guarantee) -> Superseded:
    return Superseded(
        f"someone else has set the guarantee to {format_size(now.requested)} meanwhile",
        "theirs is in force; agree with them, then set it again",
    )


def _timed_out(now: Guarantee, how: str) -> TimedOut:
    held, requested = format_apart(now.held, now.requested)
    error = TimedOut(
        f"{held} of {requested} reached {how}; the guarantee stays set",
        "see how far it is with ramlock status",
    )
    error.guarantee = now
    return error
