"""Send QEMU's main thread through a piece of our code, at a moment when that disturbs nobody.

Theory of operation: only QEMU's main thread is touched, and only while it is asleep in ppoll(), where it holds no lock
of libc's; all others run on. It is stopped for about a millisecond. Until one PTRACE_SETREGS nothing is altered but
bytes that nobody uses: the zeros at the end of an executable mapping, and stack below the stack pointer. After it the
thread needs no tracer: the code (shim/trampoline.S) does its work, puts everything back and issues ppoll() again. So
there is no instant at which our death would hurt the VM.

Two detours cannot meet: code is written only while the one thread that could run it is seen to be asleep elsewhere.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import gc
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ramlock import elf, procfs, x86_64
from ramlock.deadline import Deadline
from ramlock.errors import CannotInject, NeverParked
from ramlock.memory import Mapping, Memory, Object, Segment
from ramlock.priority import hurry
from ramlock.teststeps import step
from ramlock.tracee import NotStopped, Registers, Tracee

STOP_TIMEOUT = 0.05
"""Seconds that a thread may take to stop; one that is in the kernel for longer is not parked."""
STACK_NEEDED = 64 << 10
"""Bytes of stack that loading a library may take; measured below 20 KiB."""
_PAGE = 4096
_GUARD = 1 << 20
"""Bytes that the kernel keeps free between a growing stack and what is below it (stack_guard_gap)."""
MARK = b"ramlock's code\0\0"
"""What stands before our code in a process: where it is found the room is ours, whatever version left it."""
_BACKOFF_FIRST, _BACKOFF_MOST = 0.002, 0.05
_LIBC = ("libc.so.6", "libc-2.")
_LIBDL = ("libdl.so.2", "libdl-2.")
_INSTEAD = "start the VM with ramlock run instead"


class Code(NamedTuple):
    """Our machine code, as one piece."""

    data: bytes
    trampoline: int
    """Offset of the code that loads the shim."""
    memfd: int
    """Offset of the code that makes a memory file."""


class Target(NamedTuple):
    """All that is found out before the thread is stopped."""

    libc: Segment
    """The code of libc."""
    entries: x86_64.Entries
    code_at: int
    """Where our code goes."""


class _NoStack(Exception):
    """Where the thread sleeps it has too little stack left for the detour."""


Build = Callable[[Target, Registers, int], x86_64.Frame]
"""From the target, the registers and the bytes of the extended state: what is written below the thread's stack."""


class Detour(NamedTuple):
    """What it took."""

    attempts: int
    begun_ns: int
    """CLOCK_MONOTONIC at PTRACE_INTERRUPT, in ns."""
    traced_us: float
    """The ptrace stop alone."""


def load_code(shim: Path) -> Code:
    """Read our code from the shim's file. Raises CannotPreload when it has none."""
    trampoline, memfd = elf.sections(shim, (".ramlock.trampoline", ".ramlock.memfd"))
    start = len(MARK)
    padding = -len(trampoline) % 16
    return Code(MARK + trampoline + bytes(padding) + memfd, start, start + len(trampoline) + padding)


def find_libc(memory: Memory, maps: list[Mapping]) -> Object:
    """Find glibc as it is loaded. Raises CannotInject when it is not there."""
    for mapping in _objects(maps):
        if _named(mapping, _LIBC):
            return Object(memory, mapping.start)
    raise CannotInject(
        f"process {memory.pid} has no glibc loaded", "ramlock injects into dynamically linked QEMUs with glibc only"
    )


def find_target(memory: Memory, maps: list[Mapping], program: Object, code: Code) -> Target:
    """Find what a detour needs in the target. Reads only.

    Raises CannotInject, saying what is missing.
    """
    libc = find_libc(memory, maps)
    return Target(find_code(libc), find_entries(memory, maps, libc), find_room(memory, maps, (libc, program), code))


def find_code(libc: Object) -> Segment:
    """Return where libc's code is. Raises CannotInject when it has none."""
    for segment in libc.segments:
        if segment.executable:
            return segment
    raise CannotInject("the glibc in this process has no code", _INSTEAD)


def find_entries(memory: Memory, maps: list[Mapping], libc: Object) -> x86_64.Entries:
    """Find what the trampoline calls. Raises CannotInject, saying what is missing."""
    libdl = next((Object(memory, m.start) for m in _objects(maps) if _named(m, _LIBDL)), None)
    holders = [libc, *([libdl] if libdl else [])]
    found = {}
    # Before glibc 2.34 dlopen() was in libdl, which need not be loaded; libc itself had these for its own use.
    for wanted in (("dlopen", "__libc_dlopen_mode"), ("dlsym", "__libc_dlsym"), ("__errno_location",)):
        symbol = next((s for holder in holders if (s := holder.find_first(wanted))), None)
        if symbol is None or not any(m.executable and m.holds(symbol.address, symbol.address + 1) for m in maps):
            raise CannotInject(f"the glibc in process {memory.pid} has no {wanted[0]}", _INSTEAD)
        found[wanted[0]] = symbol
    return x86_64.Entries(found["dlopen"].address, found["dlsym"].address, found["__errno_location"].address)


def find_room(memory: Memory, maps: list[Mapping], holders: tuple[Object, ...], code: Code) -> int:
    """Find unused bytes at the end of an executable segment: zeros, or what a former detour left there.

    Raises CannotInject when there are not enough.
    """
    for holder in holders:
        for segment in holder.segments:
            mapping = next((m for m in maps if m.executable and m.holds(segment.start, segment.end)), None)
            if mapping is None or not segment.executable or mapping.writable:
                continue
            start = (segment.end + 15) & ~15
            room = mapping.end - start
            if room < len(code.data) or room > 1 << 16:
                continue
            there = memory.read(start, room)
            if not any(there) or there.startswith(MARK):
                return start
    raise CannotInject(f"there is no unused room in the code of process {memory.pid}", _INSTEAD)


def _nothing() -> None:
    pass


def send(
    memory: Memory,
    program: Object,
    code: Code,
    entry: int,
    build: Build,
    timeout: float,
    committed: Callable[[], None] = _nothing,
) -> Detour:
    """Wait until the main thread is parked, at most `timeout` seconds, and send it to the code at offset `entry`.

    When this returns, the thread is on its way. Raises NeverParked, CannotInject, AlreadyTraced, NoPermission,
    NotFound or VmGone; then nothing was altered. `committed` is called when the thread is on its way: of an exception
    by a signal handler, such as KeyboardInterrupt, nobody could tell otherwise.
    """
    maps = memory.maps()
    target = find_target(memory, maps, program, code)
    deadline = Deadline(timeout)
    pause = _BACKOFF_FIRST
    attempts = 0
    while True:
        attempts += 1
        deep = False
        if looks_parked(memory.pid, target.libc):
            try:
                if done := _attempt(memory, maps, target, code, entry, build, committed):
                    return Detour(attempts, *done)
            except _NoStack:
                deep = True
        if deadline.expired and deep:
            raise CannotInject(
                f"the main thread of process {memory.pid} has too little stack left",
                "a larger stack limit (ulimit -s) helps when the VM is started again; or " + _INSTEAD,
            )
        if deadline.expired:
            raise NeverParked(
                f"the main thread of process {memory.pid} was never seen idle in {timeout:g} s, so nothing was done",
                "QEMU may be busy with a snapshot, a migration or its disks; try again later",
            )
        time.sleep(min(pause, deadline.remaining))
        pause = min(2 * pause, _BACKOFF_MOST)
        maps = memory.maps()


def looks_parked(pid: int, libc: Segment) -> bool:
    """Ask the kernel whether the thread sleeps in ppoll() of libc, whose code that is, without stopping it.

    All of that code will do: of libc only ppoll() issues that system call, and since 2.41 does so in a function that is
    shared by all that can be cancelled, and has no name outside.
    """
    try:
        with open(f"/proc/{pid}/syscall", encoding="ascii") as file:
            words = file.read(256).split()
    except OSError:
        return True  # this kernel does not tell: stop it, and see
    if len(words) < 9:
        return False  # "running"
    return int(words[0]) == x86_64.PPOLL and _inside(libc, int(words[8], 16))


def _attempt(
    memory: Memory,
    maps: list[Mapping],
    target: Target,
    code: Code,
    entry: int,
    build: Build,
    committed: Callable[[], None],
) -> tuple[int, float] | None:
    """Stop the thread; when it is parked, send it off. Returns None when it was not.

    QEMU's main thread waits for us here, so nothing slow is done, no garbage collected, and no signal taken: one that
    stopped us would stop QEMU too.
    """
    limit = procfs.stack_limit(memory.pid)
    thread = Tracee(memory.pid)
    collects = gc.isenabled()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    gc.disable()
    try:
        with hurry(), thread:
            begun = time.monotonic_ns()
            try:
                thread.stop(STOP_TIMEOUT)
            except NotStopped:
                return None
            regs = thread.registers()
            rip = x86_64.instruction_pointer(regs)
            if not (
                x86_64.is_interrupted_ppoll(regs)
                and _inside(target.libc, rip)
                and memory.read(rip - len(x86_64.SYSCALL), len(x86_64.SYSCALL)) == x86_64.SYSCALL
            ):
                return None
            frame = build(target, regs, thread.xstate_size())
            if not _has_stack(maps, frame, limit):
                raise _NoStack
            step("write-code")
            try:
                memory.write(target.code_at, code.data)
            except OSError:  # a kernel that lets nobody write to code in this way
                thread.poke(target.code_at, code.data)
            step("write-code-done")
            step("write-frame")
            memory.write(frame.address, frame.data)
            step("write-frame-done")
            if procfs.stopping(memory.pid):
                return None
            thread.set_registers(x86_64.go_to(regs, target.code_at + entry, frame.address))
            committed()
            thread.release()
            return begun, (time.monotonic_ns() - begun) / 1000
    except OSError as error:
        raise CannotInject(
            f"the memory of process {memory.pid} cannot be written: {error.strerror}",
            "nothing was changed; " + _INSTEAD,
        ) from None
    finally:
        if collects:
            gc.enable()
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if thread.lost:  # seized again it would be stopped for as long as we wait
            raise NeverParked(
                f"the main thread of process {memory.pid} is in the kernel and does not come back, so nothing was done",
                "QEMU waits for a disk or for memory; try again later",
            )


def _objects(maps: list[Mapping]) -> list[Mapping]:
    """The first mappings of loaded files."""
    return [m for m in maps if m.offset == 0 and m.readable and m.path.startswith("/")]


def _named(mapping: Mapping, names: tuple[str, ...]) -> bool:
    base = mapping.path.removesuffix(" (deleted)").rsplit("/", 1)[-1]
    return base == names[0] or base.startswith(names[1])


def _inside(code: Segment, address: int) -> bool:
    return code.start < address <= code.end


def _has_stack(maps: list[Mapping], frame: x86_64.Frame, limit: int | None) -> bool:
    """Whether the thread has enough stack: mapped already, or of the process's own, which grows up to `limit` bytes.

    `maps` is from before the stop: reading it takes longer than all that is done there.
    """
    lowest = (frame.address - STACK_NEEDED) & -_PAGE
    below = 0
    for mapping in maps:
        if mapping.writable and mapping.holds(frame.address, frame.end):
            if lowest >= mapping.start:
                return True
            return (
                mapping.path == "[stack]"
                and (limit is None or mapping.end - lowest <= limit)
                and mapping.start - below >= _GUARD + STACK_NEEDED
            )
        below = mapping.end
    return False
