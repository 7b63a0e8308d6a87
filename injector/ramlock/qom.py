"""Whose a RAM block is: from its memory region to the object that owns it, in the memory of a QEMU.

Every step is checked, and none depends on where a version of QEMU has its fields: in the memory region the pointer to
the block is looked for, and the owner stands beside it (struct MemoryRegion). An object begins with its class, a class
with its type, a type with its name (QEMU's include/qom/object.h and qom/object.c).
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import re
import struct
from collections.abc import Callable, Sequence
from typing import NamedTuple

Read = Callable[[int, int], bytes]

_REGION, _FIRST, _LAST = 320, 40, 160
_CONTAINER_LAST = 5
_NAME_MOST = 64
_TYPE = re.compile(rb"[A-Za-z][A-Za-z0-9_.,:+-]*")
_PARTLY = ("virtio-mem", "ram-discard-manager")
"""What a memory region of virtio-mem points to: the device, from 6.1; what manages several such devices, from 11.1."""
_DEVICE = 2048
"""Within so many bytes of theirs, the device points to its backend, the manager to its region."""
_SIZE, _FLAGS = 40, 48
"""In struct HostMemoryBackend, which begins with struct Object."""


class Owner(NamedTuple):
    """The object that a RAM block belongs to."""

    type: str
    """ "memory-backend-ram"; "" when the block belongs to nobody."""
    flags: bytes = b""
    """Of a memory backend: its booleans, beginning with `merge`."""
    virtio_mem: bool = False
    """Whether a virtio-mem device decides which parts of it are there."""
    holder: str = ""
    """The type of what owns the region that the block was put into; "" when it is only shown in others by aliases."""

    @property
    def backend(self) -> bool:
        """Whether it is a memory backend."""
        return self.type.startswith("memory-backend")

    def in_use(self, *, old: bool) -> bool:
        """Whether a machine or device uses this backend; `old` is before 5.0, which had another boolean in between."""
        return bool(self.flags[5 if old else 4])


def owner(read: Read, region: int, block: int) -> Owner | None:
    """Return the owner of the RAM block at `block`, whose memory region is at `region`; None when it is not found."""
    if not _pointer(region):
        return None
    try:
        data = read(region, _REGION)
    except OSError:
        return None
    words = struct.unpack(f"<{_REGION // 8}Q", data)
    for index in range(_FIRST // 8, _LAST // 8):
        if words[index] == block:
            break
    else:
        return None
    at = words[index + 1]
    if at == 0:
        return Owner("")
    name = _type(read, at)
    if not name:
        return None
    if not name.startswith("memory-backend"):
        return Owner(name)
    try:
        flags = read(at + _FLAGS, 6)
    except OSError:
        return None
    if any(flag > 1 for flag in flags):
        return None
    manager = any(_manages(read, word, (region, at)) for word in words[index + 2 :] if _pointer(word))
    return Owner(name, flags, manager, _holder(read, words[index + 2 : index + 2 + _CONTAINER_LAST], index + 1))


def _manages(read: Read, word: int, whose: Sequence[int]) -> bool:
    """Whether virtio-mem is there, and points back: what was read may be longer than the region, and be anything."""
    if not _type(read, word).startswith(_PARTLY):
        return False
    try:
        data = read(word, _DEVICE)
    except OSError:
        return False
    return any(pointer in whose for (pointer,) in struct.iter_unpack("<Q", data))


def _holder(read: Read, words: Sequence[int], owner_index: int) -> str:
    """The type of the owner of the container, which is the only region that the few words after the owner point to."""
    for word in words:
        if _pointer(word) and _type(read, word).endswith("memory-region"):
            try:
                (at,) = struct.unpack("<Q", read(word + 8 * owner_index, 8))
            except OSError:
                return ""
            return _type(read, at)
    return ""


def _type(read: Read, at: int) -> str:
    """The type of the object at an address; "" when there is no object."""
    try:
        for _ in range(3):  # its class, the class's type, the type's name
            if not _pointer(at):
                return ""
            (at,) = struct.unpack("<Q", read(at, 8))
        if not 0x1000 <= at < 1 << 47:
            return ""
        # It may lie so near the end of a mapping that only part of a page can be read.
        data = read(at, min(_NAME_MOST, 0x1000 - at % 0x1000))
        if b"\0" not in data:
            data += read(at + len(data), _NAME_MOST)
    except OSError:
        return ""
    name, end, _ = data.partition(b"\0")
    return name.decode("ascii") if end and _TYPE.fullmatch(name) else ""


def _pointer(word: int) -> bool:
    return word % 8 == 0 and 0x10000 <= word < 1 << 47
