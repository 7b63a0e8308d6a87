"""Find guest RAM from outside, before and without any injection: what the sources need is read here.

`symbols` is QEMU's own list: ram_list is looked up in the process's memory, else in the symbol table of the file that
is mapped there, else in separate debug information of the same build-id. `maps` is the mappings against the command
line. Everything that is read belongs to a process that may be hostile, so it is bounded in size and in time.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from ramlock import confined, guestram, loaded, mapsource, procfs, qemuargs, ramlist
from ramlock.deadline import Deadline
from ramlock.errors import GuestRamMismatch, NotLocated
from ramlock.guestram import Block, Found, Malformed
from ramlock.memory import Mapping, Memory, Object, find_build_id

T = TypeVar("T")
SOURCES = ("auto", "qemu", "symbols", "maps")
DEBUG = Path("/usr/lib/debug/.build-id")
_TRIES, _PAUSE = 20, 0.01
_TIME = 1.0
"""Seconds that all tries may take together; a list as it should be takes a millisecond."""
_DWARF_TIME, _FILE_MOST = 1.0, 3.0
"""Seconds in which debug information has to be found, and after which reading a file is given up wherever it is."""
_FDS_MOST = 16384
_GUEST_MEMFD = "anon_inode:[kvm-gmem]"
_NEAR = "qemu_ram_foreach_block"  # a function in the unit that knows struct RAMBlock in full
_INSTEAD = "use a QEMU that exports its symbols, such as a distribution's build with modules"
_STATE_IS_SECRET = "the host cannot lock what it cannot see; nothing was changed"  # noqa: S105 no password


class _Where(NamedTuple):
    """Where the variable is, and what is known of the fields of a block."""

    address: int
    size: int
    layouts: Callable[[], list[ramlist.Layout]]


def outside(
    process: procfs.Process,
    source: str = "auto",
    proc: Path = procfs.PROC,
    debug: Path = DEBUG,
    memory: Memory | None = None,
) -> Found:
    """Find guest RAM of `process` by one of "symbols" and "maps", or by "auto": the better of both, which must agree.

    Returns no blocks when the machine has no RAM yet. Raises NotLocated when it is not found, or when the host cannot
    see it (a confidential guest); GuestRamMismatch when the sources do not agree; NoPermission, NotFound and VmGone.
    """
    if memory is not None:
        return _outside(process, memory, source, proc, debug)
    with Memory(process.pid, proc=proc) as own:
        return _outside(process, own, source, proc, debug)


def _outside(process: procfs.Process, memory: Memory, source: str, proc: Path, debug: Path) -> Found:
    _refuse_confidential(process, proc)
    where = _find(process, memory, proc, debug) if source != "maps" else None
    if source == "symbols" and where is None:
        raise NotLocated(
            f"the QEMU in process {process.pid} has no symbols: it exports none, its file and /usr/lib/debug have none",
            "install its debug symbols, or use --source maps",
        )
    tries = 3
    while True:
        listed = None if where is None else _patiently(memory, lambda: _read_list(process, memory, where, proc))
        if source == "symbols" and listed is not None:
            return listed
        try:
            mapped = from_maps(process, memory, proc)
        except NotLocated:
            if listed is None:
                raise
            return listed
        if listed is None:
            return mapped
        try:
            if listed.blocks:
                guestram.agree(listed, mapped)
            return listed if listed.certain or not mapped.certain else mapped
        except GuestRamMismatch:
            # Memory may have been plugged in between the two looks.
            tries -= 1
            if not tries:
                raise


def not_said(pid: int, *, shim: bool) -> NotLocated:
    """Return the error that says why there is no word of the shim's."""
    why = "the shim in it does not see it itself" if shim else "there is no shim in it"
    return NotLocated(f"process {pid} does not say where its guest RAM is: {why}", "use --source symbols or maps")


def only_probable(pid: int, found: Found) -> NotLocated:
    """Return the error that says why a guess is not good enough to lock memory."""
    return NotLocated(
        f"guest RAM of process {pid} is only probably where it seems to be: {found.doubt}",
        "look at it with ramlock locate, and lock it nevertheless with ramlock inject --allow-probable",
    )


def from_maps(process: procfs.Process, memory: Memory, proc: Path = procfs.PROC) -> Found:
    """Find guest RAM by its mappings. Raises NotLocated when nothing is found, VmGone when the process ends."""
    try:
        wanted = qemuargs.parse(process.cmdline)
        if wanted.confidential:
            raise _confidential(process.pid, "its command line asks for confidential-guest-support")
        sized = _Backings(process.pid, proc)
        return mapsource.locate(wanted, memory.maps(), sized, _huge_page(proc))
    except Malformed as error:
        raise NotLocated(
            f"guest RAM of process {process.pid} is not found in its mappings: {error}",
            f"its command line and its mappings do not fit together; {_INSTEAD}",
        ) from None


def _refuse_confidential(process: procfs.Process, proc: Path) -> None:
    """Refuse guests whose memory is in a guest_memfd, which nobody maps."""
    folder = proc / str(process.pid) / "fd"
    try:
        names = os.listdir(folder)[:_FDS_MOST]
    except OSError:
        return
    for name in names:
        with suppress(OSError):
            if os.readlink(folder / name) == _GUEST_MEMFD:
                raise _confidential(process.pid, "its memory is a guest_memfd")


def _confidential(pid: int, why: str) -> NotLocated:
    return NotLocated(f"process {pid} runs a confidential guest: {why}", _STATE_IS_SECRET)


def _read_list(process: procfs.Process, memory: Memory, where: _Where, proc: Path) -> Found:
    """Walk the list once. Raises Malformed and OSError."""
    maps = memory.maps()
    deadline = Deadline(_TIME)
    reason = Malformed("no layout is known")
    for layout in where.layouts():
        try:
            raws = ramlist.find(
                memory.read, where.address, where.size, guestram.areas(maps, writable=False), deadline, layout
            )
        except Malformed as error:
            reason = error
            continue
        if ramlist.guest_memfd(raws):
            raise _confidential(process.pid, "its memory is a guest_memfd")
        found = ramlist.judge(memory.read, raws, _uses(process))
        sized = _Backings(process.pid, proc)
        return found._replace(blocks=[_with_backing(block, maps, sized) for block in found.blocks])
    raise reason


def _uses(process: procfs.Process) -> dict[str, str]:
    try:
        return qemuargs.parse(process.cmdline).uses
    except Malformed:
        return {}


def _patiently(memory: Memory, read: Callable[[], T]) -> T:
    """Read a list that may change meanwhile; again while it makes no sense. Raises NotLocated."""
    deadline = Deadline(_TIME)
    reason = ""
    for _ in range(_TRIES):
        try:
            return read()
        except (Malformed, OSError) as error:
            reason = reason or str(error)
        if deadline.expired:
            break
        time.sleep(_PAUSE)
    raise NotLocated(
        f"QEMU's list of RAM blocks in process {memory.pid} makes no sense: {reason}",
        "this QEMU keeps it in a form that ramlock does not know; start the VM with ramlock run instead",
    )


def _with_backing(block: Block, maps: list[Mapping], sized: "_Backings") -> Block:
    """Add what a block is made of. Raises Malformed when it is not one kind of memory."""
    parts = [m for m in maps if m.start < block.end and block.host < m.end]
    kinds = {(m.shared, m.device, m.inode) for m in parts}
    if len(kinds) != 1:
        raise Malformed("a block of several kinds of memory")
    backing, page_size = sized(parts[0])
    if block.page_size > 4096:
        return block._replace(backing="hugetlb")
    return block._replace(backing=backing, page_size=block.page_size or page_size)


def _find(process: procfs.Process, memory: Memory, proc: Path, debug: Path) -> _Where | None:
    """Find the variable: in memory, in the mapped file, in debug information of the same build."""
    start = loaded.executable(memory, memory.maps(), proc).start
    program = Object(memory, start)
    symbol = program.find("ram_list")
    build_id = program.build_id()
    separate = debug / build_id[:2] / f"{build_id[2:]}.debug" if re.fullmatch("[0-9a-f]{6,128}", build_id) else None
    if symbol is not None and symbol.size >= 16:
        address = program.find(_NEAR)
        near = None if address is None else address.address - program.bias

        def when_known_fails() -> list[ramlist.Layout]:
            # The checks of every field leave no doubt; debug information takes much longer to read.
            return [ramlist.KNOWN, *_dwarf(separate, build_id, near)]

        return _Where(symbol.address, symbol.size, _lazily(when_known_fails))
    for path, trusted in ((proc / str(process.pid) / "exe", not build_id), (separate, False)):
        if path is None or (found := _in_file(path, build_id, program.bias, trusted=trusted)) is None:
            continue
        where, near = found

        def by_debug_information() -> list[ramlist.Layout]:
            return [*(_dwarf(path, build_id, near) or _dwarf(separate, build_id, near)), ramlist.KNOWN]  # noqa: B023 returns

        return where._replace(layouts=_lazily(by_debug_information))
    return None


def _lazily(make: Callable[[], list[ramlist.Layout]]) -> Callable[[], list[ramlist.Layout]]:
    """Make the list when it is asked for, once."""
    made: list[list[ramlist.Layout]] = []

    def get() -> list[ramlist.Layout]:
        if not made:
            made.append(make())
        return made[0]

    return get


def _open(path: Path) -> int:
    """Open a regular file. Raises OSError."""
    file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise OSError("no regular file")
    return file


def _in_file(path: Path, build_id: str, bias: int, *, trusted: bool) -> tuple[_Where, int | None] | None:
    """Look ram_list up in a file that is of this build; `trusted` is one that need not prove it."""
    if not path.exists():
        return None
    from ramlock import elf  # noqa: F401 a library that most QEMUs do not need, loaded once for all children

    found = confined.run(lambda: _symbols(path, build_id, trusted=trusted), _FILE_MOST) or {}
    address, size = found.get("ram_list", (0, 0))
    if size < 16:
        return None
    near = found[_NEAR][0] if _NEAR in found else None
    return _Where((address + bias) % (1 << 64), size, list), near


def _symbols(path: Path, build_id: str, *, trusted: bool) -> dict[str, tuple[int, int]]:
    from ramlock import elf

    file = _open(path)
    if not trusted and (not build_id or build_id not in map(find_build_id, elf.notes(file))):
        return {}
    return {name: (found.address, found.size) for name, found in elf.symbols(file, ("ram_list", _NEAR)).items()}


def _dwarf(path: Path | None, build_id: str, near: int | None) -> list[ramlist.Layout]:
    """Read the fields of struct RAMBlock; nothing when they are not found in time."""
    if path is None:
        return []
    # pyelftools takes sections of any size, also compressed ones.
    f = confined.run(lambda: _members(path, build_id, near), _FILE_MOST) or {}
    wanted = ("mr", "host", "used_length", "max_length", "flags", "idstr", "next", "page_size")
    if not all(0 <= f.get(name, -1) < 4096 for name in wanted):
        return []
    return [
        ramlist.Layout(
            mr=f["mr"],
            host=f["host"],
            used=f["used_length"],
            most=f["max_length"],
            flags=f["flags"],
            id=f["idstr"],
            next=f["next"],
            page_size=(f["page_size"],),
        )
    ]


def _members(path: Path, build_id: str, near: int | None) -> dict[str, int]:
    from ramlock import elf

    number = _open(path)
    with os.fdopen(number, "rb") as file:
        if build_id and build_id not in map(find_build_id, elf.notes(number)):
            return {}
        return elf.members(file, "RAMBlock", near, Deadline(_DWARF_TIME))


class _Backings:
    """Tells what a mapping is made of, by the mounts that the process sees."""

    def __init__(self, pid: int, proc: Path) -> None:
        self._path = proc / str(pid) / "mountinfo"
        self._types: dict[tuple[int, int], tuple[str, str]] | None = None

    def __call__(self, mapping: Mapping) -> tuple[str, int]:
        if mapping.path.startswith("/memfd:"):
            return "memfd", 4096
        if mapping.inode == 0 or mapping.path == "/dev/zero (deleted)":
            return "anonymous", 4096
        if self._types is None:
            self._types = self._mounts()
        kind, options = self._types.get(mapping.device, ("", ""))
        if kind == "hugetlbfs":
            found = re.search(r"\bpagesize=([0-9]{1,6})([KMG])", options)
            unit = {"K": 10, "M": 20, "G": 30}[found[2]] if found else 20
            return "hugetlb", (int(found[1]) if found else 2) << unit
        return ("shmem" if kind == "tmpfs" else "file"), 4096

    def _mounts(self) -> dict[tuple[int, int], tuple[str, str]]:
        types = {}
        try:
            with self._path.open("rb") as file:
                text = file.read(procfs.MAX_FILE).decode("utf-8", "replace")
        except OSError:
            return {}
        for line in text.split("\n"):
            before, _, after = line.partition(" - ")
            words, rest = before.split(), after.split()
            if len(words) > 2 and len(rest) > 1 and (found := re.fullmatch(r"(\d{1,9}):(\d{1,9})", words[2])):
                types[int(found[1]), int(found[2])] = rest[0], rest[-1]
        return types


def _huge_page(proc: Path) -> int:
    try:
        found = re.search(r"^Hugepagesize:\s+([0-9]{1,9}) kB", (proc / "meminfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return int(found[1]) << 10 if found else 2 << 20
