"""Facts about processes, out of /proc.

Every function takes the /proc root, so that a test can hand it a folder. Every file is read with a bound: a process
decides itself what its command line and environment say, and how long they are. See proc(5) for the formats.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import itertools
import os
import re
import select
import signal
import threading
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from ramlock.deadline import Deadline
from ramlock.errors import NoPermission, NotFound, VmGone

PROC = Path("/proc")
MAX_FILE = 1 << 20
"""Bytes read at most of any one file."""
LOOK_TIME = 2.0
"""Seconds that all QEMUs of a host together have to let their command lines be read."""

UUID = r"(?i:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})"
_QEMU = r"\.?(qemu-system-[\w.+-]+|qemu-kvm|qemu|kvm)(-wrapped)?( \(deleted\))?"


class Process(NamedTuple):
    """What /proc tells anyone about a process."""

    pid: int
    start_time: int
    """In clock ticks since boot: tells two processes of one pid apart."""
    state: str
    """One letter, as in ps: Z is a zombie, T is stopped."""
    uids: tuple[int, ...]
    """Real, effective, saved and file system uid."""
    inner_pid: int
    """The pid that the process sees itself: another one in a pid namespace."""
    locked: int
    """VmLck in bytes: the length of its locked mappings, resident or not."""
    exe: str | None
    """The executable; None when we may not know."""
    cmdline: tuple[str, ...]

    @property
    def ended(self) -> bool:
        """Whether it is dead and only waits for its parent."""
        return self.state in "ZX"

    @property
    def stopped(self) -> bool:
        """Whether a signal or a debugger has stopped it."""
        return self.state in "Tt"

    @property
    def name(self) -> str | None:
        """The VM's name from QEMU's -name; None when it has none."""
        return vm_name(self.cmdline)

    @property
    def uuid(self) -> str | None:
        """The VM's UUID from QEMU's -uuid, in lower case; None when it has none."""
        return vm_uuid(self.cmdline)


class Usage(NamedTuple):
    """The memory of a process, in bytes."""

    resident: int
    shared: int
    """The part of it that is shared memory, such as memory files: their swap is on nobody's account."""
    swapped: int
    """Without what is shared."""
    size: int
    """Its address space."""


def read(pid: int, proc: Path = PROC, *, cmdline: bool = True) -> Process:
    """Read what there is to know about `pid`; without `cmdline` nothing that it provides itself, which may take long.

    Raises NotFound when there is no such process, NoPermission when it may not be looked at.
    """
    try:
        status = _status(_bytes(proc / str(pid) / "status"))
        stat = _bytes(proc / str(pid) / "stat")
        # The command's name stands in parentheses and may itself contain spaces and parentheses.
        fields = stat[stat.rindex(b")") + 2 :].split()
        return Process(
            pid=pid,
            start_time=int(fields[19]),
            state=fields[0].decode("ascii"),
            uids=tuple(int(uid) for uid in status["Uid"].split()),
            inner_pid=int(status.get("NSpid", str(pid)).split()[-1]),
            locked=int(status.get("VmLck", "0 kB").split()[0]) * 1024,
            exe=_link(proc / str(pid) / "exe"),
            cmdline=_cmdline(pid, proc) if cmdline else (),
        )
    except (FileNotFoundError, ProcessLookupError):
        raise no_process(pid) from None
    except PermissionError:
        raise NoPermission(f"process {pid} may not be looked at", "run ramlock as root or as the VM's user") from None


def usage(pid: int, proc: Path = PROC) -> Usage:
    """Return what memory `pid` uses, by counters: smaps would be exact, and holds mmap_lock while it walks page tables.

    Raises NotFound when there is no such process.
    """
    status = _status_of(pid, proc)
    fields = ("VmRSS", "RssShmem", "VmSwap", "VmSize")
    return Usage(*(int(status.get(field, "0").split()[0]) * 1024 for field in fields))


def started(process: Process, proc: Path = PROC) -> float:
    """Return when a process was started, in seconds since 1970; 0 when the kernel does not say when it booted."""
    match = re.search(rb"^btime (\d+)$", _bytes(proc / "stat"), re.MULTILINE)
    return int(match[1]) + process.start_time / os.sysconf("SC_CLK_TCK") if match else 0.0


def environ(pid: int, proc: Path = PROC) -> dict[str, str] | None:
    """Return the environment that `pid` was started with; None when we may not know."""
    try:
        return parse_environ(_bytes(proc / str(pid) / "environ"))
    except OSError:
        return None


def parse_environ(block: bytes) -> dict[str, str]:
    """Read NAME=VALUE words, each ended by a zero byte."""
    pairs = (os.fsdecode(word).partition("=") for word in block.split(b"\0"))
    return {name: value for name, equals, value in pairs if equals}


def memlock_limit(pid: int | str, proc: Path = PROC) -> tuple[int | None, int | None]:
    """Return the soft and hard RLIMIT_MEMLOCK of `pid` in bytes; None is unlimited.

    Raises NotFound when there is no such process.
    """
    return _limit(pid, "Max locked memory", proc)


def stack_limit(pid: int, proc: Path = PROC) -> int | None:
    """Return the soft RLIMIT_STACK of `pid` in bytes; None is unlimited.

    Raises NotFound when there is no such process.
    """
    return _limit(pid, "Max stack size", proc)[0]


def _limit(pid: int | str, name: str, proc: Path) -> tuple[int | None, int | None]:
    try:
        text = _bytes(proc / str(pid) / "limits").decode("ascii", "replace")
    except OSError:
        raise no_process(pid) from None
    match = re.search(rf"^{name}\s+(\S+)\s+(\S+)", text, re.MULTILINE)
    if match is None:
        return None, None
    soft, hard = (None if word == "unlimited" else int(word) for word in match.groups())
    return soft, hard


def capabilities(pid: int | str, which: str, proc: Path = PROC) -> int:
    """Return a capability set of `pid` as a bit mask; `which` is "CapEff", "CapBnd", "CapAmb" and so on.

    Raises NotFound when there is no such process.
    """
    return int(_status_of(pid, proc).get(which, "0"), 16)


def groups(pid: int, proc: Path = PROC) -> set[int]:
    """Return the groups that count when `pid` opens files: its file system gid and the supplementary ones.

    Raises NotFound when there is no such process.
    """
    status = _status_of(pid, proc)
    return {int(gid) for gid in (status.get("Gid", "").split()[-1:] + status.get("Groups", "").split())}


def tracer(pid: int, proc: Path = PROC) -> int:
    """Return the pid of the process that traces `pid`, 0 when none does.

    Raises NotFound when there is no such process.
    """
    return int(_status_of(pid, proc).get("TracerPid", "0"))


def seccomp(pid: int, proc: Path = PROC) -> tuple[int, int | None]:
    """Return the seccomp mode of `pid` (0 is none) and the number of its filters; None where the kernel does not say.

    Raises NotFound when there is no such process.
    """
    status = _status_of(pid, proc)
    count = status.get("Seccomp_filters")
    return int(status.get("Seccomp", "0")), None if count is None else int(count)


def sandboxed(cmdline: tuple[str, ...]) -> bool:
    """Tell whether a QEMU command line asks for QEMU's own sandbox; the last word counts."""
    result = False
    for option, value in itertools.pairwise(cmdline):
        if option in ("-sandbox", "--sandbox"):
            for index, part in enumerate(split_options(value)):
                key, equals, rest = part.partition("=")
                if equals and key == "enable":
                    result = rest in ("on", "yes", "true", "y")
                elif not equals and index == 0:
                    result = part == "on"
    return result


def stopping(pid: int, proc: Path = PROC) -> bool:
    """Tell whether a signal has stopped `pid` or is about to, also while its main thread is traced."""
    try:
        status = _status(_bytes(proc / str(pid) / "status"))
        if int(status.get("ShdPnd", "0"), 16) & 1 << signal.SIGSTOP - 1:
            return True
        # A stop that has begun shows in every other thread.
        other = next((tid for tid in os.listdir(proc / str(pid) / "task") if tid != str(pid)), None)
        return other is not None and b") T" in _bytes(proc / str(pid) / "task" / other / "stat")
    except OSError:
        return False


def threads(pid: int, proc: Path = PROC) -> list[str]:
    """Return the names of the threads of `pid`; none when it has ended."""
    names = []
    try:
        for entry in os.listdir(proc / str(pid) / "task"):
            try:
                names.append(os.fsdecode(_bytes(proc / str(pid) / "task" / entry / "comm").strip()))
            except OSError:
                continue  # the thread has ended
    except OSError:
        pass
    return names


def same_root(pid: int, proc: Path = PROC) -> bool:
    """Tell whether a path means the same file to `pid` as to us; True when we may not know."""
    try:
        ours, theirs = os.stat(proc / "self/ns/mnt"), os.stat(proc / str(pid) / "ns/mnt")
        return ours.st_ino == theirs.st_ino and os.path.samefile(proc / "self/root/.", proc / str(pid) / "root/.")
    except OSError:
        return True


def hides_cgroups(pid: int, proc: Path = PROC) -> bool:
    """Tell whether `pid` is in another cgroup namespace, and so may not see all ancestors of its cgroups."""
    try:
        ours, theirs = os.stat(proc / "self/ns/cgroup"), os.stat(proc / str(pid) / "ns/cgroup")
    except OSError:
        return False  # a kernel without them, or not ours to know
    return ours.st_ino != theirs.st_ino


def qemus(proc: Path = PROC, seconds: float = LOOK_TIME) -> list[Process]:
    """Return every process that looks like a QEMU system emulator, in order of pid.

    All are read at once, each by a thread of its own: one that keeps its reader waiting is left behind, and after
    `seconds` it is told with an empty command line, and so without a name.
    """
    found: dict[int, Process] = {}

    def look(pid: int) -> None:
        with suppress(NotFound, NoPermission, OSError, ValueError, LookupError):  # it has ended meanwhile
            found[pid] = read(pid, proc)

    deadline = Deadline(seconds)
    readers = [(pid, threading.Thread(target=look, args=(pid,), daemon=True)) for pid in candidates(proc)]
    for _, reader in readers:
        with suppress(RuntimeError):  # there are too many threads: then it is one that did not answer
            reader.start()
    for pid, reader in readers:
        if reader.ident is not None:
            reader.join(deadline.remaining)
        if pid not in found and (reader.ident is None or reader.is_alive()):
            with suppress(NotFound, NoPermission, OSError, ValueError, LookupError):
                found[pid] = read(pid, proc, cmdline=False)
    return [
        process
        for _, process in sorted(found.items())
        if not process.ended and looks_like_qemu(process.exe, process.cmdline)
    ]


def executable(pid: int, proc: Path = PROC) -> str | None:
    """Return the path of the program that `pid` runs; None when we may not know."""
    return _link(proc / str(pid) / "exe")


def candidates(proc: Path = PROC) -> list[int]:
    """Return the pids that may be QEMUs, in order, without reading anything that a process itself provides.

    A process can have its command line come out of a file system of its own, and then whoever reads it waits.
    """
    found = []
    for pid in sorted(int(entry) for entry in os.listdir(proc) if entry.isdecimal()):
        try:
            maybe = looks_like_qemu(os.readlink(proc / str(pid) / "exe"), ())
        except PermissionError:
            maybe = _has_memory(pid, proc)  # another user's, of which only its command line tells
        except OSError:
            maybe = False  # a kernel thread, or it has ended
        if maybe:
            found.append(pid)
    return found


def _has_memory(pid: int, proc: Path) -> bool:
    """Whether it is no thread of the kernel's."""
    try:
        return not _bytes(proc / str(pid) / "statm").startswith(b"0 ")
    except OSError:
        return False


def looks_like_qemu(exe: str | None, cmdline: tuple[str, ...]) -> bool:
    """Tell whether a process looks like a QEMU system emulator. Anyone can look like one."""
    program = exe or (cmdline[0] if cmdline else "")
    return re.fullmatch(_QEMU, program.rsplit("/", 1)[-1], re.ASCII) is not None


def vm_name(cmdline: tuple[str, ...]) -> str | None:
    """Return the name that a QEMU command line gives its VM, or None.

    `-name web` and `-name guest=web,debug-threads=on` are the same; a comma is written twice; the last one counts.
    """
    name = None
    for option, value in itertools.pairwise(cmdline):
        if option not in ("-name", "--name"):
            continue
        for index, part in enumerate(split_options(value)):
            key, equals, rest = part.partition("=")
            if equals and key == "guest":
                name = rest
            elif not equals and index == 0:
                name = part
    return name


def vm_uuid(cmdline: tuple[str, ...]) -> str | None:
    """Return the UUID that a QEMU command line gives its VM, in lower case, or None; the last one counts."""
    uuid = None
    for option, value in itertools.pairwise(cmdline):
        if option in ("-uuid", "--uuid") and re.fullmatch(UUID, value, re.ASCII):
            uuid = value.lower()
    return uuid


def split_options(value: str) -> list[str]:
    """Split QEMU's `a,b=c,,d` into "a" and "b=c,d"."""
    parts = []
    words: list[str] = []  # of one part; joined at its end, for a line of commas may be long
    for piece in re.split(r"(,,|,)", value):
        if piece == ",":
            parts.append("".join(words))
            words = []
        else:
            words.append("," if piece == ",," else piece)
    return [*parts, "".join(words)]


class Pin:
    """Holds on to a process, so that its pid cannot come to mean another one unnoticed (pidfd_open(2))."""

    def __init__(self, pid: int) -> None:
        """Pin `pid`. Raises NotFound when there is no such process."""
        self.pid = pid
        try:
            self._fd = os.pidfd_open(pid)
        except OSError:
            raise no_process(pid) from None

    @property
    def alive(self) -> bool:
        """Whether the process still runs, and so whether what was read of its pid was about it."""
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return not poll.poll(0)

    def check(self) -> None:
        """Raise VmGone when the process has ended."""
        if not self.alive:
            raise gone(self.pid)

    def close(self) -> None:
        """Let go of it."""
        os.close(self._fd)


def gone(pid: int) -> VmGone:
    """Return the error for a process that has ended while it was worked with."""
    return VmGone(f"the VM (pid {pid}) has ended", "look into QEMU's own log for why")


def no_process(pid: int | str) -> NotFound:
    """Return the error for a process that is not there."""
    return NotFound(f"there is no process {pid}", "see the running VMs with: ramlock list")


def _status_of(pid: int | str, proc: Path) -> dict[str, str]:
    """Read /proc/PID/status. Raises NotFound when there is no such process."""
    try:
        return _status(_bytes(proc / str(pid) / "status"))
    except OSError:
        raise no_process(pid) from None


def _bytes(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MAX_FILE)


def _cmdline(pid: int, proc: Path) -> tuple[str, ...]:
    return tuple(os.fsdecode(word) for word in _bytes(proc / str(pid) / "cmdline").split(b"\0")[:-1])


def _link(path: Path) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _status(text: bytes) -> dict[str, str]:
    lines = (line.partition(":") for line in text.decode("utf-8", "replace").split("\n"))
    return {key: value.strip() for key, _, value in lines}
