"""The memory of another process: its mappings, its bytes, and the symbols of the objects loaded in it.

Symbols are looked up in the process's own memory, through the GNU hash tables that its loader uses, not in the file at
the path: after a package upgrade that is another file. Every byte may have been made up by a hostile process, so all is
bounded and checked. Formats: proc(5), elf(5), and the ELF gABI for the dynamic section.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import errno
import os
import re
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, Self

from ramlock import procfs
from ramlock.errors import NoPermission, Refused, VmGone

_MAPS_MOST = 32 << 20
_LINE = re.compile(
    rb"([0-9a-f]+)-([0-9a-f]+) ([r-])([w-])([x-])([ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)\s*(.*)"
)
_PT_LOAD, _PT_DYNAMIC, _PT_INTERP, _PT_NOTE = 1, 2, 3, 4
_DT_STRTAB, _DT_SYMTAB, _DT_DEBUG, _DT_GNU_HASH = 5, 6, 21, 0x6FFFFEF5
_DYNAMIC_MOST, _CHAIN_MOST, _PHDRS_MOST, _NOTES_MOST, _LOADER_MOST = 512, 4096, 64, 4096, 4096
_NT_GNU_BUILD_ID = 3


class Mapping(NamedTuple):
    """One line of /proc/PID/maps."""

    start: int
    end: int
    readable: bool
    writable: bool
    executable: bool
    shared: bool
    offset: int
    device: tuple[int, int]
    inode: int
    path: str
    """As the kernel shows it: a path, perhaps with " (deleted)", or a word like [stack]; "" when anonymous."""

    def holds(self, start: int, end: int) -> bool:
        """Tell whether [start, end) lies in this mapping."""
        return self.start <= start <= end <= self.end


def parse_maps(text: bytes) -> list[Mapping]:
    """Parse /proc/PID/maps.

    Raises ValueError when a line is not of that form.
    """
    mappings = []
    # Of what could end a line the kernel escapes only the newline in a file's name, which whoever maps it chooses.
    for line in text.removesuffix(b"\n").split(b"\n") if text else ():
        if not (found := _LINE.fullmatch(line)):
            raise ValueError(f"not a line of /proc/PID/maps: {line[:80]!r}")
        start, end, read, write, execute, share, offset, major, minor, inode, path = found.groups()
        mappings.append(
            Mapping(
                int(start, 16),
                int(end, 16),
                read == b"r",
                write == b"w",
                execute == b"x",
                share == b"s",
                int(offset, 16),
                (int(major, 16), int(minor, 16)),
                int(inode),
                os.fsdecode(path),
            )
        )
    return mappings


class Memory:
    """An open /proc/PID/mem. Opening it takes the right to trace the process."""

    def __init__(self, pid: int, *, write: bool = False, proc: Path = procfs.PROC) -> None:
        self.pid = pid
        self._folder = proc / str(pid)
        try:
            self._fd = os.open(self._folder / "mem", (os.O_RDWR if write else os.O_RDONLY) | os.O_CLOEXEC)
        except PermissionError:
            raise NoPermission(
                f"no permission to read the memory of process {pid}", "run ramlock as root or as the user of the VM"
            ) from None
        except OSError:
            raise procfs.no_process(pid) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close it."""
        os.close(self._fd)

    def maps(self) -> list[Mapping]:
        """Read the mappings. Raises VmGone when the process has none any more, Refused when they make no sense."""
        try:
            with open(self._folder / "maps", "rb") as file:
                mappings = parse_maps(file.read(_MAPS_MOST))
        except OSError:
            mappings = []
        except ValueError:
            raise Refused(f"the mappings of process {self.pid} are not understood", "nothing was changed") from None
        if not mappings:
            raise VmGone("the VM ended while ramlock looked at it", "nothing is left to do")
        return mappings

    def read(self, address: int, size: int) -> bytes:
        """Read exactly `size` bytes. Raises OSError when they are not all there, VmGone when nothing is any more."""
        if not 0 <= address < 1 << 63:
            raise OSError(errno.EFAULT, "no address")
        try:
            data = os.pread(self._fd, size, address)
        except OSError:
            self._check()
            raise
        if len(data) != size:
            self._check()
            raise OSError(errno.EIO, "short read of process memory")
        return data

    def write(self, address: int, data: bytes) -> None:
        """Write all of `data`, also where the process itself may not. Raises OSError or VmGone."""
        try:
            written = os.pwrite(self._fd, data, address)
        except OSError:
            self._check()
            raise
        if written != len(data):
            self._check()
            raise OSError(errno.EIO, "short write of process memory")

    def _check(self) -> None:
        """Raise VmGone when the process has no memory any more."""
        try:
            with open(self._folder / "maps", "rb") as file:
                alive = bool(file.read(1))
        except OSError:
            alive = False
        if not alive:
            raise VmGone("the VM ended while ramlock looked at it", "nothing is left to do")

    def integer(self, address: int) -> int:
        """Read a 64-bit unsigned number."""
        return int(struct.unpack("<Q", self.read(address, 8))[0])


class Symbol(NamedTuple):
    """Where a symbol is."""

    address: int
    size: int


class Segment(NamedTuple):
    """A loaded segment, at the addresses where it is."""

    start: int
    end: int
    executable: bool


class Object:
    """An ELF object in a process's memory, loaded at `base` (where its ELF header is)."""

    def __init__(self, memory: Memory, base: int) -> None:
        """Raises Refused when there is no 64-bit little-endian ELF object at `base`, or a damaged one."""
        self._memory = memory
        try:
            self._read_headers(base)
        except (OSError, struct.error, ValueError, OverflowError):
            raise Refused(
                f"the object at {base:#x} in process {memory.pid} is no valid ELF object", "nothing was changed"
            ) from None

    def _read_headers(self, base: int) -> None:
        header = self._memory.read(base, 64)
        if header[:6] != b"\x7fELF\x02\x01":
            raise ValueError
        self.machine, offset, size, count = (
            *struct.unpack_from("<H", header, 18),
            *struct.unpack_from("<Q", header, 32),
            *struct.unpack_from("<HH", header, 54),
        )
        if size != 56 or not 0 < count <= _PHDRS_MOST:
            raise ValueError
        table = self._memory.read(base + offset, size * count)
        headers = [struct.unpack_from("<IIQQQQQQ", table, i * size) for i in range(count)]
        first = min(h[3] & ~0xFFF for h in headers if h[0] == _PT_LOAD)
        self.bias = base - first
        self.segments = [
            Segment(self.bias + h[3], self.bias + h[3] + h[6], bool(h[1] & 1)) for h in headers if h[0] == _PT_LOAD
        ]
        self.loader: str | None = None
        """The path of the program's dynamic loader; None for one that has none."""
        for h in headers:
            if h[0] == _PT_INTERP:
                data = self._memory.read(self.bias + h[3], min(h[5], _LOADER_MOST))
                self.loader = os.fsdecode(data.partition(b"\0")[0])
        self._notes = [(self.bias + h[3], min(h[5], _NOTES_MOST)) for h in headers if h[0] == _PT_NOTE]
        self._dynamic: dict[int, int] = {}
        for h in headers:
            if h[0] == _PT_DYNAMIC:
                data = self._memory.read(self.bias + h[3], min(h[6], 16 * _DYNAMIC_MOST) & ~15)
                for tag, value in struct.iter_unpack("<QQ", data):
                    if tag == 0:
                        break
                    self._dynamic.setdefault(tag, value)

    def _address(self, tag: int) -> int:
        """The address in a dynamic entry; glibc relocates them in place, other loaders do not."""
        value = self._dynamic[tag]
        return value if value >= self.segments[0].start else value + self.bias

    def find(self, name: str) -> Symbol | None:
        """Look a defined symbol up. Raises Refused when the tables are damaged."""
        try:
            return self._find(os.fsencode(name))
        except KeyError:
            return None  # nothing dynamic, or no GNU hash table
        except (OSError, struct.error, OverflowError, ZeroDivisionError):
            raise Refused(
                f"the symbol tables of an object in process {self._memory.pid} are damaged", "nothing was changed"
            ) from None

    def find_first(self, names: Iterable[str]) -> Symbol | None:
        """Look several names up and return the first that is there."""
        return next((symbol for name in names if (symbol := self.find(name))), None)

    def _find(self, name: bytes) -> Symbol | None:
        table, symbols, strings = map(self._address, (_DT_GNU_HASH, _DT_SYMTAB, _DT_STRTAB))
        buckets, first, bloom, _ = struct.unpack("<4I", self._memory.read(table, 16))
        wanted = 5381
        for byte in name:
            wanted = (wanted * 33 + byte) & 0xFFFFFFFF
        bucket_at = table + 16 + 8 * bloom + 4 * (wanted % buckets)
        index = struct.unpack("<I", self._memory.read(bucket_at, 4))[0]
        if index < first:
            return None
        chain = table + 16 + 8 * bloom + 4 * buckets
        for i in range(index, index + _CHAIN_MOST):
            found = struct.unpack("<I", self._memory.read(chain + 4 * (i - first), 4))[0]
            if found | 1 == wanted | 1:
                name_at, _info, _other, section, value, size = struct.unpack(
                    "<IBBHQQ", self._memory.read(symbols + 24 * i, 24)
                )
                if section and self._memory.read(strings + name_at, len(name) + 1) == name + b"\0":
                    return Symbol(self.bias + value, size)
            if found & 1:
                break
        return None

    @property
    def debug_address(self) -> int:
        """Where the loader's list of objects begins (struct r_debug), in the main program only; 0 when unknown."""
        return self._dynamic.get(_DT_DEBUG, 0)

    def build_id(self) -> str:
        """Return the build-id in hexadecimal digits; "" when there is none."""
        for address, size in self._notes:
            try:
                if found := find_build_id(self._memory.read(address, size)):
                    return found
            except OSError:
                continue
        return ""


def find_build_id(notes: bytes) -> str:
    """Find the build-id in a note segment, as hexadecimal digits; "" when there is none."""
    at = 0
    while at + 12 <= len(notes):
        name_size, size, kind = struct.unpack_from("<III", notes, at)
        name_at = at + 12
        at = name_at + (name_size + 3 & ~3)
        if kind == _NT_GNU_BUILD_ID and notes[name_at : name_at + name_size] == b"GNU\0":
            return notes[at : at + size].hex() if at + size <= len(notes) else ""
        at += size + 3 & ~3
    return ""
