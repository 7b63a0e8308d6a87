"""Put the shim into a QEMU that runs already.

Theory of operation: only QEMU's main thread is touched, and only while it is asleep in ppoll(), where it holds no lock
of libc's; all others run on. It is stopped for about a millisecond. Until one PTRACE_SETREGS nothing is altered but bytes
that nobody uses: the zeros at the end of an executable mapping, and stack below the stack pointer. After it the thread
needs no tracer: the trampoline (shim/trampoline.S) loads the shim, puts everything back and issues ppoll() again. So
there is no instant at which our death would hurt the VM.

Two injections cannot meet: code is written only while the one thread that could run it is seen to be asleep elsewhere.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import time
from pathlib import Path
from typing import NamedTuple

from ramlock import elf, x86_64
from ramlock.deadline import Deadline
from ramlock.errors import CannotInject, NeverParked
from ramlock.memory import Mapping, Memory, Object, Symbol
from ramlock.teststeps import step
from ramlock.tracee import NotStopped, Tracee

STOP_TIMEOUT = 0.05
"""Seconds that a thread may take to stop; one that is in the kernel for longer is not parked."""
STACK_NEEDED = 128 << 10
"""Bytes of stack that loading a library may take; measured below 20 KiB."""
_BACKOFF_FIRST, _BACKOFF_MOST = 0.002, 0.05
_LIBC = ("libc.so.6", "libc-2.")
_LIBDL = ("libdl.so.2", "libdl-2.")


class Target(NamedTuple):
    """All that is found out before the thread is stopped."""

    ppoll: Symbol
    entries: x86_64.Entries
    code_at: int
    """Where the trampoline goes."""


class Injection(NamedTuple):
    """What it took."""

    attempts: int
    begun_ns: int
    """CLOCK_MONOTONIC at PTRACE_INTERRUPT, in ns."""
    traced_us: float
    """The ptrace stop alone."""


def _objects(maps: list[Mapping]) -> list[Mapping]:
    """The first mappings of loaded files."""
    return [m for m in maps if m.offset == 0 and m.readable and m.path.startswith("/")]


def _named(mapping: Mapping, names: tuple[str, ...]) -> bool:
    base = mapping.path.removesuffix(" (deleted)").rsplit("/", 1)[-1]
    return base == names[0] or base.startswith(names[1])


def find_libc(memory: Memory, maps: list[Mapping]) -> Object:
    """Find glibc as it is loaded. Raises CannotInject when it is not there."""
    for mapping in _objects(maps):
        if _named(mapping, _LIBC):
            return Object(memory, mapping.start)
    raise CannotInject(
        f"process {memory.pid} has no glibc loaded", "ramlock injects into dynamically linked QEMUs with glibc only"
    )


def find_target(memory: Memory, maps: list[Mapping], code: bytes) -> Target:
    """Find what an injection needs in the target. Reads only.

    Raises CannotInject, saying what is missing.
    """
    libc = find_libc(memory, maps)
    if libc.machine != x86_64.MACHINE:
        raise CannotInject("injection works on x86_64 only so far", "start the VM with ramlock run instead")
    libdl = next((Object(memory, m.start) for m in _objects(maps) if _named(m, _LIBDL)), None)
    holders = [libc, *([libdl] if libdl else [])]
    found = {}
    # Before glibc 2.34 dlopen() was in libdl, which need not be loaded; libc itself had these for its own use.
    for wanted in (("dlopen", "__libc_dlopen_mode"), ("dlsym", "__libc_dlsym"), ("__errno_location",), ("ppoll",)):
        symbol = next((s for holder in holders if (s := holder.find_first(wanted))), None)
        if symbol is None or not _in_executable(maps, symbol):
            raise CannotInject(
                f"the glibc in process {memory.pid} has no {wanted[0]}", "start the VM with ramlock run instead"
            )
        found[wanted[0]] = symbol
    entries = x86_64.Entries(found["dlopen"].address, found["dlsym"].address, found["__errno_location"].address)
    return Target(found["ppoll"], entries, _find_room(memory, maps, libc, code))


def _in_executable(maps: list[Mapping], symbol: Symbol) -> bool:
    return any(m.executable and m.holds(symbol.address, symbol.address + 1) for m in maps)


def _find_room(memory: Memory, maps: list[Mapping], libc: Object, code: bytes) -> int:
    """Find unused bytes at the end of an executable segment: zeros, or what a former injection left there."""
    files = _objects(maps)
    for holder in (libc, *(Object(memory, m.start) for m in files if m is files[0])):
        for segment in holder.segments:
            mapping = next((m for m in maps if m.executable and m.holds(segment.start, segment.end)), None)
            if mapping is None or not segment.executable or mapping.writable:
                continue
            start = (segment.end + 15) & ~15
            room = mapping.end - start
            if room < len(code) or room > 1 << 16:
                continue
            there = memory.read(start, room)
            if not any(there) or (there.startswith(code) and not any(there[len(code) :])):
                return start
    raise CannotInject(
        f"there is no unused room in the code of process {memory.pid}", "start the VM with ramlock run instead"
    )


def inject(pid: int, shim: Path, path: bytes, config: bytes, timeout: float) -> Injection:
    """Load the shim from `path` (as the target sees it) into `pid` and start it with `config`.

    Waits until the main thread is parked, at most `timeout` seconds. When this returns, the thread is on its way through
    the trampoline. Raises NeverParked, CannotInject, AlreadyTraced, NoPermission, NotFound or VmGone; then nothing
    was altered.
    """
    code = elf.section(shim, ".ramlock.trampoline")
    step("begin")
    with Memory(pid, write=True) as memory:
        maps = memory.maps()
        target = find_target(memory, maps, code)
        deadline = Deadline(timeout)
        pause = _BACKOFF_FIRST
        attempts = 0
        while True:
            attempts += 1
            if _looks_parked(pid, target) and (done := _attempt(pid, memory, maps, target, code, path, config)):
                return Injection(attempts, *done)
            maps = memory.maps()
            if deadline.expired:
                raise NeverParked(
                    f"the main thread of process {pid} was never seen idle in {timeout:g} s, so nothing was done",
                    "QEMU may be busy with a snapshot, a migration or its disks; try again later",
                )
            time.sleep(min(pause, deadline.remaining))
            pause = min(2 * pause, _BACKOFF_MOST)


def _looks_parked(pid: int, target: Target) -> bool:
    """Ask the kernel whether the thread sleeps in ppoll() of libc, without stopping it."""
    try:
        with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
            words = file.read(256).split()
    except OSError:
        return True  # this kernel does not tell: stop it, and see
    if len(words) < 9:
        return False  # "running"
    return int(words[0]) == x86_64.PPOLL and _inside(target.ppoll, int(words[8], 16))


def _inside(symbol: Symbol, address: int) -> bool:
    return symbol.address < address <= symbol.address + symbol.size


def _attempt(
    pid: int, memory: Memory, maps: list[Mapping], target: Target, code: bytes, path: bytes, config: bytes
) -> tuple[int, float] | None:
    """Stop the thread; when it is parked, send it through the trampoline. Returns None when it was not."""
    with Tracee(pid) as thread:
        begun = time.monotonic_ns()
        try:
            thread.stop(STOP_TIMEOUT)
        except NotStopped:
            return None
        regs = thread.registers()
        rip = x86_64.instruction_pointer(regs)
        if not (
            x86_64.is_interrupted_ppoll(regs)
            and _inside(target.ppoll, rip)
            and memory.read(rip - len(x86_64.SYSCALL), len(x86_64.SYSCALL)) == x86_64.SYSCALL
        ):
            return None
        boot = x86_64.bootstrap(regs, target.entries, path, config, thread.xstate_size())
        if not _has_stack(maps, boot):
            return None
        step("write-code")
        memory.write(target.code_at, code)
        step("write-code-done")
        step("write-bootstrap")
        memory.write(boot.address, boot.data)
        step("write-bootstrap-done")
        thread.set_registers(x86_64.go_to(regs, target.code_at, boot.address))
        thread.release()
        return begun, (time.monotonic_ns() - begun) / 1000


def _has_stack(maps: list[Mapping], boot: x86_64.Bootstrap) -> bool:
    """Whether the thread is on the process's own stack, which grows by itself, or has enough of another one.

    `maps` is from before the stop: reading it takes longer than all that is done there.
    """
    for mapping in maps:
        if mapping.writable and mapping.holds(boot.address, boot.end):
            return mapping.path == "[stack]" or boot.address - mapping.start >= STACK_NEEDED
    return False
