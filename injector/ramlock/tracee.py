"""One thread under ptrace: stopped for a moment, looked at, let go; whatever happens, let go.

The only importer of python-ptrace, of which it uses the register structure and the raw call. Its process objects attach
with PTRACE_ATTACH, which sends a SIGSTOP, and lose signals that arrive meanwhile; PTRACE_SEIZE sends none, and a tracer
that dies leaves the thread running (ptrace(2)).
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import ctypes
import errno
import os
import signal
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Self

from ptrace.binding import func
from ptrace.binding.linux_struct import user_regs_struct
from ptrace.error import PtraceError

from ramlock.errors import AlreadyTraced, CannotInject, NoPermission, NotFound, VmGone
from ramlock.teststeps import step


class Registers(user_regs_struct):  # type: ignore[misc]  # python-ptrace has no types
    """The registers of a stopped thread, named as in user_regs_struct of the kernel's sys/user.h."""


_SEIZE, _INTERRUPT, _GETREGSET = 0x4206, 0x4207, 0x4204
_NT_X86_XSTATE = 0x202
_EVENT_STOP = 128
_WALL = 0x40000000
_SPIN = 0.002
_NAP = 0.0002
_XSTATE_MOST = 64 << 10


class NotStopped(Exception):
    """The thread did not stop within the deadline. It has been let go, or will be when this process ends."""


class Tracee:
    """A seized thread. Use as a context manager: leaving it detaches, also after an error."""

    def __init__(self, tid: int) -> None:
        self.tid = tid
        self._seized = False
        self._stopped = False
        self.lost = False
        """Whether it could not be let go: it is in the kernel for long, and stops there until this process ends."""
        self._xstate = ctypes.create_string_buffer(_XSTATE_MOST)  # made here: there it would keep the thread waiting

    def __enter__(self) -> Self:
        self.seize()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def seize(self) -> None:
        """Become the tracer; the thread runs on.

        Raises AlreadyTraced, NoPermission, or NotFound when there is no such thread.
        """
        step("ptrace-seize")
        try:
            self._ptrace(_SEIZE)
        except OSError as error:
            if error.errno == errno.ESRCH or _has_ended(self.tid):
                raise NotFound(f"there is no process {self.tid}", "see the running VMs with: ramlock list") from None
            if tracer := _tracer_of(self.tid):
                raise AlreadyTraced(self.tid, tracer) from None
            raise NoPermission(
                f"the kernel forbids to trace process {self.tid}",
                "run ramlock as root; where root may not either, see ramlock preflight",
            ) from None
        self._seized = True

    def stop(self, timeout: float) -> None:
        """Stop the thread with PTRACE_INTERRUPT and wait for it, at most `timeout` seconds.

        A signal that arrives first is delivered, and waited out. Raises NotStopped, VmGone, or CannotInject when a
        signal has stopped the whole process.
        """
        step("ptrace-interrupt")
        self._ptrace(_INTERRUPT)
        begun = time.monotonic()
        while True:
            pid, status = self._wait()
            if pid == 0:
                waited = time.monotonic() - begun
                if waited > timeout:
                    raise NotStopped
                if waited > _SPIN:
                    time.sleep(_NAP)
                continue
            if not os.WIFSTOPPED(status):
                self._seized = False
                raise VmGone("the VM ended while ramlock looked at it", "nothing is left to do")
            if status >> 16 == _EVENT_STOP:
                self._stopped = True
                if os.WSTOPSIG(status) != signal.SIGTRAP:  # a group-stop: ours waits behind it
                    raise CannotInject(
                        f"process {self.tid} was stopped by a signal just now, so nothing was done",
                        f"continue it first: kill -CONT {self.tid}",
                    )
                return
            # A signal on its way to the thread: hand it on at once, and wait for our own stop.
            self._ptrace(func.PTRACE_CONT, 0, os.WSTOPSIG(status))

    def registers(self) -> Registers:
        """Return the registers of the stopped thread."""
        step("ptrace-getregs")
        regs = Registers()
        self._ptrace(func.PTRACE_GETREGS, 0, ctypes.addressof(regs))
        return regs

    def set_registers(self, regs: Registers) -> None:
        """Set the registers of the stopped thread."""
        step("ptrace-setregs")
        self._ptrace(func.PTRACE_SETREGS, 0, ctypes.addressof(regs))
        step("ptrace-setregs-done")

    def poke(self, address: int, data: bytes) -> None:
        """Write into the memory of the stopped thread, eight bytes at a time; what is there beyond them stays.

        For kernels that forbid to write to code through /proc/PID/mem. Raises OSError.
        """
        for at in range(0, len(data), 8):
            word = data[at : at + 8]
            if len(word) < 8:
                there = self._ptrace(func.PTRACE_PEEKDATA, address + at) & (1 << 64) - 1
                word += int(there).to_bytes(8, "little")[len(word) :]
            self._ptrace(func.PTRACE_POKEDATA, address + at, int.from_bytes(word, "little"))

    def xstate_size(self) -> int:
        """Return the bytes that XSAVE needs here for everything that this CPU and kernel have switched on."""
        step("ptrace-getregset")
        vector = (ctypes.c_size_t * 2)(ctypes.addressof(self._xstate), _XSTATE_MOST)
        self._ptrace(_GETREGSET, _NT_X86_XSTATE, ctypes.addressof(vector))
        return int(vector[1])

    def release(self) -> None:
        """Let the thread run on, as if nothing had been. Never raises."""
        if not self._seized:
            return
        try:
            if not self._stopped:
                # Only a stopped thread can be detached. One that does not stop is detached when we end.
                with suppress(CannotInject):
                    self.stop(timeout=1.0)
            step("ptrace-detach")
            self._ptrace(func.PTRACE_DETACH)  # a group-stop goes on
            step("ptrace-detach-done")
        except NotStopped:
            self.lost = True
        except (OSError, VmGone):
            return
        finally:
            self._seized = self._stopped = False

    def _wait(self) -> tuple[int, int]:
        try:
            return os.waitpid(self.tid, os.WNOHANG | _WALL)
        except ChildProcessError:
            self._seized = False
            raise VmGone("the VM ended while ramlock looked at it", "nothing is left to do") from None

    def _ptrace(self, request: int, address: int = 0, data: int = 0) -> Any:
        """Raises VmGone when a thread that we have seized is no more, else OSError."""
        try:
            return func.ptrace(request, self.tid, address, data)
        except PtraceError as error:
            if error.errno == errno.ESRCH and request != _SEIZE:
                raise VmGone("the VM ended while ramlock looked at it", "nothing is left to do") from None
            raise OSError(error.errno, os.strerror(error.errno or errno.EIO)) from None


def _has_ended(tid: int) -> bool:
    try:
        with open(f"/proc/{tid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].split()[0] in (b"Z", b"X")
    except (OSError, IndexError):
        return True


def _tracer_of(tid: int) -> int:
    try:
        with open(f"/proc/{tid}/status", encoding="ascii", errors="replace") as file:
            for line in file:
                if line.startswith("TracerPid:"):
                    return int(line.split()[1])
    except (OSError, ValueError):
        pass
    return 0
