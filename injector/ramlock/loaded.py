"""What the dynamic loader of another process has loaded, and under which names.

The loader's own list (struct r_debug and struct link_map of glibc's link.h) has the names that dlopen() compares
with; /proc/PID/maps has not.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import struct
from pathlib import Path
from typing import NamedTuple

from ramlock import procfs
from ramlock.errors import Refused
from ramlock.memory import Mapping, Memory, Object

_AT_PHDR = 3
_OBJECTS_MOST = 4096
_NAME_MOST = 4096


class Loaded(NamedTuple):
    """A shared object, as the loader knows it."""

    base: int
    """The address of its ELF header."""
    name: str
    """The name by which dlopen() finds it again."""


class Shim(NamedTuple):
    """A ramlock.so in the process. It stays there after it was ejected."""

    base: int
    name: str
    build_id: str


def executable(memory: Memory, maps: list[Mapping], proc: Path = procfs.PROC) -> Mapping:
    """Return the first mapping of the main program. Raises Refused when it cannot be found, VmGone."""
    try:
        with open(proc / str(memory.pid) / "auxv", "rb") as file:
            words = file.read(4096)
    except OSError:
        words = b""
    for key, value in struct.iter_unpack("<QQ", words[: len(words) & ~15]):
        if key == _AT_PHDR:
            for mapping in maps:
                if mapping.offset == 0 and mapping.readable and mapping.holds(value, value + 56):
                    return mapping
    memory.maps()  # or it has ended since
    raise Refused(f"the program in process {memory.pid} cannot be found in its memory", "nothing was changed")


def objects(memory: Memory, program: Object) -> list[Loaded]:
    """Return what the loader's list holds, in the order of loading. Raises Refused when the list makes no sense."""
    result: list[Loaded] = []
    try:
        at = memory.integer(program.debug_address + 8) if program.debug_address else 0
        while at:
            if len(result) == _OBJECTS_MOST:
                raise ValueError
            base, name_at, _dynamic, at = struct.unpack("<4Q", memory.read(at, 32))
            result.append(Loaded(base, _text(memory, name_at)))
    except (OSError, ValueError):
        raise Refused(
            f"the loader's list of libraries in process {memory.pid} makes no sense", "try again; nothing was changed"
        ) from None
    return result


def shims(memory: Memory, program: Object, maps: list[Mapping], own: os.stat_result | None = None) -> list[Shim]:
    """Return the ramlock.so files that are loaded, the latest last; `own` is a file that is one, whatever its name.

    Raises Refused when the loader's list makes no sense.
    """
    candidates = {
        m.start for m in maps if m.offset == 0 and ("ramlock" in m.path or (own is not None and m.inode == own.st_ino))
    }
    result = []
    for found in objects(memory, program) if candidates else []:
        if found.base in candidates:
            shim = Object(memory, found.base)
            if shim.find("ramlock_start"):
                result.append(Shim(found.base, found.name, shim.build_id()))
    return result


def _text(memory: Memory, at: int) -> str:
    """Read a string. It may lie so near the end of a mapping that only part of a page can be read."""
    data = b""
    while (end := data.find(b"\0")) < 0:
        if len(data) >= _NAME_MOST:
            raise ValueError
        data += memory.read(at + len(data), 64 - (at + len(data)) % 64)
    return os.fsdecode(data[:end])
