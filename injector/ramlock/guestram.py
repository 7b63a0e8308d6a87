"""QEMU's list of RAM blocks, read from outside: what the shim says about guest RAM is held against it.

The list is QEMU's `ram_list`, a global that QEMUs export which the shim can serve. Its form (struct RAMBlock, QEMU's
include/exec/ramblock.h, 4.2 to 10.2) is not promised by anyone, so every field is checked before it is believed: where
the list begins is found by the back pointer of its first block, each block points back to the one before, names are
text, and the memory is mapped. QEMU runs on while we read: a list that changes meanwhile makes no sense, and is read
again.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import struct
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ramlock.deadline import Deadline
from ramlock.errors import CannotInject, GuestRamMismatch
from ramlock.memory import Mapping, Memory, Object
from ramlock.sizes import format_size
from ramlock.text import printable

BLOCKS_MOST = 1024
_HEAD_MOST = 4096
_BLOCK_SIZE = 352
_HOST, _USED, _MAX, _ID, _ID_SIZE, _NEXT, _BACK = 24, 48, 56, 76, 256, 336, 344
_SMALLEST_PAGE = 256  # of any machine that QEMU emulates
_TRIES, _PAUSE = 20, 0.01
_TIME = 1.0
"""Seconds that all tries may take together; a list as it should be takes a millisecond."""

Read = Callable[[int, int], bytes]
"""Reads that many bytes at an address of the target. Raises OSError."""


class Malformed(ValueError):
    """The bytes are no list of RAM blocks."""


class Block(NamedTuple):
    """A RAM block; address in the target, size in bytes."""

    id: str
    host: int
    size: int

    def __str__(self) -> str:
        return f"{printable(self.id, 80) or '(no name)'} {format_size(self.size)} at {self.host:#x}"


class Area(NamedTuple):
    """Mapped addresses without a hole."""

    start: int
    end: int


def areas(maps: Iterable[Mapping], *, writable: bool) -> list[Area]:
    """Join neighbouring mappings, which madvise() and mlock() split; only writable ones if asked."""
    result: list[Area] = []
    for mapping in maps:
        if writable and not mapping.writable:
            continue
        if result and result[-1].end == mapping.start:
            result[-1] = Area(result[-1].start, mapping.end)
        else:
            result.append(Area(mapping.start, mapping.end))
    return result


def parse_block(data: bytes) -> tuple[Block, int, int]:
    """Read a struct RAMBlock; return it, and its pointers forward and back.

    Raises Malformed.
    """
    if len(data) < _BLOCK_SIZE:
        raise Malformed("a short block")
    (host,), (used, most) = struct.unpack_from("<Q", data, _HOST), struct.unpack_from("<QQ", data, _USED)
    forward, back = struct.unpack_from("<QQ", data, _NEXT)
    name, end, _ = data[_ID : _ID + _ID_SIZE].partition(b"\0")
    if not end or any(not 0x20 <= byte < 0x7F for byte in name):
        raise Malformed("a name that is no text")
    if not 0 < used <= most or used % _SMALLEST_PAGE or host + used >= 1 << 64:
        raise Malformed("a size that cannot be")
    return Block(name.decode("ascii"), host, used), forward, back


def _hold(areas: list[Area], block: Block) -> bool:
    """Whether the block lies in one of the areas, which are in order."""
    at = bisect_right(areas, (block.host, 1 << 64)) - 1
    return at >= 0 and areas[at].start <= block.host and block.host + block.size <= areas[at].end


def walk(read: Read, head: int, mapped: list[Area], deadline: Deadline | None = None) -> list[Block]:
    """Follow the list whose first pointer is at the address `head`.

    Raises Malformed when anything in it is not as it must be, OSError when memory cannot be read.
    """
    blocks: list[Block] = []
    seen = set()
    link, at = head, _pointer(read, head)
    while at:
        if at % 8 or at in seen or len(blocks) == BLOCKS_MOST:
            raise Malformed("a list without end")
        if deadline is not None and deadline.expired:
            raise Malformed("it takes too long to read")
        seen.add(at)
        block, forward, back = parse_block(read(at, _BLOCK_SIZE))
        if back != link:
            raise Malformed("a list that does not hold together")
        if not _hold(mapped, block):
            raise Malformed("memory that is not mapped")
        blocks.append(block)
        link, at = at + _NEXT, forward
    names = [block.id for block in blocks if block.id]
    if len(set(names)) != len(names):
        raise Malformed("two blocks of one name")
    return blocks


def find(read: Read, start: int, size: int, mapped: list[Area], deadline: Deadline | None = None) -> list[Block]:
    """Find the list in the variable `ram_list`, `size` bytes at `start`: the pointer in it that is pointed back to.

    Returns no blocks when there is no such pointer: there is no RAM yet. Raises Malformed and OSError.
    """
    for head in range(start, start + min(size, _HEAD_MOST) - 7, 8):
        first = _pointer(read, head)
        if first == 0 or first % 8:
            continue
        try:
            if _pointer(read, first + _BACK) == head:
                return walk(read, head, mapped, deadline)
        except OSError:
            continue
    return []


def locate(memory: Memory, program: Object) -> list[Block] | None:
    """Read QEMU's list of RAM blocks; None when this QEMU does not export it.

    Raises CannotInject when the list makes no sense, VmGone when the process ends.
    """
    symbol = program.find("ram_list")
    if symbol is None or symbol.size < 16:
        return None
    deadline = Deadline(_TIME)
    reason = ""
    for _ in range(_TRIES):
        try:
            return find(memory.read, symbol.address, symbol.size, areas(memory.maps(), writable=False), deadline)
        except (Malformed, OSError) as error:
            reason = reason or str(error)
        if deadline.expired:
            break
        time.sleep(_PAUSE)
    raise CannotInject(
        f"QEMU's list of RAM blocks in process {memory.pid} makes no sense: {reason}",
        "this QEMU keeps it in a form that ramlock does not know; start the VM with ramlock run instead",
    )


def parse_reply(reply: object) -> list[Block]:
    """Read the reply to query-ram-blocks. Raises GuestRamMismatch when it is none."""
    if isinstance(reply, list) and len(reply) <= BLOCKS_MOST:
        try:
            blocks = [_replied(entry) for entry in reply]
            names = [block.id for block in blocks if block.id]
            if len({block.host for block in blocks}) == len(blocks) and len(set(names)) == len(names):
                return blocks
        except (KeyError, TypeError, ValueError):
            pass
    raise GuestRamMismatch("the shim does not say where guest RAM is", "nothing was locked, and the shim was ejected")


def compare(inside: list[Block], outside: list[Block], maps: list[Mapping]) -> None:
    """Make sure that all guest RAM of the shim's is what was seen from outside, and can be written by the guest.

    Raises GuestRamMismatch, which shows both.
    """
    known = set(outside)
    writable = areas(maps, writable=True)
    for block in inside:
        if block not in known:
            others = [other for other in outside if other.id == block.id or other.host == block.host]
            seen = " and ".join(map(str, others)) or "nothing like it"
        elif not _hold(writable, block):
            seen = "memory there that is not writable"
        else:
            continue
        raise GuestRamMismatch(
            f"the shim takes {block} for guest RAM, from outside there is {seen}",
            "nothing was locked, and the shim was ejected; please report this QEMU",
        )


def _replied(entry: Any) -> Block:
    name, host, size = entry["id"], entry["host"], entry["size"]
    if not isinstance(name, str) or type(host) is not int or type(size) is not int or host < 0 or size < 0:
        raise TypeError
    return Block(name, host, size)


def _pointer(read: Read, address: int) -> int:
    return int(struct.unpack("<Q", read(address, 8))[0])
