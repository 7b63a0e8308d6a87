"""What an ELF file says about itself: can a library be preloaded into it, and does it export QEMU's symbols?

The rules of LD_PRELOAD are ld.so(8)'s; when the kernel runs a program in secure-execution mode, and the loader then
ignores LD_PRELOAD, is said in getauxval(3) under AT_SECURE and in capabilities(7).
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
import stat
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from elftools.common.exceptions import DWARFError, ELFError
from elftools.elf.dynamic import DynamicSegment
from elftools.elf.elffile import ELFFile
from elftools.elf.hash import GNUHashTable

from ramlock.deadline import Deadline
from ramlock.errors import CannotPreload

# ld-linux-x86-64.so.2, ld-linux-aarch64.so.1, ld64.so.2 (ppc64le), ld.so.1: glibc's names on its architectures.
_GLIBC_LOADER = re.compile(r"ld-linux[\w.-]*\.so\.\d+|ld64\.so\.\d+|ld\.so\.\d+|ld-\d[\d.]*\.so", re.ASCII)
_MAX_INTERP = 4096
_SHT_SYMTAB, _SHT_NOTE = 2, 7
_SYMBOL = 24
# Bounds of what is read of a file that may be made up.
_SECTIONS_MOST, _TABLE_MOST, _NOTE_MOST, _PLACES_MOST, _HITS_MOST = 512, 64 << 20, 4096, 64, 4096
_DWARF_MOST = 256 << 20
# pyelftools answers a damaged file with whatever its parsers happen to stumble over.
_STUMBLES = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError, AssertionError)


@dataclass(frozen=True, slots=True)
class Elf:
    """The facts about one ELF file that decide whether a preload works."""

    path: Path
    machine: str
    """e_machine without its prefix, such as "X86_64"."""
    bits: int
    little_endian: bool
    loader: str | None
    """PT_INTERP; None for a static program and for a library."""
    exported: frozenset[str]
    """Those of the wanted symbols that .dynsym defines."""

    @property
    def kind(self) -> tuple[str, int, bool]:
        """What two files must have in common to live in one process."""
        return self.machine, self.bits, self.little_endian


def read(path: Path, wanted: Iterable[str] = ()) -> Elf:
    """Read the ELF file at `path` and see which of the `wanted` symbols it exports.

    Raises CannotPreload when it cannot be read, is a script or is no ELF file.
    """
    try:
        with path.open("rb") as file:
            if file.read(2) == b"#!":
                raise _script(path, file)
            return _read(path, file, wanted)
    except OSError as error:
        raise CannotPreload(
            f"cannot read {path}: {error.strerror}", "ramlock has to read it to see what it is; check its mode"
        ) from None
    except (ELFError, *_STUMBLES):
        raise CannotPreload(
            f"{path} is no valid ELF file, so nothing that this machine can run", "give the QEMU program itself"
        ) from None


def sections(path: Path, names: Iterable[str]) -> list[bytes]:
    """Return the contents of some sections of an ELF file of ours. Raises CannotPreload when it has not all of them."""
    try:
        with path.open("rb") as file:
            elf = ELFFile(file)
            return [bytes(_section(elf, name).data()) for name in names]
    except (OSError, ELFError, KeyError):
        raise CannotPreload(f"{path} is no shim that can be injected", "build it again with make") from None


def _section(elf: ELFFile, name: str) -> Any:
    found = elf.get_section_by_name(name)
    if found is None:
        raise KeyError(name)
    return found


def check_preload(program: Elf, shim: Elf) -> None:
    """Refuse a program into whose process the loader would not put the shim.

    Raises CannotPreload, saying which of the reasons it is.
    """
    if program.loader is None:
        raise CannotPreload(
            f"{program.path} is statically linked, nothing can be preloaded into it", "use a dynamically linked QEMU"
        )
    loader = program.loader.rsplit("/", 1)[-1]
    if not _GLIBC_LOADER.fullmatch(loader):
        libc = "musl" if "musl" in loader else f"the loader {program.loader}"
        raise CannotPreload(f"{program.path} uses {libc}, the shim needs glibc", "use a QEMU built for glibc")
    if program.kind != shim.kind:
        raise CannotPreload(
            f"{program.path} is {program.bits}-bit {program.machine}, the shim is {shim.bits}-bit {shim.machine}",
            "build the shim for that architecture and name it in RAMLOCK_SHIM",
        )
    reason = _secure_execution(program.path)
    if reason is not None:
        raise CannotPreload(
            f"{program.path} {reason}, so the loader ignores LD_PRELOAD", "use a copy of QEMU without that privilege"
        )


def _read(path: Path, file: IO[bytes], wanted: Iterable[str]) -> Elf:
    elf = ELFFile(file)
    loader = None
    exported: frozenset[str] = frozenset()
    for segment in elf.iter_segments():
        kind = segment["p_type"]
        if kind == "PT_INTERP":
            file.seek(segment["p_offset"])
            loader = os.fsdecode(file.read(min(segment["p_filesz"], _MAX_INTERP)).rstrip(b"\0"))
        elif kind == "PT_DYNAMIC" and isinstance(segment, DynamicSegment):
            exported = _exported(elf, segment, wanted)
    return Elf(path, str(elf["e_machine"]).removeprefix("EM_"), elf.elfclass, elf.little_endian, loader, exported)


def _exported(elf: ELFFile, dynamic: DynamicSegment, wanted: Iterable[str]) -> frozenset[str]:
    """Look names up as the loader does, in the hash table: walking QEMU's 40,000 symbols would take seconds."""
    names = frozenset(wanted)
    if not names:
        return names
    offset = dynamic.get_table_offset("DT_GNU_HASH")[1]
    if offset is not None:
        table = GNUHashTable(elf, offset, dynamic)
        found = [symbol for name in names if (symbol := table.get_symbol(name)) is not None]
    else:
        # Linked without a GNU hash table, which distributions have not done for fifteen years: walk after all.
        found = [symbol for symbol in dynamic.iter_symbols() if symbol.name in names]
    return frozenset(symbol.name for symbol in found if symbol["st_shndx"] != "SHN_UNDEF")


def _script(path: Path, file: IO[bytes]) -> CannotPreload:
    interpreter = os.fsdecode(file.readline(256)).strip()
    return CannotPreload(
        f"{path} is a script (run by {interpreter}), not QEMU itself",
        "give the QEMU program that the script starts, or set LD_PRELOAD inside the script",
    )


def _secure_execution(path: Path) -> str | None:
    """Say why the kernel would run `path` in secure-execution mode for us; None when it would not."""
    uid, gid = os.getuid(), os.getgid()
    if uid != os.geteuid() or gid != os.getegid():
        return "would run with borrowed rights (ramlock itself runs setuid)"
    if os.statvfs(path).f_flag & os.ST_NOSUID:
        return None
    info = path.stat()
    if info.st_mode & stat.S_ISUID and info.st_uid != uid:
        return "is setuid"
    if info.st_mode & stat.S_ISGID and info.st_mode & stat.S_IXGRP and info.st_gid != gid:
        return "is setgid"
    # To a real root file capabilities add nothing, and the kernel does not count them as privilege gained.
    if uid != 0 and _has_file_capabilities(path):
        return "has file capabilities"
    return None


def _has_file_capabilities(path: Path) -> bool:
    try:
        return bool(os.getxattr(path, "security.capability"))
    except OSError:
        return False


class Table(NamedTuple):
    """A symbol of .symtab: its address as the file has it, and its size in bytes."""

    address: int
    size: int


def symbols(file: int, names: Iterable[str]) -> dict[str, Table]:
    """Look symbols up in the .symtab of the open file, which may be a hostile one; none when it has no such table.

    Names are looked for as bytes: QEMU has a hundred thousand symbols. Raises OSError, and ValueError when the file is
    damaged.
    """
    try:
        table, strings = _symtab(file)
    except struct.error:
        raise ValueError("no ELF file") from None
    places: dict[int, str] = {}
    for name in names:
        word = name.encode() + b"\0"
        at = strings.find(word)
        while at >= 0 and len(places) < _PLACES_MOST:  # also at the end of a longer name, which the linker may share
            places[at] = name
            at = strings.find(word, at + 1)
    found: dict[str, Table] = {}
    for at, name in places.items():
        wanted = struct.pack("<I", at)
        index = table.find(wanted)
        for _ in range(_HITS_MOST):
            if index < 0:
                break
            if index % _SYMBOL == 0 and index + _SYMBOL <= len(table):
                section, address, size = struct.unpack_from("<HQQ", table, index + 6)
                if section:
                    found.setdefault(name, Table(address, size))
                    break
            index = table.find(wanted, index + 1)
    return found


def notes(file: int) -> list[bytes]:
    """Return the note sections of the open file, cut at 4 KiB. Raises OSError, and ValueError when it is damaged."""
    try:
        headers = _section_headers(file)
    except struct.error:
        raise ValueError("no ELF file") from None
    return [os.pread(file, min(size, _NOTE_MOST), offset) for kind, offset, size, _link in headers if kind == _SHT_NOTE]


def members(file: IO[bytes], struct_name: str, near: int | None, deadline: Deadline) -> dict[str, int]:
    """Return the members of a C structure and their offsets in bytes, from DWARF; none when they are not found in time.

    `near` is the address of a function whose compilation unit has the structure in full: QEMU has thousands of units.
    """
    try:
        elf = ELFFile(file)
        info = elf.get_section_by_name(".debug_info")
        if info is None or info.data_size > _DWARF_MOST:
            return {}
        dwarf = elf.get_dwarf_info(relocate_dwarf_sections=False, follow_links=False)
        offset = None
        if near is not None and (aranges := dwarf.get_aranges()) is not None:
            offset = aranges.cu_offset_at_addr(near)
        units = dwarf.iter_CUs() if offset is None else iter((dwarf.get_CU_at(offset),))
        for unit in units:
            if deadline.expired:
                break
            if found := _members(unit, struct_name.encode(), deadline):
                return found
    except (OSError, ELFError, DWARFError, *_STUMBLES):
        pass
    return {}


def _members(unit: Any, name: bytes, deadline: Deadline) -> dict[str, int]:
    for die in unit.get_top_DIE().iter_children():
        if deadline.expired:
            break
        attributes = die.attributes
        if die.tag != "DW_TAG_structure_type" or "DW_AT_declaration" in attributes or "DW_AT_name" not in attributes:
            continue
        if attributes["DW_AT_name"].value == name:
            return {
                child.attributes["DW_AT_name"].value.decode(): child.attributes["DW_AT_data_member_location"].value
                for child in die.iter_children()
                if {"DW_AT_name", "DW_AT_data_member_location"} <= child.attributes.keys()
                and isinstance(child.attributes["DW_AT_data_member_location"].value, int)
            }
    return {}


def _section_headers(file: int) -> list[tuple[int, int, int, int]]:
    """Type, offset, size and link of each section."""
    header = os.pread(file, 64, 0)
    if header[:6] != b"\x7fELF\x02\x01":
        raise ValueError("no 64-bit ELF file")
    (offset,) = struct.unpack_from("<Q", header, 40)
    entry, count = struct.unpack_from("<HH", header, 58)
    if entry != 64 or count > _SECTIONS_MOST or offset >= 1 << 63:
        raise ValueError("no section headers")
    table = os.pread(file, entry * count, offset)
    result = []
    for index in range(len(table) // 64):
        kind, place, size, link = struct.unpack_from("<4xI16xQQI", table, 64 * index)
        if place >= 1 << 62 or size >= 1 << 62:
            raise ValueError("sections beyond the file")
        result.append((kind, place, size, link))
    return result


def _symtab(file: int) -> tuple[bytes, bytes]:
    headers = _section_headers(file)
    for kind, offset, size, link in headers:
        if kind == _SHT_SYMTAB and link < len(headers) and size <= _TABLE_MOST and headers[link][2] <= _TABLE_MOST:
            return os.pread(file, size, offset), os.pread(file, headers[link][2], headers[link][1])
    return b"", b""
