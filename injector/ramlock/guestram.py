"""Guest RAM as ramlock knows it from outside: its blocks, who said so and how sure that is, and whether all agree.

Three sources say where guest RAM is: QEMU's own list read in its memory (ramlist.py), the mappings held against the
command line (mapsource.py), and the shim's walk inside QEMU. They need not know each other to agree.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import itertools
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, NamedTuple

from ramlock.errors import GuestRamMismatch
from ramlock.memory import Mapping
from ramlock.sizes import format_size
from ramlock.text import printable

BLOCKS_MOST = 1024


class Malformed(ValueError):
    """What was read from the process makes no sense."""


class Block(NamedTuple):
    """A RAM block; address in the target, sizes in bytes."""

    id: str
    host: int
    size: int
    page_size: int = 4096
    """Of its backing, so 2 MiB and more for hugetlb."""
    backing: str = "anonymous"
    """As in docs/protocol.md."""
    virtio_mem: bool = False
    """Whether only the plugged part of it is guest RAM."""

    @property
    def end(self) -> int:
        """The address after it."""
        return self.host + self.size

    @property
    def where(self) -> tuple[str, int, int]:
        """What two sources have to agree upon."""
        return self.id, self.host, self.size

    def __str__(self) -> str:
        return f"{printable(self.id, 80) or '(no name)'} {format_size(self.size)} at {self.host:#x}"


class Found(NamedTuple):
    """What one source says about guest RAM."""

    source: str
    """ "qemu", "symbols" or "maps"."""
    certain: bool
    blocks: list[Block]
    """Guest RAM, in order of address."""
    doubts: tuple[str, ...] = ()
    """Why it is not certain."""
    others: tuple[Block, ...] = ()
    """What QEMU holds besides: ROMs, video RAM, backends that are not plugged in."""

    @property
    def confidence(self) -> str:
        """What it is called outside."""
        return "certain" if self.certain else "probable"

    @property
    def doubt(self) -> str:
        """The reasons for doubt in one line."""
        return "; ".join(self.doubts) or "nothing is known against it"


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


def hold(areas: list[Area], block: Block) -> bool:
    """Whether the block lies in one of the areas, which are in order."""
    at = bisect_right(areas, (block.host, 1 << 64)) - 1
    return at >= 0 and areas[at].start <= block.host and block.end <= areas[at].end


def parse_reply(reply: object) -> list[Block]:
    """Read the reply to query-ram-blocks. Raises GuestRamMismatch when it is none.

    A virtio-mem block is there once for each of its plugged parts, under one name.
    """
    if isinstance(reply, list) and len(reply) <= BLOCKS_MOST:
        try:
            blocks = sorted((_replied(entry) for entry in reply), key=lambda block: block.host)
            if all(one.end <= other.host for one, other in itertools.pairwise(blocks)):
                return blocks
        except (KeyError, TypeError, ValueError):
            pass
    raise GuestRamMismatch("the shim does not say where guest RAM is", "nothing was locked, and the shim was ejected")


def _replied(entry: Any) -> Block:
    name, host, size = entry["id"], entry["host"], entry["size"]
    page, backing = entry.get("page-size", 4096), entry.get("backing", "anonymous")
    if not isinstance(name, str) or not isinstance(backing, str):
        raise TypeError
    if any(type(number) is not int or not 0 <= number < 1 << 64 for number in (host, size, page)):
        raise TypeError
    return Block(name, host, size, page, printable(backing, 40))


def compare(inside: list[Block], outside: Found, maps: list[Mapping]) -> None:
    """Make sure that guest RAM of the shim's is what was seen from outside, and can be written by the guest.

    Both must be the same; of a virtio-mem block the shim has the plugged parts. A source that is not certain
    only has to know each of the shim's blocks. Raises GuestRamMismatch, which shows both.
    """
    if not inside:
        return
    known = {block.where for block in (*outside.blocks, *(() if outside.certain else outside.others))}
    partly = [block for block in outside.blocks if block.virtio_mem]
    writable = areas(maps, writable=True)
    for block in inside:
        in_part = any(b.id == block.id and b.host <= block.host and block.end <= b.end for b in partly)
        if block.where not in known and not in_part:
            everything = (*outside.blocks, *outside.others)
            others = [other for other in everything if other.id == block.id or other.host == block.host]
            seen = " and ".join(map(str, others)) or "nothing like it"
            if any(other.where == block.where for other in outside.others):
                seen += ", which is no guest RAM"
        elif not hold(writable, block):
            seen = "memory there that is not writable"
        else:
            continue
        raise _mismatch(f"the shim takes {block} for guest RAM, from outside there is {seen}")
    said = {block.where for block in inside}
    for block in outside.blocks:
        if outside.certain and not block.virtio_mem and block.where not in said:
            raise _mismatch(f"from outside {block} is guest RAM, the shim does not know it")


def agree(one: Found, other: Found) -> None:
    """Make sure that two sources that are both certain say the same; names are not compared, as mappings have none.

    Raises GuestRamMismatch, which shows both.
    """
    if not (one.certain and other.certain):
        return
    whole = {block.host: block for found in (one, other) for block in found.blocks if block.virtio_mem}

    def places(found: Found) -> set[tuple[int, int]]:
        return {
            (block.host, block.size)
            for block in found.blocks
            if not any(b.host <= block.host and block.end <= b.end for b in whole.values())
        }

    if places(one) != places(other):
        raise GuestRamMismatch(
            f"guest RAM is {_list(one)} by {_NAMES[one.source]}, but {_list(other)} by {_NAMES[other.source]}",
            "nothing was locked; please report this QEMU",
        )


_NAMES = {"qemu": "the shim's word", "symbols": "QEMU's list of RAM blocks", "maps": "its mappings"}


def _list(found: Found) -> str:
    return ", ".join(map(str, found.blocks)) or "nothing"


def _mismatch(message: str) -> GuestRamMismatch:
    return GuestRamMismatch(message, "nothing was locked, and the shim was ejected; please report this QEMU")
