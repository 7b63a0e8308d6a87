"""The screen of `ramlock watch`: a line with a bar for each VM, and the latest events."""
# SPDX-License-Identifier: GPL-2.0-or-later

import errno
import time
from collections import deque
from typing import NamedTuple

from rich.cells import cell_len, set_cell_size
from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from ramlock import host
from ramlock.commands.list import state
from ramlock.reply import State
from ramlock.survey import Seen

__all__ = ["Screen", "bar", "short", "state"]

_NAME, _STATE, _SIZE = 16, 12, 6
_SIZES = ("RAM", "asked", "locked", "in mem", "swap")
_BAR_LEAST = 6
_EVENTS_MOST = 6
_COLORS = {State.IDLE: "green", State.SHORT: "red", State.WAITING: "yellow"}
_UNITS = ((1 << 40, "T"), (1 << 30, "G"), (1 << 20, "M"), (1 << 10, "K"))


class Mark(NamedTuple):
    """What a part of a bar is drawn with."""

    char: str
    ascii: str
    style: str
    meaning: str


MARKS = (
    Mark("█", "#", "green", "locked"),
    Mark("▒", "+", "yellow", "asked, not locked"),
    Mark("░", ":", "cyan", "in memory"),
    Mark("▚", "s", "red", "swapped"),
    Mark("·", ".", "dim", "not in memory"),
)


class Screen:
    """Draws on the alternate screen; close() leaves the terminal as it was."""

    def __init__(self, console: Console | None = None) -> None:
        """`console` is stdout when it is None."""
        self._console = console or Console()
        self._live: Live | None = None

    def open(self) -> None:
        """Take the terminal: other screen, no cursor."""
        self._live = Live(console=self._console, screen=True, auto_refresh=False, redirect_stdout=False)
        self._live.start()

    def close(self) -> None:
        """Give it back."""
        live, self._live = self._live, None
        if live is not None:
            live.stop()

    def draw(self, everyone: list[Seen], events: "deque[tuple[float, str]]") -> None:
        """Draw all of it anew. Raises OSError when the terminal has gone."""
        if self._live is None:
            return
        if not self._console.is_terminal:  # nothing would be drawn any more, without a word
            raise OSError(errno.EIO, "the terminal has gone")
        width, height = self._console.size
        lines = self.lines(everyone, events, width, height)
        self._live.update(Group(*lines), refresh=True)

    def lines(self, everyone: list[Seen], events: "deque[tuple[float, str]]", width: int, height: int) -> list[Text]:
        """Return at most `height` lines of at most `width` cells. VMs that are not as they should be come first."""
        told = list(events)[-min(_EVENTS_MOST, max(height // 4, 1)) :]
        space = max(height - 4 - len(told), 1)
        ordered = sorted(everyone, key=lambda vm: (_calm(vm), vm.name or "", vm.pid))
        if len(ordered) > space:
            ordered = ordered[: space - 1]
        columns = max(width - _NAME - _STATE - 2, 0)
        shown = _SIZES[: max(min((columns - _BAR_LEAST - 1) // (_SIZE + 1), len(_SIZES)), 0)]
        room = max(columns - len(shown) * (_SIZE + 1) - 1, 0)
        lines = [self._title(everyone), self._head(shown, room)]
        lines += [self._row(vm, shown, room) for vm in ordered]
        if len(ordered) < len(everyone):
            lines.append(Text(f"and {len(everyone) - len(ordered)} more", style="dim"))
        if not everyone:
            lines.append(Text("no VM is running that this user can see", style="dim"))
        lines.append(self._legend())
        lines += [Text(f"{time.strftime('%H:%M:%S', time.localtime(when))} {text}") for when, text in told]
        for line in lines:
            line.no_wrap = True
            line.truncate(width, overflow="ellipsis")
        return lines[:height]

    def _title(self, everyone: list[Seen]) -> Text:
        facts = host.memory()
        locked = sum(vm.process.locked for vm in everyone if vm.process)
        text = f"ramlock  {time.strftime('%H:%M:%S')}  {len(everyone)} VMs, {short(locked)} locked"
        if facts:
            text += f", {short(facts.available)} of {short(facts.total)} memory available"
            text += f", {short(facts.swap_total - facts.swap_free)} swap used"
        return Text(text, style="bold")

    def _head(self, shown: tuple[str, ...], room: int) -> Text:
        sizes = "".join(f" {name:>{_SIZE}}" for name in shown)
        return Text(f"{'VM':<{_NAME}} {'state':<{_STATE}}{sizes} {'guest RAM' if room > 8 else ''}", style="dim")

    def _row(self, vm: Seen, shown: tuple[str, ...], room: int) -> Text:
        now = vm.guarantee
        name = vm.name or f"pid {vm.pid}"
        if cell_len(name) > _NAME:
            name = set_cell_size(name, _NAME - 1) + ("~" if self._ascii else "…")
        style = (_COLORS.get(now.state, "cyan") if now else "red") if vm.shim is not False else "dim"
        figures = (vm.ram, now and now.requested, now and now.locked, vm.resident, vm.swapped)
        sizes = "".join(f" {short(value):>{_SIZE}}" for value in figures[: len(shown)])
        line = Text.assemble(set_cell_size(name, _NAME), " ", (set_cell_size(state(vm), _STATE), style), sizes, " ")
        for mark, cells in zip(MARKS, bar(vm, room), strict=True):
            line.append((mark.ascii if self._ascii else mark.char) * cells, style=mark.style)
        return line

    def _legend(self) -> Text:
        line = Text()
        for mark in MARKS:
            line.append(mark.ascii if self._ascii else mark.char, style=mark.style)
            line.append(f" {mark.meaning}  ", style="dim")
        line.append("Ctrl-C ends", style="dim")
        return line

    @property
    def _ascii(self) -> bool:
        return self._console.options.ascii_only


def bar(vm: Seen, cells: int) -> tuple[int, ...]:
    """Share `cells` between the parts of guest RAM, in the order of MARKS; what is not locked in full is not full."""
    now, ram = vm.guarantee, vm.ram
    if not ram or cells <= 0:
        return (0,) * len(MARKS)
    locked = min(now.locked if now else 0, ram)
    asked = min(max(now.requested if now else 0, locked), ram)
    swapped = min(vm.swapped or 0, ram)
    # QEMU's own memory is in these figures, too: with them, the parts could be more than the whole.
    resident = min(max((vm.resident or 0) - locked, 0), ram - asked)
    ends, total = [], 0
    for part in (locked, asked - locked, resident, swapped):
        total = min(total + part, ram)
        ends.append(total * cells // ram)
    widths = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    return (*widths, cells - ends[-1])


def short(value: int | None) -> str:
    """Say a size in at most six characters; "-" when it is unknown."""
    if value is None:
        return "-"
    for unit, name in _UNITS:
        if value >= unit:
            amount = value / unit
            return f"{amount:.1f}{name}" if amount < 100 and value % unit else f"{amount:.0f}{name}"
    return str(value)


def _calm(vm: Seen) -> int:
    """Order: first who lacks something, then who is at work, then all others, at last who has no shim."""
    if vm.shim is False:
        return 3
    if vm.guarantee is None or vm.guarantee.state is State.SHORT:
        return 0
    return 2 if vm.guarantee.state is State.IDLE else 1
