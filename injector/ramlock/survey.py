"""Every VM on this host and how it is with it, asked all at once and by one deadline.

Each VM is looked at by a thread of its own. One that hangs, because a VM is hostile (its command line, the folders of
its root and its shim's replies are its own making), is left behind: the threads are daemons, and whoever called has
its answer in time.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import queue
import threading
from pathlib import Path
from typing import NamedTuple

from ramlock import eject, guarantee, guestram, host, procfs, qemuargs, vms
from ramlock.deadline import Deadline
from ramlock.errors import NoAnswer, NoPermission, NotFound, RamlockError
from ramlock.reply import Guarantee
from ramlock.text import printable

TIME = 3.0
"""Seconds that all VMs together have to answer."""
NO_PERMISSION = "no permission"
_GRACE = 0.1
"""Seconds by which a VM's own deadline is sooner, so that what it failed with is told and not only that it did."""
_NAME_MOST = 200
_SHARED_LEAST = 1 << 20
_stuck: dict[int, threading.Thread] = {}
"""Threads that have not come back: whoever looks again and again does not leave one behind each time."""


class Seen(NamedTuple):
    """One VM; sizes in bytes, None where unknown."""

    pid: int
    process: procfs.Process | None = None
    """None when even that could not be read in time."""
    ram: int | None = None
    """Guest RAM, by the shim, or else as QEMU's command line asks for it."""
    resident: int | None = None
    """Of QEMU's process, its own memory included."""
    swapped: int | None = None
    """The same; None where it cannot be told, since memory is shared and swap is used."""
    shim: bool | None = None
    """Whether there is a shim in it."""
    guarantee: Guarantee | None = None
    problem: str | None = None
    """Why something is unknown."""

    @property
    def name(self) -> str | None:
        """The VM's name, safe to show."""
        name = self.process.name if self.process else None
        return None if name is None else printable(name, _NAME_MOST)

    @property
    def uuid(self) -> str | None:
        """The VM's UUID."""
        return self.process.uuid if self.process else None


def survey(seconds: float = TIME, proc: Path = procfs.PROC) -> list[Seen]:
    """Look at every QEMU on this host, in order of pid. Returns after `seconds` at the latest, and never raises."""
    deadline = Deadline(seconds)
    answers: queue.SimpleQueue[tuple[int, Seen | None]] = queue.SimpleQueue()
    seen: dict[int, Seen | None] = {}
    swapping = _swapping(proc)

    def one(pid: int) -> None:
        found: Seen | None = Seen(pid, problem="it could not be looked at")
        try:
            found = look(pid, deadline.within(max(deadline.remaining - _GRACE, 0)), proc, swapping=swapping)
        finally:
            answers.put((pid, found))

    waiting = set()
    for pid in procfs.candidates(proc):
        if pid in _stuck and _stuck[pid].is_alive():
            seen[pid] = Seen(pid, problem="no answer")
            continue
        try:
            _stuck[pid] = threading.Thread(target=one, args=(pid,), daemon=True)
            _stuck[pid].start()
            waiting.add(pid)
        except RuntimeError:
            seen[pid] = Seen(pid, problem="there are too many threads to look at it")
    while waiting and not deadline.expired:
        try:
            pid, found = answers.get(timeout=deadline.remaining)
        except queue.Empty:
            break
        waiting.discard(pid)
        _stuck.pop(pid, None)
        seen[pid] = found
    for pid in waiting:
        # Whose executable we may not see was looked at only because it could be one; most are none.
        if procfs.looks_like_qemu(procfs.executable(pid, proc), ()):
            seen[pid] = Seen(pid, problem="no answer")
    return [found for _, found in sorted(seen.items()) if found is not None]


def look(pid: int, deadline: Deadline, proc: Path = procfs.PROC, *, swapping: bool = True) -> Seen | None:
    """Look at one process; None when it is no QEMU, or has ended. `swapping` is whether the host has used any swap."""
    try:
        process = procfs.read(pid, proc)
        if process.ended or not procfs.looks_like_qemu(process.exe, process.cmdline):
            return None
        usage = procfs.usage(pid, proc)
    except (RamlockError, OSError, ValueError, LookupError):
        return None
    shared = usage.shared >= _SHARED_LEAST
    seen = Seen(
        pid,
        process,
        ram=_asked_for(process),
        resident=usage.resident,
        swapped=None if shared and swapping else usage.swapped,
        shim=eject.serves(pid, proc),
    )
    if not seen.shim:
        return seen
    if process.stopped:
        return seen._replace(problem="stopped")
    try:
        with vms.session(vms.Selector(pid=pid), deadline=deadline, proc=proc) as vm:
            now = guarantee.query(vm.client, deadline)
    except NoPermission:
        return seen._replace(problem=NO_PERMISSION)
    except NoAnswer:
        return seen._replace(problem="no answer")
    except NotFound:
        return seen._replace(problem="no socket")
    except (RamlockError, OSError) as error:
        return seen._replace(problem=printable(str(error), _NAME_MOST))
    return seen._replace(ram=now.ram or seen.ram, guarantee=now)


def _asked_for(process: procfs.Process) -> int | None:
    """Guest RAM by the command line; of virtio-mem nobody knows from outside what is plugged."""
    try:
        return sum(block.size for block in qemuargs.parse(process.cmdline).blocks if not block.virtio_mem)
    except guestram.Malformed:
        return None


def _swapping(proc: Path) -> bool:
    facts = host.memory(proc)
    return facts is None or facts.swap_free != facts.swap_total
