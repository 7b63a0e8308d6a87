"""Bring the shim into a running VM, and out of it: all that is around the injection, in its order.

Look first (preflight.py, locate.py), then inject, then hold what the shim says about guest RAM against what was seen
from outside, and only then lock anything. Everything may be done again: who comes second finds the shim and uses it.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from ramlock import (
    detour,
    eject,
    endpoint,
    guarantee,
    guestram,
    inject,
    kept,
    loaded,
    memfd,
    monitor,
    place,
    preflight,
    procfs,
    reply,
    road,
    tell,
    vms,
)
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import (
    CannotInject,
    CommandError,
    ControlError,
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
FOLLOW_TIME = 5.0
"""Seconds that the shim has to begin to follow discards; its lock thread may be in a long step."""
_POLL_FIRST, _POLL_MOST = 0.001, 0.02
_SURE = 10
"""Looks in a row that show no thread of the shim, which names its threads a little after they begin."""
_OUT = "take it out with ramlock eject, which unlocks everything, and inject again"


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asks for; None is the shim's default."""

    socket: str | None = None
    allow_uid: int | None = None
    timeout: float = 2.0
    """Seconds that the main thread has to be seen idle in."""
    upgrade: bool = False
    owner: int | None = None
    """The user who may always connect; None: we."""
    allow_seccomp: bool = False
    """Whether filters that are not QEMU's own are no reason to refuse."""
    allow_probable: bool = False
    """Whether a guess of where guest RAM is will do."""
    follow_discards: bool = False
    """Whether QEMU's discards of guest RAM are to be followed."""
    monitor: bool = False
    """Whether QEMU's own monitor is to offer the commands too."""


class Outcome(NamedTuple):
    """A shim in a VM, and what it took to bring it there."""

    socket: str
    """Where it can be reached from here."""
    already: bool
    """Whether it was there before."""
    version: str
    source: str
    """Whose word guest RAM is: "qemu", which was held against what is seen from outside, "controller" where the shim
    was told, or "none" so far."""
    attempts: int = 0
    stopped_us: float | None = None
    """µs that QEMU's main thread was away; None when unknown."""
    traced_us: float = 0.0
    """µs of it that it was stopped by us."""
    replaced: str | None = None
    """The version that was upgraded."""
    follows: bool = False
    """Whether QEMU's discards of guest RAM are followed, or will be when guest RAM is known."""
    unadopted: str | None = None
    """Why the books of an upgrade that was broken off could not be taken over; they are kept."""


@contextmanager
def installed(
    pid: int, options: Options, environ: Mapping[str, str], meant: procfs.Process | None = None
) -> Iterator[tuple[vms.Vm, Outcome]]:
    """Make sure that `pid` has a shim, and open a session with it; `environ` is ours.

    `meant` is which process the pid was when it was chosen. Raises VmGone when it is another by now, NotFound,
    NoPermission and Refused when nothing was done, GuestRamMismatch when the shim was ejected again, and whatever a
    session can raise.
    """
    endpoint.check_allowed(options.allow_uid, options.socket)
    with ExitStack() as stack:
        pin, process, vm = _existing(stack, pid, options, meant)
        if vm is None:
            report = _look(pid, environ, options.socket, options)
            report.require()
            place.sweep()
            plan = _plan(report, pin, process)
            found, outcome = _install(stack, plan, options, None)
            unadopted = _adopt_kept(found, plan.process)
            yield found, outcome._replace(unadopted=unadopted, follows=_follow(found, options))
        elif options.upgrade and (new := _plan_upgrade(vm, pin, process, options, environ)):
            found, outcome = _upgrade(stack, vm, *new)
            yield found, outcome._replace(follows=_follow(found, new[1]))
        else:
            try:
                source = tell.check(vm, process, None, allow_probable=options.allow_probable)
            except NoPermission:  # we may not look, and it was looked at when it came in
                source = "qemu"
            unadopted = _adopt_kept(vm, process)
            where = place.from_here(process, vm.client.where)
            follows = _follow(vm, options)
            yield vm, Outcome(where, True, version(vm), source, follows=follows, unadopted=unadopted)
        step("end")


def _follow(vm: vms.Vm, options: Options) -> bool:
    """Have the shim follow QEMU's discards, if that is asked for; return whether it is.

    Raises Refused when it is too old for that, and ControlError when it cannot.
    """
    if not options.follow_discards:
        return False
    if _ask(vm, "query-ram-minguarantee").get("follow-discards") is True:
        return True
    try:
        vm.client.execute("ramlock-follow-discards", deadline=Deadline(vms.ANSWER_TIME))
    except CommandError as error:
        if error.error_class != "CommandNotFound":
            raise
        raise Refused(
            f"ramlock {version(vm)} is in this VM already, and can follow discards only from its start on",
            "replace it with --upgrade; what is locked stays locked",
        ) from None
    deadline = Deadline(FOLLOW_TIME)
    # One that does not know guest RAM yet begins when it does.
    while (now := guarantee.query(vm.client)).state is not reply.State.WAITING and not now.raw["follow-discards"]:
        if deadline.expired:
            raise ControlError(
                "QEMU's discards cannot be followed: not all of its calls can be redirected",
                "the shim is in the VM, its guarantee is as it was: ramlock set changes it; what is locked stays so, "
                "also when the guest gives it back",
            )
        time.sleep(_POLL_MOST)
    return True


def _look(pid: int, environ: Mapping[str, str], socket: str | None, options: Options) -> preflight.Preflight:
    return preflight.look(
        pid, environ, socket, allow_seccomp=options.allow_seccomp, allow_probable=options.allow_probable
    )


def version(vm: vms.Vm) -> str:
    """Return the version of the shim, from its greeting."""
    return vm.client.package.removeprefix("ramlock ").strip()


class _Plan(NamedTuple):
    """What a preflight without a fault has found."""

    pin: procfs.Pin
    process: procfs.Process
    file: road.File
    way: road.Road
    where: place.Place
    ram: guestram.Found


def _plan(report: preflight.Preflight, pin: procfs.Pin, first: procfs.Process) -> _Plan:
    """Make a plan for the very process that was pinned and is `first`. Raises VmGone when it is another by now."""
    pin.check()
    process, file, way, where, ram = report.process, report.file, report.way, report.where, report.ram
    if process is None or file is None or way is None or where is None or ram is None:
        raise CannotInject(f"process {report.pid} could not be looked at", "see ramlock preflight")
    if process.start_time != first.start_time:
        raise procfs.gone(report.pid)
    return _Plan(pin, process, file, way, where, ram)


def _existing(
    stack: ExitStack, pid: int, options: Options, meant: procfs.Process | None
) -> tuple[procfs.Pin, procfs.Process, vms.Vm | None]:
    """Open a session with the shim that is there already, if one is."""
    pin = procfs.Pin(pid)
    stack.callback(pin.close)
    process = procfs.read(pid)
    if meant is not None and process.start_time != meant.start_time:
        raise procfs.gone(pid)
    if process.ended:
        return pin, process, None  # a zombie: the preflight says so
    deadline = Deadline(options.timeout)
    while (found := _connect(process, options)) is None and eject.serves(pid):
        if deadline.expired:
            raise Refused(
                f"there is a shim in process {pid}, but its socket is not found",
                "say where it is with --socket; a VM that is just starting, or stopped, may need some time",
            )
        time.sleep(_POLL_MOST)
    pin.check()
    return pin, process, None if found is None else stack.enter_context(vms.talk(_vm(process, procfs.Pin(pid), found)))


def _install(stack: ExitStack, plan: _Plan, options: Options, handed: dict[str, Any] | None) -> tuple[vms.Vm, Outcome]:
    """Inject, and compare; `handed` is what a former shim has left to be adopted."""
    process = plan.process
    plan.pin.check()
    path = plan.way.path or memfd.provide(
        process.pid, plan.file.path, plan.file.build_id, options.timeout, pin=plan.pin
    )
    cost = _inject(plan, path, options)
    vm = stack.enter_context(vms.talk(_await(process, path, plan.where)))
    try:
        source = tell.check(vm, process, plan.ram, allow_probable=options.allow_probable)
    except Refused:
        with suppress(RamlockError):
            eject.eject(vm)
        raise
    if handed is not None:
        _adopt(vm, handed)
    started = _started(vm)
    already = started is not None and started < cost.begun_ns  # somebody else was quicker
    stopped = (started - cost.begun_ns) / 1000 if started is not None and not already else None
    where = place.from_here(process, vm.client.where)
    return vm, Outcome(where, already, version(vm), source, cost.attempts, stopped, cost.traced_us)


def _inject(plan: _Plan, path: str, options: Options) -> inject.Injection:
    process, where = plan.process, plan.where
    coming = False

    def committed() -> None:
        nonlocal coming
        coming = True

    place.prepare(process, where, shared=options.allow_uid is not None)
    try:
        cost = inject.inject(
            process.pid,
            plan.file.path,
            os.fsencode(path),
            _config(process, where, options),
            options.timeout,
            plan.pin,
            committed,
        )
    except BaseException:
        if not coming:
            place.remove(process)
        raise
    place.link(process, where)
    return cost


def _plan_upgrade(
    vm: vms.Vm, pin: procfs.Pin, process: procfs.Process, options: Options, environ: Mapping[str, str]
) -> tuple[_Plan, Options, loaded.Shim] | None:
    """Look whether our shim is another than the one that serves; None when it is the same.

    The settings of the former one are kept as far as they can be known.
    """
    theirs = procfs.environ(process.pid) or {}
    allowed = theirs.get("RAMLOCK_ALLOW_UID", "")
    facts = _ask(vm, "query-ramlock")
    kept = replace(
        options,
        socket=options.socket or theirs.get("RAMLOCK_SOCKET") or place.linked(process),
        allow_uid=int(allowed) if options.allow_uid is None and allowed.isdecimal() else options.allow_uid,
        owner=process.uids[0] if facts.get("entry") == "preloaded" else None,
        follow_discards=options.follow_discards or _ask(vm, "query-ram-minguarantee").get("follow-discards") is True,
        monitor=options.monitor or monitor.is_wanted(vm),
    )
    report = _look(process.pid, environ, kept.socket, options)
    report.require()
    plan = _plan(report, pin, process)
    # Shims that were ejected stay loaded; one that does not say where it is was most likely the last to come.
    serving = [found for found in report.shims if found.base == facts.get("base")] or report.shims
    if not serving or serving[-1].build_id == plan.file.build_id:
        return None
    return plan, kept, serving[-1]


def _upgrade(
    stack: ExitStack, vm: vms.Vm, plan: _Plan, options: Options, former: loaded.Shim
) -> tuple[vms.Vm, Outcome]:
    """Replace the shim by ours. What it has locked stays locked: the new one takes over its books.

    When the new one cannot be brought in, the former one is started again, with its books; as long as no shim has
    them, they are kept. Raises what hindered the new one.
    """
    process, pid = plan.process, plan.process.pid
    old = version(vm)
    if unadopted := _adopt_kept(vm, process):
        raise Refused(
            f"an upgrade of process {pid} was broken off, and its shim does not take the books over: {unadopted}", _OUT
        )
    with kept.Room(process) as room:
        step("hand-over")
        # From the reply on, until they are written down, the books are here alone.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM, signal.SIGHUP))
        try:
            handed = vm.client.execute("ramlock-eject", {"keep": True}, deadline=Deadline(vms.ANSWER_TIME))
        except CommandError as error:
            if error.reason == "busy":
                raise Refused(
                    f"the lock thread of ramlock {old} in process {pid} waits for memory",
                    "nothing was changed; try again when the guest's memory can be populated",
                ) from None
            raise Refused(f"ramlock {old} in process {pid} cannot be replaced while it holds memory", _OUT) from None
        else:
            if not isinstance(handed, dict):
                raise ControlError(
                    "the former shim handed nothing over", "what it had locked stays locked until the VM ends"
                )
            with suppress(OSError):  # the best that can be done now is to go on
                room.fill(handed)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    try:
        eject.wait_gone(pid, eject.GOING_TIME)
        found, outcome = _install(stack, plan, options, handed)
    except (RamlockError, OSError) as error:
        try:
            _bring_back(plan, options, former, handed)
        except (RamlockError, OSError) as second:
            error.add_note(f"the former shim was not started again: {second}")
        if isinstance(error, CommandError):
            raise ControlError(
                f"the new shim in process {pid} does not take over what is locked: {error.desc}",
                "it stays locked and written down; the next ramlock inject tries again",
            ) from error
        raise
    kept.remove(process)
    return found, outcome._replace(replaced=old)


def _bring_back(plan: _Plan, options: Options, former: loaded.Shim, handed: dict[str, Any]) -> None:
    """Start the former shim again, unless another one is there or may still come; then that one gets the books."""
    pid = plan.process.pid
    plan.pin.check()
    deadline = Deadline(options.timeout)
    while not _is_back(pid):
        if deadline.expired:
            return
        time.sleep(_POLL_MOST)
    if eject.serves(pid):
        return
    _inject(plan, former.name, options)
    with vms.talk(_await(plan.process, former.name, plan.where)) as again:
        _adopt(again, handed)
    kept.remove(plan.process)


def _adopt(vm: vms.Vm, handed: dict[str, Any]) -> None:
    """Give a shim the books of a former one, as soon as it knows guest RAM and has time. Raises CommandError."""
    step("adopt")
    deadline = Deadline(guarantee.START_TIME)
    while guarantee.query(vm.client).state is reply.State.WAITING and not deadline.expired:
        time.sleep(_POLL_MOST)
    while True:
        try:
            vm.client.execute("ramlock-adopt", handed, deadline=Deadline(vms.ANSWER_TIME))
            return
        except CommandError as error:
            if error.reason != "busy" or deadline.expired:
                raise
        time.sleep(_POLL_MOST)


def _adopt_kept(vm: vms.Vm, process: procfs.Process) -> str | None:
    """Finish an upgrade that was broken off. Returns None, or why the shim does not take the books, which are kept."""
    if (handed := kept.read(process)) is not None:
        try:
            _adopt(vm, handed)
        except CommandError as error:
            return error.desc
        kept.remove(process)
    return None


def _config(process: procfs.Process, where: place.Place, options: Options) -> bytes:
    """The shim's settings. The guarantee is not among them: first what it knows of guest RAM is held against ours."""
    owner = os.geteuid() if options.owner is None else options.owner
    lines = [f"RAMLOCK_OWNER_UID={place.uid_inside(owner, process.pid)}"]
    if where.path is not None:
        lines.append(f"RAMLOCK_SOCKET={where.path}")
    if options.allow_uid is not None:
        lines.append(f"RAMLOCK_ALLOW_UID={place.uid_inside(options.allow_uid, process.pid)}")
    if options.follow_discards:
        lines.append("RAMLOCK_FOLLOW_DISCARDS=1")
    if options.monitor:
        lines.append("RAMLOCK_MONITOR=1")
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
    """Wait until the shim listens. Raises CannotInject or ControlError, saying why it does not."""
    step("wait-socket")
    pin = procfs.Pin(process.pid)
    deadline = Deadline(SOCKET_TIME)
    pause = _POLL_FIRST
    options = Options(socket=where.path)
    back = False
    without_threads = 0
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
            if back:
                # ramlock_start() has returned, so what threads it makes are there; they leave when they cannot serve.
                without_threads = 0 if eject.serves(process.pid) else without_threads + 1
                if without_threads > _SURE:
                    place.remove(process)
                    raise CannotInject(
                        f"the shim left process {process.pid} at once: it could not make its socket at "
                        f"{where.path or 'its usual place'}, or could not start its threads",
                        "QEMU's own log says why; try again with another --socket, or with more threads allowed",
                    )
            elif procfs.read(process.pid).state == "T":
                raise ControlError(
                    f"process {process.pid} was stopped by a signal meanwhile; the shim starts when it is continued",
                    f"kill -CONT {process.pid}, and inject again, which then finds the shim",
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
    if not os.access(f"/proc/{pid}/syscall", os.R_OK):
        return False  # this kernel does not tell
    with Memory(pid) as memory:
        return detour.looks_parked(pid, detour.find_code(detour.find_libc(memory, memory.maps())))


def _is_loaded(pid: int, path: str) -> bool:
    with Memory(pid) as memory:
        maps = memory.maps()
        program = Object(memory, loaded.executable(memory, maps).start)
        return any(found.name == path for found in loaded.objects(memory, program))


def _started(vm: vms.Vm) -> int | None:
    """When ramlock_start() ended in the shim, in ns of CLOCK_MONOTONIC."""
    value = _ask(vm, "query-ramlock").get("started-ns")
    return value if isinstance(value, int) else None


def _ask(vm: vms.Vm, command: str) -> dict[str, Any]:
    """Ask what older shims do not know; they answer nothing."""
    try:
        answer = vm.client.execute(command, deadline=Deadline(vms.ANSWER_TIME))
    except CommandError:
        return {}
    return answer if isinstance(answer, dict) else {}
