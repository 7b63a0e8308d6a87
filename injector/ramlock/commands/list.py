"""`ramlock list`: show every VM on this host."""
# SPDX-License-Identifier: GPL-2.0-or-later

import json
from typing import Any

import click

from ramlock import survey
from ramlock.api import VM
from ramlock.commands.common import answer_time_option, emit
from ramlock.reply import State
from ramlock.sizes import format_size
from ramlock.survey import Seen
from ramlock.text import printable

_COLORS = {State.IDLE: "green", State.SHORT: "red", State.WAITING: "yellow"}
_HEAD = ("pid", "name", "guest RAM", "resident", "swapped", "guarantee", "locked", "state")
_NAME_MOST = 40


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print an array of objects; sizes in bytes, null where unknown.")
@answer_time_option(survey.TIME)
def command(as_json: bool, timeout: float) -> None:
    """Show every VM on this host.

    Examples:

    \b
    Those with a shim and those without:
      ramlock list
    Whose guarantee is not held in full, by name:
      ramlock list --json | jq -r '.[] | select(.state == "short") | .name'

    Every QEMU is listed that this user may see. "resident" and "swapped" are of the whole process, QEMU's own memory
    included.
    """
    everyone = VM.survey(timeout)
    if as_json:
        emit(json.dumps([facts(seen) for seen in everyone]))
    elif everyone:
        emit("\n".join(_table(everyone)))
    else:
        click.echo("no QEMU is running that this user can see", err=True)


def facts(seen: Seen) -> dict[str, Any]:
    """Return what --json says of a VM."""
    now = seen.guarantee
    return {
        "pid": seen.pid,
        "name": seen.name,
        "uuid": seen.uuid,
        "ram": seen.ram,
        "resident": seen.resident,
        "swapped": seen.swapped,
        "shim": seen.shim,
        "requested": now.requested if now else None,
        "locked": now.locked if now else None,
        "state": now.state.value if now else None,
        "problem": seen.problem,
    }


def _table(everyone: list[Seen]) -> list[str]:
    from rich.cells import cell_len  # takes what --help need not

    rows = [_HEAD, *(_row(seen) for seen in everyone)]
    widths = [max(cell_len(row[column]) for row in rows) for column in range(len(_HEAD))]
    lines = []
    for row, seen in zip(rows, [None, *everyone], strict=True):
        cells = []
        for column, cell in enumerate(row[:-1]):
            fill = " " * (widths[column] - cell_len(cell))
            cells.append(cell + fill if column == 1 else fill + cell)
        lines.append("  ".join([*cells, _colored(row[-1], seen)]))
    lines[0] = click.style(lines[0], bold=True)
    return lines


def _row(seen: Seen) -> tuple[str, ...]:
    now = seen.guarantee
    requested = "-" if now is None else format_size(now.requested) + (" (all)" if now.all else "")
    return (
        str(seen.pid),
        printable(seen.name or "-", _NAME_MOST),
        _size(seen.ram),
        _size(seen.resident),
        _size(seen.swapped),
        requested,
        _size(now.locked if now else None),
        state(seen),
    )


def state(seen: Seen) -> str:
    """Say in a word or two how it is with a VM."""
    if seen.guarantee is not None:
        why = f": {seen.guarantee.why.reason}" if seen.guarantee.why else ""
        return f"{seen.guarantee.state.value}{why}"
    return seen.problem or ("no shim" if seen.shim is False else "unknown")


def _colored(text: str, seen: Seen | None) -> str:
    if seen is None or seen.shim is False:
        return text
    return click.style(text, fg=_COLORS.get(seen.guarantee.state, "cyan") if seen.guarantee else "red")


def _size(value: int | None) -> str:
    return "-" if value is None else format_size(value)
