"""All of an injection that depends on the processor: registers, system call numbers, the form of what our code reads.

Another architecture is another module of this form and another shim/trampoline; aarch64 has none yet, since there is
nowhere to test it.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import struct
from typing import NamedTuple

from ramlock.tracee import Registers

MACHINE = 62
"""e_machine in an ELF header: EM_X86_64."""
SYSCALL = b"\x0f\x05"
"""The instruction."""
PPOLL = 271
_RESTARTNOHAND = -514  # ERESTARTNOHAND: a system call that was interrupted and may be issued again
_RED_ZONE = 128  # bytes below rsp that a function may use without moving it (System V ABI)
_BOOTSTRAP, _MEMFD_CALL = "<13Q", "<4Q"  # shim/trampoline.S, the lists of offsets


def instruction_pointer(regs: Registers) -> int:
    """Return the address of the next instruction."""
    return int(regs.rip)


def stack_pointer(regs: Registers) -> int:
    """Return the address of the top of the stack."""
    return int(regs.rsp)


def is_interrupted_ppoll(regs: Registers) -> bool:
    """Tell whether the thread was asleep in ppoll() when it was stopped, and would issue it again."""
    result = int(regs.rax) - (1 << 64 if int(regs.rax) >> 63 else 0)
    return int(regs.orig_rax) == PPOLL and result == _RESTARTNOHAND


class Entries(NamedTuple):
    """What the trampoline calls: addresses in the target."""

    dlopen: int
    dlsym: int
    errno_location: int


class Frame(NamedTuple):
    """What our code works with, for the place below the thread's stack where it must be written."""

    address: int
    data: bytes
    end: int
    """The first byte above that is not ours."""


def bootstrap(regs: Registers, entries: Entries, path: bytes, config: bytes, xstate_size: int) -> Frame:
    """Build `struct bootstrap` of shim/trampoline.S for the interrupted thread with these registers."""
    strings = [text + b"\0" for text in (path, b"ramlock_start", config)]
    end = int(regs.rsp) - _RED_ZONE
    xsave = (end - xstate_size) & ~63
    fixed = struct.calcsize(_BOOTSTRAP)
    address = (xsave - fixed - sum(map(len, strings))) & ~63
    places = []
    at = address + fixed
    for text in strings:
        places.append(at)
        at += len(text)
    data = struct.pack(
        _BOOTSTRAP,
        entries.dlopen,
        entries.dlsym,
        entries.errno_location,
        *places,
        xsave,
        int(regs.rip) - len(SYSCALL),
        int(regs.rsp),
        PPOLL,
        (1 << 64) - 1,
        0,
        0,
    )
    return Frame(address, data + b"".join(strings), end)


def memfd_call(regs: Registers, name: bytes, flags: int) -> Frame:
    """Build `struct memfd_call` of shim/trampoline.S for the interrupted thread with these registers."""
    end = int(regs.rsp) - _RED_ZONE
    data = struct.pack(_MEMFD_CALL, int(regs.rip) - len(SYSCALL), int(regs.rsp), PPOLL, flags) + name + b"\0"
    return Frame((end - len(data)) & ~63, data, end)


def go_to(regs: Registers, code: int, frame_at: int) -> Registers:
    """Return the registers that make the thread run our code at `code`, and the kernel forget the system call."""
    changed: Registers = Registers.from_buffer_copy(regs)
    changed.rip = code
    changed.rsp = frame_at
    changed.orig_rax = (1 << 64) - 1  # else the kernel would set rip back to issue the system call again
    return changed
