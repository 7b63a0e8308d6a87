"""May the shim be injected into this process, and if not, why not? Looks only: nothing is written, nobody stopped.

Each check has an error of its own; `inject` refuses by the first that fails, `preflight` shows all. What cannot be
looked at because an earlier check failed is left out.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import platform
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeVar

from ramlock import detour, guestram, loaded, locate, memory, place, procfs, rights, road, shim, x86_64
from ramlock.errors import AlreadyTraced, CannotInject, NoPermission, RamlockError, Refused
from ramlock.sizes import format_size
from ramlock.text import printable

T = TypeVar("T")
_INSTEAD = "start the VM with ramlock run instead"
_THREAD = "ramlock-ctl"
_SANDBOX_FILTERS = 1
"""Seccomp filters that QEMU's -sandbox installs, whatever it is told to deny."""


class Check(NamedTuple):
    """One question and its answer."""

    name: str
    ok: bool
    detail: str
    hint: str
    error: RamlockError | None = None


@dataclass(slots=True)
class Preflight:
    """All answers, and what was found on the way; complete when all is well."""

    pid: int
    checks: list[Check] = field(default_factory=list)
    process: procfs.Process | None = None
    file: road.File | None = None
    way: road.Road | None = None
    where: place.Place | None = None
    ram: guestram.Found | None = None
    shims: list[loaded.Shim] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing stands in the way."""
        return all(check.ok for check in self.checks)

    def require(self) -> None:
        """Raise the error of the first check that failed."""
        for check in self.checks:
            if check.error is not None:
                raise check.error


class _Stop(Exception):
    """A check failed without which the following make no sense."""


def look(
    pid: int,
    environ: Mapping[str, str],
    socket: str | None = None,
    proc: Path = procfs.PROC,
    *,
    allow_seccomp: bool = False,
    allow_probable: bool = False,
) -> Preflight:
    """Run every check on `pid`; `environ` is ours, `socket` the place that the user wants. Never refuses.

    With `allow_seccomp` the user answers for the filters on the process, with `allow_probable` for a guess of where
    guest RAM is.
    """
    report = Preflight(pid)
    try:
        with ExitStack() as stack:
            _look(report, stack, environ, socket, proc, allow_seccomp=allow_seccomp, allow_probable=allow_probable)
    except _Stop:
        pass
    return report


def _look(
    report: Preflight,
    stack: ExitStack,
    environ: Mapping[str, str],
    socket: str | None,
    proc: Path,
    *,
    allow_seccomp: bool,
    allow_probable: bool,
) -> None:
    pid = report.pid

    def check(name: str, question: Callable[[], tuple[T, str]], *, needed: bool = True) -> T | None:
        try:
            found, detail = question()
        except RamlockError as error:
            report.checks.append(Check(name, False, error.message, error.hint, error))
            if needed:
                raise _Stop from None
            return None
        report.checks.append(Check(name, True, detail, ""))
        return found

    report.process = process = _must(check("process", lambda: _process(pid, stack, proc)))
    check("qemu", lambda: _qemu(process, proc))
    check("running", lambda: _running(process), needed=False)
    check("not-traced", lambda: _not_traced(process, proc), needed=False)
    check("seccomp", lambda: _seccomp(process, proc, allowed=allow_seccomp), needed=False)
    check("architecture", lambda: _architecture(process, proc))
    target = _must(check("rights", lambda: _rights(process, stack, proc)))
    maps = target.maps()
    program = _must(check("dynamic", lambda: _dynamic(target, maps, proc)))
    libc = _must(check("glibc", lambda: _glibc(target, program, maps)))
    report.file = file = _must(check("shim-file", lambda: _file(environ)))
    code = detour.load_code(file.path)
    check("room", lambda: (None, f"at {detour.find_room(target, maps, (libc, program), code):#x}"), needed=False)
    report.ram = check(
        "guest-ram", lambda: _guest_ram(process, target, program, proc, allowed=allow_probable), needed=False
    )
    report.shims = shims = _must(check("loaded", lambda: _loaded(target, program, maps, file, proc)))
    report.way = check("road", lambda: _road(process, file, shims, maps, proc), needed=False)
    report.where = check("socket", lambda: _place(process, socket, proc), needed=False)


def _must(found: T | None) -> T:
    if found is None:
        raise _Stop
    return found


def _process(pid: int, stack: ExitStack, proc: Path) -> tuple[procfs.Process, str]:
    process = procfs.read(pid, proc)
    if process.ended:
        raise CannotInject(f"process {pid} has ended and waits for its parent (a zombie)", "start the VM again")
    stack.callback(procfs.Pin(pid).close)
    name = f", VM {printable(process.name, 80)}" if process.name else ""
    return process, f"pid {pid}, uid {process.uids[1]}{name}"


def _qemu(process: procfs.Process, proc: Path) -> tuple[None, str]:
    exe = process.exe or (process.cmdline[0] if process.cmdline else "a kernel thread")
    if procfs.looks_like_qemu(process.exe, process.cmdline) or _has_ram_list(process, proc):
        return None, printable(exe)
    raise CannotInject(
        f"process {process.pid} is not QEMU but {printable(exe)}", "see the running VMs with: ramlock list"
    )


def _has_ram_list(process: procfs.Process, proc: Path) -> bool:
    """Whether it is a QEMU under another name."""
    try:
        with memory.Memory(process.pid, proc=proc) as target:
            program = memory.Object(target, loaded.executable(target, target.maps(), proc).start)
            return program.find("ram_list") is not None
    except RamlockError:
        return False


def _running(process: procfs.Process) -> tuple[None, str]:
    if process.state == "T":
        raise CannotInject(
            f"process {process.pid} is stopped by a signal, so its main thread cannot be used",
            f"continue it first: kill -CONT {process.pid}",
        )
    return None, "not stopped"


def _not_traced(process: procfs.Process, proc: Path) -> tuple[None, str]:
    if tracer := procfs.tracer(process.pid, proc):
        try:
            who = procfs.read(tracer, proc).cmdline[:1]
        except RamlockError:
            who = ()
        raise AlreadyTraced(process.pid, tracer, printable(who[0], 80) if who else "")
    return None, "nobody traces it"


def _seccomp(process: procfs.Process, proc: Path, *, allowed: bool) -> tuple[None, str]:
    """QEMU's own sandbox lets through all that the shim does; of another filter nobody knows, and it may kill QEMU."""
    mode, count = procfs.seccomp(process.pid, proc)
    if mode == 0:
        return None, "no seccomp filter"
    own = procfs.sandboxed(process.cmdline)
    if own and count == _SANDBOX_FILTERS:
        return None, "QEMU's own sandbox"
    if allowed:
        return None, "a seccomp filter, which was allowed"
    if count is None:
        what = "the kernel does not say how many seccomp filters are on it, so one may be another's than QEMU's own"
    else:
        what = f"seccomp filters on it that are not QEMU's own ({count - _SANDBOX_FILTERS if own else count})"
    raise CannotInject(
        f"process {process.pid} may be killed by what the shim does: {what}",
        f"{_INSTEAD}, or use --allow-seccomp if you know that the filter allows mlock2, munlock, madvise, and threads",
    )


def _architecture(process: procfs.Process, proc: Path) -> tuple[None, str]:
    if platform.machine() != "x86_64":
        raise CannotInject(f"injection does not work on {platform.machine()} yet, only on x86_64", _INSTEAD)
    try:
        with (proc / str(process.pid) / "exe").open("rb") as file:
            header = file.read(20)
    except OSError:
        return None, "unknown, as its program may not be read"  # the next check says why
    if header[:4] != b"\x7fELF":
        raise CannotInject(f"the program in process {process.pid} is no ELF file", _INSTEAD)
    machine = int.from_bytes(header[18:20], "little" if header[5] == 1 else "big")
    if header[4] != 2:
        raise CannotInject(
            f"process {process.pid} is a 32-bit one, ramlock works with 64-bit ones only", "use a 64-bit QEMU"
        )
    if machine != x86_64.MACHINE:
        raise CannotInject(f"process {process.pid} is for another processor (ELF machine {machine})", _INSTEAD)
    return None, "x86_64"


def _rights(process: procfs.Process, stack: ExitStack, proc: Path) -> tuple[memory.Memory, str]:
    try:
        # The kernel asks here what it would ask before PTRACE_SEIZE.
        target = memory.Memory(process.pid, proc=proc)
    except NoPermission:
        raise rights.explain(rights.facts(process, proc)) from None
    return stack.enter_context(target), "its memory may be read"


def _dynamic(target: memory.Memory, maps: list[memory.Mapping], proc: Path) -> tuple[memory.Object, str]:
    program = memory.Object(target, loaded.executable(target, maps, proc).start)
    if program.loader is None:
        raise CannotInject(f"the program in process {target.pid} is statically linked", "use a dynamically linked QEMU")
    return program, "dynamically linked"


def _glibc(target: memory.Memory, program: memory.Object, maps: list[memory.Mapping]) -> tuple[memory.Object, str]:
    if "ld-musl" in (program.loader or ""):
        raise CannotInject(f"process {target.pid} uses musl, the shim needs glibc", "use a QEMU built for glibc")
    libc = detour.find_libc(target, maps)
    detour.find_code(libc)
    detour.find_entries(target, maps, libc)
    return libc, next(m.path for m in maps if m.start == libc.bias)


def _file(environ: Mapping[str, str]) -> tuple[road.File, str]:
    file = road.read(shim.find(environ))
    return file, f"{file.path}, build {file.build_id[:12]}"


def _guest_ram(
    process: procfs.Process, target: memory.Memory, program: memory.Object, proc: Path, *, allowed: bool
) -> tuple[guestram.Found, str]:
    found = locate.outside(process, proc=proc, memory=target)
    if not found.blocks:
        return found, "the machine has no RAM yet"
    total = format_size(sum(block.size for block in found.blocks))
    count = len(found.blocks)
    detail = f"{total} in {count} block{'s' if count > 1 else ''}, {found.confidence} by its {_SOURCES[found.source]}"
    # The shim finds guest RAM itself where the list is exported, and is held against this.
    if not found.certain and not allowed and program.find("ram_list") is None:
        raise locate.only_probable(process.pid, found)
    return found, detail


_SOURCES = {"symbols": "list of RAM blocks", "maps": "mappings"}


def _loaded(
    target: memory.Memory, program: memory.Object, maps: list[memory.Mapping], file: road.File, proc: Path
) -> tuple[list[loaded.Shim], str]:
    shims = loaded.shims(target, program, maps, file.stat)
    if _THREAD in procfs.threads(target.pid, proc):
        return shims, "a shim serves it already"
    return shims, f"no shim serves it; {len(shims)} that did are still mapped" if shims else "no shim is in it"


def _road(
    process: procfs.Process, file: road.File, shims: list[loaded.Shim], maps: list[memory.Mapping], proc: Path
) -> tuple[road.Road, str]:
    found = road.choose(process, file, shims, maps, proc)
    return found, found.path or f"a memory file, as {found.why}"


def _place(process: procfs.Process, wanted: str | None, proc: Path) -> tuple[place.Place, str]:
    try:
        found = place.choose(process, wanted, proc)
    except RamlockError as error:
        raise Refused(error.message, error.hint) from None
    return found, found.path or "the shim's usual place"
