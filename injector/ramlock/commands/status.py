"""`ramlock status`: show what is guaranteed and what is locked."""
# SPDX-License-Identifier: GPL-2.0-or-later

import sys
from pathlib import Path

import click

from ramlock.api import VM
from ramlock.commands.common import emit, emit_state, json_option, selector, vm_options, warn
from ramlock.reply import Guarantee, State
from ramlock.sizes import format_size

_COLORS = {State.IDLE: "green", State.SHORT: "red", State.WAITING: "yellow"}
_BAR = 30


@click.command()
@vm_options
@json_option
def command(pid: int | None, vm: str | None, socket: Path | None, as_json: bool) -> None:
    """Show what is guaranteed and what is locked.

    Examples:

    \b
    For people, and for scripts:
      ramlock status --vm web
      ramlock status --pid 4711 --json | jq .locked

    "locked" is what the shim holds locked and has seen in memory. "armed" locks itself when the guest touches it.
    "foreign" was locked by someone else (mem-lock=on, device assignment) and is never released by ramlock.
    """
    with VM(selector(pid, vm, socket)).session() as session:
        found = session.vm
        now = session.ask(warn)
        if as_json:
            emit_state(found, now.raw)
        else:
            uuid = [] if found.uuid is None else [f"  {'uuid':<13} {found.uuid}"]
            emit("\n".join([click.style(found.label, bold=True), *uuid, *lines(now)]))


def lines(now: Guarantee) -> list[str]:
    """Say `now` for people."""
    rows = [
        ("guarantee", f"{format_size(now.requested)}{' (all)' if now.all else ''} of {format_size(now.ram)} guest RAM"),
        ("locked", f"{format_size(now.locked)}{_bar(now.locked, now.requested)}"),
    ]
    if now.armed != now.locked:
        rows.append(("armed", f"{format_size(now.armed)}{_bar(now.armed, now.requested)}"))
    if now.foreign:
        rows.append(("foreign", format_size(now.foreign)))
    rows.append(("state", click.style(_state(now), fg=_COLORS.get(now.state, "cyan"))))
    if now.launch_error is not None:
        rows.append(("at launch", click.style(f"not set: {now.launch_error}", fg="red")))
    rows.append(("order", f"{now.order or 'resident'}, {'prefault' if now.prefault else 'on fault'}"))
    if now.memlock_limit is not None:
        rows.append(("limit", f"{format_size(now.memlock_limit)} (RLIMIT_MEMLOCK)"))
    if now.step_max_us:
        budget = "" if now.hold_budget is None else f", {now.hold_budget / 1000:.1f} ms aimed at"
        rows.append(("longest step", f"{now.step_max_us / 1000:.1f} ms{budget}"))
    result = [f"  {name:<13} {value}" for name, value in rows]
    if now.blocks:
        table = [("block", "size", "locked", "pages", "backing")]
        table += [
            (block.id, format_size(block.size), format_size(block.locked), format_size(block.page_size), block.backing)
            for block in now.blocks
        ]
        widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
        result.append("")
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            result.append(f"  {'  '.join(cells)}".rstrip())
    return result


def _state(now: Guarantee) -> str:
    if now.why is not None:
        return f"{now.state.value}: {now.why.desc or now.why.reason}"
    if now.state in (State.LOCKING, State.UNLOCKING):
        rate = f" at {format_size(now.rate)}/s" if now.rate else ""
        left = f", {now.eta_s} s left" if now.eta_s is not None else ""
        return f"{now.state.value}{rate}{left}"
    if now.state is State.IDLE:
        return "idle: held" if now.requested else "idle: nothing guaranteed"
    return str(now.state.value)


def _bar(part: int, whole: int) -> str:
    if whole == 0:
        return ""
    share = min(part / whole, 1.0)
    full, empty = _marks()
    # Rounded down, so that 100 % means all of it.
    filled = (full * int(share * _BAR)).ljust(_BAR, empty)
    return f"  {filled} {int(share * 100)} %"


def _marks() -> tuple[str, str]:
    """What a bar is drawn with: blocks where stdout can say them."""
    try:
        "█░".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "#", "."
    return "█", "░"
