"""Bring the shim into a running VM, and out of it: all that is around the injection, in its order.

Look first (preflight.py, guestram.py), then inject, then hold what the shim says about guest RAM against what was seen
from outside, and only then lock anything. Everything may be done again: who comes second finds the shim and uses it.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ramlock import (
    __version__,
    detour,
    eject,
    endpoint,
    guarantee,
    guestram,
    inject,
    loaded,
    memfd,
    place,
    preflight,
    procfs,
    reply,
    vms,
)
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import (
    CannotInject,
    CommandError,
    ControlError,
    GuestRamMismatch,
    NoAnswer,
    NoPermission,
    NotFound,
    RamlockError,
    Refused,
)
from ramlock.memory import Memory, Object
from ramlock.teststeps import step
from ramlock.text import printable

SOCKET_TIME = 10.0
"""Seconds that the shim has to listen, counted from when it was started; QEMU's main loop may be busy."""
_COMPARISONS = 3
_POLL_FIRST, _POLL_MOST = 0.001, 0.02


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks for; None is the shim's default."""

    socket: str | None = None
    allow_uid: int | None = None
    timeout: float = 2.0
    """Seconds that the main thread has to be seen idle in."""
    upgrade: bool = False


class Outcome(NamedTuple):
    """A shim in a VM, and what it took to bring it there."""

    socket: str
    """As the VM's process sees it."""
    already: bool
    """Whether it was there before."""
    version: str
    source: str
    """Whose word guest RAM is: "qemu", which was held against what is seen from outside, or "none" so far."""
    attempts: int = 0
    stopped_us: float | None = None
    """µs that QEMU's main thread was away; None when unknown."""
    traced_us: float = 0.0
    """µs of it that it was stopped by us."""
    replaced: str | None = None
    """The version that was upgraded."""


@contextmanager
def installed(pid: int, options: Options, environ: Mapping[str, str]) -> Iterator[tuple[vms.Vm, Outcome]]:
    """Make sure that `pid` has a shim, and open a session with it; `environ` is ours.

    Raises NotFound, NoPermission and Refused when nothing was done, GuestRamMismatch when the shim was ejected again,
    and whatever a session can raise.
    """
    pin = procfs.Pin(pid)
    try:
        process = procfs.read(pid)
        found = _connect(process, options)
    except BaseException:
        pin.close()
        raise
    if found is None:
        pin.close()
        with _install(pid, options, environ) as result:
            yield result
        return
    with vms.talk(_vm(process, pin, found)) as vm:
        if not options.upgrade or version(vm) == __version__:
            blocks = _from_outside(process)
            source = _compare(vm, process, blocks) if blocks is not None else "qemu"
            yield vm, Outcome(found[1], True, version(vm), source)
            return
    with _upgrade(pid, options, environ) as result:
        yield result


def version(vm: vms.Vm) -> str:
    """Return the version of the shim, from its greeting."""
    return vm.client.package.removeprefix("ramlock ").strip()


@contextmanager
def _install(
    pid: int, options: Options, environ: Mapping[str, str], replaced: str | None = None, books: Any = None
) -> Iterator[tuple[vms.Vm, Outcome]]:
    report = preflight.look(pid, environ, options.socket)
    report.require()
    process, file, way, where = report.process, report.file, report.way, report.where
    if process is None or file is None or way is None or where is None or report.blocks is None:
        raise CannotInject(f"process {pid} could not be looked at", "see ramlock preflight")
    place.sweep()
    path = way.path or memfd.provide(pid, file.path, file.build_id, options.timeout)
    cost = _inject(process, file.path, path, where, options)
    with vms.talk(_await(process, path, where)) as vm:
        try:
            if books is not None:
                vm.client.execute("ramlock-adopt", books, deadline=Deadline(vms.ANSWER_TIME))
            source = _compare(vm, process, report.blocks)
        except GuestRamMismatch:
            with suppress(RamlockError):
                eject.eject(vm)
            raise
        started = _started(vm)
        already = started is not None and started < cost.begun_ns  # somebody else was quicker
        stopped = (started - cost.begun_ns) / 1000 if started is not None and not already else None
        yield (
            vm,
            Outcome(vm.client.where, already, version(vm), source, cost.attempts, stopped, cost.traced_us, replaced),
        )
        step("end")


def _inject(process: procfs.Process, file: Path, path: str, where: place.Place, options: Options) -> inject.Injection:
    place.prepare(process, where, shared=options.allow_uid is not None)
    try:
        cost = inject.inject(process.pid, file, os.fsencode(path), _config(process, where, options), options.timeout)
    except BaseException:
        place.remove(process)
        raise
    place.link(process, where)
    return cost


def _config(process: procfs.Process, where: place.Place, options: Options) -> bytes:
    """The shim's settings. The guarantee is not among them: first what it knows of guest RAM is held against ours."""
    lines = [f"RAMLOCK_OWNER_UID={place.uid_inside(os.geteuid(), process.pid)}"]
    if where.path is not None:
        lines.append(f"RAMLOCK_SOCKET={where.path}")
    if options.allow_uid is not None:
        lines.append(f"RAMLOCK_ALLOW_UID={place.uid_inside(options.allow_uid, process.pid)}")
    return os.fsencode("\n".join(lines) + "\n")


def _connect(process: procfs.Process, options: Options) -> tuple[Any, str] | None:
    environ = dict(procfs.environ(process.pid) or {})
    if options.socket is not None:
        environ["RAMLOCK_SOCKET"] = options.socket
    try:
        return endpoint.connect_process(process, environ, Deadline(vms.ANSWER_TIME))
    except NotFound:  # also when only others listen there
        return None
    except NoPermission:
        if os.geteuid() == 0 or eject.serves(process.pid):
            raise
        return None


def _vm(process: procfs.Process, pin: procfs.Pin, found: tuple[Any, str]) -> vms.Vm:
    return vms.Vm(Client(found[0], printable(found[1])), process.pid, process.name, pin)


def _await(process: procfs.Process, path: str, where: place.Place) -> vms.Vm:
    """Wait until the shim listens. Raises CannotInject, saying why it does not."""
    step("wait-socket")
    pin = procfs.Pin(process.pid)
    deadline = Deadline(SOCKET_TIME)
    pause = _POLL_FIRST
    options = Options(socket=where.path)
    back = False
    try:
        while (found := _connect(process, options)) is None:
            pin.check()
            if not back and _is_back(process.pid):
                back = True
                if not _is_loaded(process.pid, path):
                    place.remove(process)
                    raise CannotInject(
                        f"the loader of process {process.pid} did not take {path}",
                        "is it readable and executable for the VM's user, and allowed by the security modules?",
                    )
            if deadline.expired:
                raise ControlError(
                    f"the shim is in process {process.pid}, but does not listen on {where.path or 'its usual socket'}",
                    "QEMU's own log says why; try again with another --socket",
                )
            time.sleep(pause)
            pause = min(2 * pause, _POLL_MOST)
    except BaseException:
        pin.close()
        raise
    return _vm(process, pin, found)


def _is_back(pid: int) -> bool:
    """Whether the main thread sleeps in libc's ppoll() again, and so has left the trampoline."""
    with Memory(pid) as memory:
        maps = memory.maps()
        ppoll, _ = detour.find_symbols(memory, maps, detour.find_libc(memory, maps))
        return detour.looks_parked(pid, ppoll)


def _is_loaded(pid: int, path: str) -> bool:
    with Memory(pid) as memory:
        maps = memory.maps()
        program = Object(memory, loaded.executable(memory, maps).start)
        return any(found.name == path for found in loaded.objects(memory, program))


def _from_outside(process: procfs.Process) -> list[guestram.Block] | None:
    """Locate guest RAM; None when we may not look, or this QEMU does not export its list."""
    try:
        with Memory(process.pid) as memory:
            program = Object(memory, loaded.executable(memory, memory.maps()).start)
            return guestram.locate(memory, program)
    except NoPermission:
        return None


def _compare(vm: vms.Vm, process: procfs.Process, outside: list[guestram.Block]) -> str:
    """Hold the shim's guest RAM against ours. A VM may plug memory in between the two: then both are looked at again.

    Returns whose word guest RAM is. Raises GuestRamMismatch.
    """
    step("compare")
    for last in (False, False, True):
        answer = vm.client.execute("query-ram-blocks", deadline=Deadline(vms.ANSWER_TIME))
        blocks = guestram.parse_reply(answer)
        with Memory(process.pid) as memory:
            maps = memory.maps()
        try:
            guestram.compare(blocks, outside, maps)
            return "qemu" if blocks else "none"
        except GuestRamMismatch:
            if last:
                raise
        outside = _from_outside(process) or []
    raise AssertionError


def _started(vm: vms.Vm) -> int | None:
    """When ramlock_start() ended in the shim, in ns of CLOCK_MONOTONIC."""
    answer = vm.client.execute("query-ramlock", deadline=Deadline(vms.ANSWER_TIME))
    value = answer.get("started-ns") if isinstance(answer, dict) else None
    return value if isinstance(value, int) else None


@contextmanager
def _upgrade(pid: int, options: Options, environ: Mapping[str, str]) -> Iterator[tuple[vms.Vm, Outcome]]:
    """Replace the shim by ours. What it has locked stays locked: the new one takes over the old one's books."""
    raise Refused("not yet", "not yet")
    yield


_UNUSED = (CommandError, guarantee, reply, _COMPARISONS)
