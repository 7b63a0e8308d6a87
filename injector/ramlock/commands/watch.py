"""`ramlock watch`: a live table of the VMs on this host, and what happens in them.

One asyncio loop: a survey of all VMs now and then, a session with each shim for its events, and a screen that is drawn
when there is news. Not on a terminal, the same is printed as lines.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import asyncio
import fnmatch
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any, NoReturn

import click

from ramlock.api import VM
from ramlock.commands import screen
from ramlock.commands.common import seconds_option
from ramlock.control import Event
from ramlock.errors import RamlockError, VmGone
from ramlock.sizes import format_size
from ramlock.survey import Seen
from ramlock.text import printable
from ramlock.vms import Selector

EVENTS_KEPT = 100
_DRAW_LEAST = 0.1
"""Seconds between two drawings: a shim tells of its progress ten times in a second."""
_ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command()
@click.option(
    "--vm", "names", multiple=True, metavar="NAME", help="Only VMs of this name, pattern or UUID; repeatable."
)
@seconds_option("--interval", "How often all VMs are asked; what shims tell is shown as it comes.", 1.0)
def command(names: tuple[str, ...], interval: float) -> None:
    """Watch what is locked, as it happens.

    Examples:

    \b
    All VMs of this host, until Ctrl-C:
      ramlock watch
    Some of them:
      ramlock watch --vm db --vm 'web-*'
    As lines, into a log:
      ramlock watch --vm db >>db.log
    """
    drawn = sys.stdout.isatty() and os.environ.get("TERM", "dumb") not in ("", "dumb")
    view = screen.Screen() if drawn else Lines()
    asyncio.run(Watch(view, names, interval).run())


class Lines:
    """What happens, as lines: a VM's when it has changed, and each event."""

    def __init__(self) -> None:
        self._last: dict[int, str] = {}
        self._told = 0

    def open(self) -> None:
        """Nothing is to be prepared."""

    def close(self) -> None:
        """Nothing is to be put back."""

    def event(self, when: float, text: str) -> None:
        """Print an event."""
        self._print(when, text)

    def draw(self, everyone: list[Seen], events: "deque[tuple[float, str]]") -> None:
        """Print what has changed."""
        for vm in everyone:
            text = _line(vm)
            if self._last.get(vm.pid) != text:
                self._last[vm.pid] = text
                self._print(time.time(), text)
        gone = set(self._last) - {vm.pid for vm in everyone}
        for pid in gone:
            del self._last[pid]

    def _print(self, when: float, text: str) -> None:
        print(time.strftime("%H:%M:%S", time.localtime(when)), text, flush=True)


View = Lines | screen.Screen


class Watch:
    """Asks, listens, and has it shown."""

    def __init__(self, view: View, names: tuple[str, ...], interval: float) -> None:
        """`names` are the VMs that are meant, none for all; `interval` is in seconds."""
        self._view, self._names, self._interval = view, names, interval
        self._everyone: list[Seen] = []
        self._events: deque[tuple[float, str]] = deque(maxlen=EVENTS_KEPT)
        self._listening: dict[tuple[int, int], asyncio.Task[None]] = {}
        self._news = asyncio.Event()
        self._ended: asyncio.Future[int] | None = None

    async def run(self) -> None:
        """Work until a signal ends it; then the terminal is as it was, and the process ends as such signals have it."""
        loop = asyncio.get_running_loop()
        self._ended = loop.create_future()
        for signal_number in _ENDS:
            loop.add_signal_handler(signal_number, self._end, int(signal_number))
        tasks = [asyncio.create_task(self._ask()), asyncio.create_task(self._draw())]
        for task in tasks:
            task.add_done_callback(self._failed)
        number = 0
        try:
            self._view.open()
            if isinstance(self._view, screen.Screen):
                loop.add_signal_handler(signal.SIGTSTP, self._pause)
                loop.add_signal_handler(signal.SIGWINCH, self._news.set)
            number = await self._ended
        except OSError:
            pass  # whoever looked has gone
        finally:
            with suppress(OSError):
                self._view.close()
        _leave(number)

    def _failed(self, task: "asyncio.Task[None]") -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None and self._ended is not None and not self._ended.done():
            self._ended.set_exception(error)

    def _end(self, number: int) -> None:
        if self._ended is not None and not self._ended.done():
            self._ended.set_result(number)

    def _pause(self) -> None:
        """Leave the terminal to the shell while we are stopped (Ctrl-Z)."""
        with suppress(OSError):
            self._view.close()
        os.kill(os.getpid(), signal.SIGSTOP)
        with suppress(OSError):
            self._view.open()
        self._news.set()

    async def _ask(self) -> None:
        """Look at all VMs again and again, and listen to those that answer."""
        pool = ThreadPoolExecutor(1)  # of its own: those who listen may take all of the usual one
        loop = asyncio.get_running_loop()
        while True:
            everyone = await loop.run_in_executor(pool, VM.survey)
            self._everyone = [vm for vm in everyone if self._meant(vm)]
            for vm in self._everyone:
                key = (vm.pid, vm.process.start_time if vm.process else 0)
                task = self._listening.get(key)
                if vm.guarantee is not None and (task is None or task.done()):
                    self._listening[key] = asyncio.create_task(self._listen(vm))
            for key in [key for key, task in self._listening.items() if task.done()]:
                del self._listening[key]
            self._news.set()
            await asyncio.sleep(self._interval)

    def _meant(self, vm: Seen) -> bool:
        raw = (vm.process.name if vm.process else None) or ""
        return not self._names or any(
            fnmatch.fnmatchcase(raw, name) or (vm.uuid is not None and name.lower() == vm.uuid) for name in self._names
        )

    async def _listen(self, vm: Seen) -> None:
        label = _label(vm)
        try:
            async for event in VM(Selector(pid=vm.pid), vm.process).events():
                self._take(vm.pid, label, event)
        except VmGone:
            self._say(f"{label} has ended")
        except (RamlockError, OSError):
            return  # the next survey says how it is with it

    def _take(self, pid: int, label: str, event: Event) -> None:
        requested, locked = event.data.get("requested"), event.data.get("locked")
        if isinstance(requested, int) and isinstance(locked, int):
            self._everyone = [_updated(vm, requested, locked) if vm.pid == pid else vm for vm in self._everyone]
        if event.name == "RAM_MINGUARANTEE_PROGRESS":
            self._news.set()
        else:
            self._say(f"{label} {_words(event)}")

    def _say(self, text: str) -> None:
        self._events.append((time.time(), text))
        if isinstance(self._view, Lines):
            self._view.event(*self._events[-1])
        self._news.set()

    async def _draw(self) -> None:
        while True:
            await self._news.wait()
            self._news.clear()
            self._view.draw(self._everyone, self._events)
            await asyncio.sleep(_DRAW_LEAST)


def _leave(number: int) -> NoReturn:
    """End at once: a thread that a hostile VM keeps waiting would otherwise be waited for."""
    with suppress(OSError):
        sys.stdout.flush()
    if number in (signal.SIGTERM, signal.SIGHUP):  # so that whoever sent it sees that it has worked
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(0 if number == signal.SIGINT else 1)


def _label(vm: Seen) -> str:
    return f"{printable(vm.name, 24)} (pid {vm.pid})" if vm.name else f"pid {vm.pid}"


def _updated(vm: Seen, requested: int, locked: int) -> Seen:
    if vm.guarantee is None:
        return vm
    return vm._replace(guarantee=vm.guarantee._replace(requested=requested, locked=locked))


def _words(event: Event) -> str:
    """Say an event; all that comes from a VM is made safe to show."""
    data: Callable[[str], Any] = event.data.get
    name = printable(event.name.removeprefix("RAM_MINGUARANTEE_").lower(), 40)
    parts = []
    if isinstance(data("bytes"), int):
        parts.append(format_size(data("bytes")))
    if isinstance(data("locked"), int) and isinstance(data("requested"), int):
        parts.append(f"{format_size(data('locked'))} of {format_size(data('requested'))}")
    parts += [printable(str(data(key)), 80) for key in ("cause", "reason") if data(key) is not None]
    return ": ".join([name, ", ".join(parts)]) if parts else name


def _line(vm: Seen) -> str:
    now = vm.guarantee
    if now is None:
        return f"{_label(vm)} {screen.state(vm)}"
    swapped = "" if not vm.swapped else f", {format_size(vm.swapped)} swapped"
    return f"{_label(vm)} {screen.state(vm)}: {format_size(now.locked)} of {format_size(now.requested)} locked{swapped}"
