"""Give a process that cannot see the shim's file a memory file of its own with the same contents.

Theory of operation: a detour of its main thread (detour.py) makes an empty memory file, named after the shim's
build-id, and goes on. We then fill it from outside, through /proc/PID/fd, while nobody is stopped. The process keeps
it open for good: so its name for dlopen(), /proc/self/fd/N, never comes to mean another file. If we die, the next
injection finds the file by its name and completes it.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import fcntl
import os
import stat
import time
from pathlib import Path

from ramlock import detour, loaded, procfs, x86_64
from ramlock.deadline import Deadline
from ramlock.errors import CannotInject, NoPermission, VmGone
from ramlock.memory import Memory, Object
from ramlock.teststeps import step
from ramlock.tracee import Registers

_CLOEXEC, _ALLOW_SEALING, _NOEXEC_SEAL = 1, 2, 8
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_APPEARS = 5.0
_POLL = 0.0005


def provide(
    pid: int, shim: Path, build_id: str, timeout: float, proc: Path = procfs.PROC, pin: procfs.Pin | None = None
) -> str:
    """Return the path under which `pid` can open a memory file that holds the file `shim`.

    Waits at most `timeout` seconds for the main thread to be parked. Raises what detour.send() raises; CannotInject
    also when no such file can be made or filled. `pin` is the process that is meant.
    """
    contents = shim.read_bytes()
    name = f"ramlock-{build_id}"
    number = find(pid, name, proc)
    if number is None:
        _make(pid, shim, name, timeout, pin)
        number = _wait(pid, name, proc)
    _fill(pid, number, contents, proc)
    return f"/proc/self/fd/{number}"


def find(pid: int, name: str, proc: Path = procfs.PROC) -> int | None:
    """Return the descriptor of the memory file `name` in `pid`, None when it has none. Raises NoPermission, VmGone."""
    folder = proc / str(pid) / "fd"
    try:
        for entry in sorted(os.listdir(folder), key=int):
            try:
                if os.readlink(folder / entry) == f"/memfd:{name} (deleted)":
                    return int(entry)
            except FileNotFoundError:
                continue
    except PermissionError:
        raise NoPermission(f"no permission to see the files of process {pid}", "run ramlock as root") from None
    except OSError:
        raise VmGone("the VM ended while ramlock looked at it", "nothing is left to do") from None
    return None


def flags(proc: Path = procfs.PROC) -> int:
    """Return the flags for memfd_create() that this kernel, and its vm.memfd_noexec, takes.

    It need not be executable as a program, and where that is forbidden it may still be mapped by the loader.
    """
    if (proc / "sys/vm/memfd_noexec").exists():
        return _CLOEXEC | _NOEXEC_SEAL
    return _CLOEXEC | _ALLOW_SEALING


def _make(pid: int, shim: Path, name: str, timeout: float, pin: procfs.Pin | None) -> None:
    code = detour.load_code(shim)
    wanted = flags()

    def build(_target: detour.Target, regs: Registers, _xstate_size: int) -> x86_64.Frame:
        return x86_64.memfd_call(regs, os.fsencode(name), wanted)

    with Memory(pid, write=True) as memory:
        if pin is not None:
            pin.check()
        program = Object(memory, loaded.executable(memory, memory.maps()).start)
        detour.send(memory, program, code, code.memfd, build, timeout)


def _wait(pid: int, name: str, proc: Path) -> int:
    deadline = Deadline(_APPEARS)
    while (number := find(pid, name, proc)) is None:
        if deadline.expired:
            raise CannotInject(
                f"process {pid} could not make a memory file for the shim",
                "it may have too many files open; or start the VM with ramlock run instead",
            )
        time.sleep(_POLL)
    return number


def _fill(pid: int, number: int, contents: bytes, proc: Path) -> None:
    """Write the file, unless it has been written, and let nobody change it any more."""
    link = proc / str(pid) / "fd" / str(number)
    try:
        fd = _open(link)
        try:
            if _read(fd, len(contents)) != contents:
                step("fill-memfd")
                for at in range(0, len(contents), 1 << 20):
                    if os.pwrite(fd, contents[at : at + (1 << 20)], at) != len(contents[at : at + (1 << 20)]):
                        raise OSError(0, "a short write")
                os.ftruncate(fd, len(contents))
                if _read(fd, len(contents)) != contents:
                    raise OSError(0, "what was written is not what is there")
            if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SEAL:
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            step("fill-memfd-done")
        finally:
            os.close(fd)
    except OSError as error:
        raise CannotInject(
            f"the memory file for the shim in process {pid} cannot be filled: {error.strerror}",
            "start the VM with ramlock run instead",
        ) from None


def _open(link: Path) -> int:
    """Open the memory file, making sure that it is one: the process could have put another file in its place."""
    place = os.open(link, os.O_PATH | os.O_CLOEXEC)
    try:
        # Another file system might be the process's own (FUSE), and keep us waiting. Nothing has asked it yet.
        if _mount(place) != _memory_mount():
            raise OSError(0, "it is no memory file")
        facts = os.fstat(place)
        if not stat.S_ISREG(facts.st_mode) or facts.st_nlink != 0:
            raise OSError(0, "it is no memory file")
        fd = os.open(f"/proc/self/fd/{place}", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    finally:
        os.close(place)
    return fd


def _mount(fd: int) -> str:
    """Return the number of the mount that a file of ours belongs to, by the kernel's word alone."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        name, _, value = line.partition(":")
        if name == "mnt_id":
            return value.strip()
    raise OSError(0, "the kernel does not tell its mount")


def _memory_mount() -> str:
    """Return the number of the mount that every memory file is on; no other file can be put there."""
    fd = os.memfd_create("ramlock")
    try:
        return _mount(fd)
    finally:
        os.close(fd)


def _read(fd: int, size: int) -> bytes:
    """Read the whole file, or a byte more than `size`."""
    data = b""
    while len(data) <= size and (more := os.pread(fd, size + 1 - len(data), len(data))):
        data += more
    return data
