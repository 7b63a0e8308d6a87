"""Start QEMU with the shim preloaded: check that it can work, then become QEMU (exec, so the pid stays)."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from ramlock import elf, endpoint, host, procfs, qemuargs, room, shim
from ramlock.errors import CannotPreload, LimitTooLow, UsageError
from ramlock.guestram import Malformed
from ramlock.sizes import Size, format_apart
from ramlock.text import printable

QEMU_ONLY = "ram_list"
"""A symbol that nothing but a QEMU system emulator exports, and by which the shim knows one."""
SYMBOLS = frozenset({QEMU_ONLY, "qemu_get_aio_context", "qemu_ram_foreach_block", "qemu_ram_get_idstr"})
"""Some of what the shim finds guest RAM with; a QEMU exports all of it or nothing."""
MAX_SOCKET_PATH = 107
"""Bytes of the longest path that an address of unix(7) holds."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the shim is told through RAMLOCK_*; None leaves the environment as it is."""

    guarantee: Size | None = None
    order: str | None = None
    prefault: bool | None = None
    socket: Path | None = None
    allow_uid: int | None = None
    hold_budget: int | None = None
    """Microseconds."""
    threads: int | None = None
    host_reserve: int | None = None
    """Bytes; 0 for the default."""
    follow_discards: bool = False
    force: bool = False
    """Whether QEMU is started also when the guarantee does not seem to fit."""
    monitor: bool = False


@dataclass(frozen=True, slots=True)
class Launch:
    """A checked launch, ready to be executed."""

    program: Path
    argv: tuple[str, ...]
    environ: dict[str, str]
    warnings: tuple[str, ...]


def prepare(command: Sequence[str], options: Options, environ: Mapping[str, str]) -> Launch:
    """Check everything that can be checked before QEMU runs; nothing but our own RLIMIT_MEMLOCK is changed.

    Raises UsageError, CannotPreload, LimitTooLow, TooMuch.
    """
    endpoint.check_allowed(options.allow_uid, str(options.socket or "") or environ.get("RAMLOCK_SOCKET") or None)
    program = resolve(command[0], environ.get("PATH", os.defpath))
    library = shim.find(environ)
    facts = elf.read(program, SYMBOLS)
    elf.check_preload(facts, elf.read(library))
    _check_qemu(facts)
    _check_room(command, options)
    _raise_limit(options)
    warnings = []
    if facts.exported != SYMBOLS:
        warnings.append(f"{program} does not export its symbols: the shim will run, but cannot find guest RAM")
    return Launch(program, tuple(command), shim_environ(environ, library, options), tuple(warnings))


def execute(launch: Launch) -> NoReturn:
    """Become QEMU.

    Raises CannotPreload when the kernel will not run it.
    """
    # Python ignores these for itself, and what is ignored stays ignored after exec.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execve(launch.program, launch.argv, launch.environ)  # noqa: S606 no shell is wanted
    except OSError as error:
        raise CannotPreload(
            f"cannot run {launch.program}: {error.strerror}", "check that it is QEMU for this machine"
        ) from None


def resolve(command: str, path: str) -> Path:
    """Find the program as a shell would, along `path`.

    Raises CannotPreload when there is none that may be executed.
    """
    folders = [""] if "/" in command else path.split(os.pathsep)
    places = [Path(folder) / command for folder in folders]
    found = [place for place in places if os.path.isfile(place)]  # Path.is_file() fails in a folder closed to us
    for place in found:
        if os.access(place, os.X_OK):
            return place
    if found:
        raise CannotPreload(f"{found[0]} is not executable", "give the QEMU program")
    raise CannotPreload(f"there is no program {printable(command)}", "give QEMU's full path, or install it")


def shim_environ(environ: Mapping[str, str], library: Path, options: Options) -> dict[str, str]:
    """Return `environ` with the shim in front of LD_PRELOAD and the options as RAMLOCK_*.

    Raises UsageError when the socket's path is too long.
    """
    result = dict(environ)
    others = [entry for entry in environ.get("LD_PRELOAD", "").replace(":", " ").split() if entry != str(library)]
    result["LD_PRELOAD"] = ":".join([str(library), *others])
    if options.guarantee is not None:
        result["RAMLOCK_GUARANTEE"] = options.guarantee.for_shim()
    if options.order is not None:
        result["RAMLOCK_ORDER"] = options.order
    if options.prefault is not None:
        result["RAMLOCK_PREFAULT"] = str(int(options.prefault))
    if options.hold_budget is not None:
        result["RAMLOCK_HOLD_BUDGET"] = str(options.hold_budget)
    if options.threads is not None:
        result["RAMLOCK_THREADS"] = str(options.threads)
    if options.host_reserve is not None:
        result["RAMLOCK_HOST_RESERVE"] = str(options.host_reserve or "default")
    if options.follow_discards:
        result["RAMLOCK_FOLLOW_DISCARDS"] = "1"
    if options.monitor:
        result["RAMLOCK_MONITOR"] = "1"
    if options.allow_uid is not None:
        result["RAMLOCK_ALLOW_UID"] = str(options.allow_uid)
    if options.socket is not None:
        # QEMU may change its directory (-daemonize) before the shim listens.
        path = os.path.abspath(options.socket)
        if len(os.fsencode(path)) > MAX_SOCKET_PATH:
            raise UsageError(
                f"the socket's path is longer than {MAX_SOCKET_PATH} bytes", "choose a shorter one, such as in /run"
            )
        result["RAMLOCK_SOCKET"] = path
    return result


def own_environ(environ: Mapping[str, str], proc: Path = procfs.PROC) -> dict[str, str]:
    """Return our environment without the LC_CTYPE that Python sets for itself in the C locale (PEP 538)."""
    before = procfs.environ(os.getpid(), proc)
    return {key: value for key, value in environ.items() if key != "LC_CTYPE" or before is None or key in before}


def _check_qemu(facts: elf.Elf) -> None:
    """Refuse a program that is a QEMU system emulator neither by its name nor by what it exports.

    Guest RAM would be guaranteed in none, and a program that only starts QEMU would be given rights meant for QEMU.
    Raises CannotPreload.
    """
    names = str(facts.path), os.path.realpath(facts.path)
    if QEMU_ONLY not in facts.exported and not any(procfs.looks_like_qemu(name, ()) for name in names):
        raise CannotPreload(
            f"{printable(str(facts.path))} is no QEMU system emulator",
            "if it starts QEMU, put ramlock run between the two: taskset -c 1 ramlock run -- qemu-system-x86_64 ...",
        )


def _check_room(command: Sequence[str], options: Options) -> None:
    """Refuse a guarantee that this host, or a cgroup that QEMU will be in as we are, cannot hold now. Raises TooMuch.

    Memory in files and on huge pages is left to the shim, and so is a command line that is not understood.
    """
    if options.guarantee is None or options.force:
        return
    try:
        blocks = qemuargs.parse(command).blocks
    except Malformed:
        return
    ask = room.Ask(
        options.guarantee.resolve(sum(block.size for block in blocks)),
        options.host_reserve,
        hugetlb=sum(block.size for block in blocks if block.huge is not None),
        file_backed=sum(block.size for block in blocks if block.kind == "file"),
    )
    if error := room.check_sum(os.getpid(), ask) or room.check(os.getpid(), ask):
        raise error


def _raise_limit(options: Options) -> None:
    """Raise our RLIMIT_MEMLOCK, which QEMU inherits, as far as we may. Raises LimitTooLow when that cannot suffice."""
    limit = host.raise_memlock(0, None)
    wanted = options.guarantee
    if limit is None or wanted is None or wanted.kind != "bytes" or wanted.value <= limit:
        return
    if not host.locks_freely_after_exec():
        allowed, asked = format_apart(limit, wanted.value)
        raise LimitTooLow(
            f"the locked-memory limit of {allowed} is below the guarantee of {asked}",
            "raise it (ulimit -l as root, LimitMEMLOCK= in systemd, limits.conf), or run ramlock as root",
        )
