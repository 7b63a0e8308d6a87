"""QEMU's own list of RAM blocks, read in its memory: which blocks there are, and which of them are guest RAM.

The list is QEMU's variable `ram_list`. Its form (struct RAMBlock, QEMU's include/exec/ramblock.h, 4.2 to 11.1) is not
promised by anyone, so every field is checked before it is believed: where the list begins is found by the back pointer
of its first block, each block points back to the one before, names are text, and the memory is mapped. QEMU runs on
while we read: a list that changes meanwhile makes no sense, and is read again.

Pure: memory comes through a function, mappings as values.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import itertools
import struct
from collections.abc import Callable, Mapping
from typing import NamedTuple

from ramlock import qemuargs, qom
from ramlock.deadline import Deadline
from ramlock.guestram import BLOCKS_MOST, Area, Block, Found, Malformed, hold

_HEAD_MOST = 4096
_SMALLEST_PAGE = 256  # of any machine that QEMU emulates
_GUEST_MEMFD = 1 << 12
"""RAM_GUEST_MEMFD, later RAM_GUEST_MEMFD_PRIVATE, of the block's flags; unused before."""
_PAGE_MOST = 1 << 34
_ID_SIZE = 256

Read = Callable[[int, int], bytes]
"""Reads that many bytes at an address of the target. Raises OSError."""


class Layout(NamedTuple):
    """Where the fields of struct RAMBlock are, in bytes from its beginning."""

    mr: int = 16
    host: int = 24
    used: int = 48
    most: int = 56
    flags: int = 72
    id: int = 76
    next: int = 336
    page_size: tuple[int, ...] = (368, 376, 384, 392, 400)
    """Where it has been, in turn: 4.2 to 8.1, 8.2, 9.1, 10.0, 10.1 and later."""

    @property
    def size(self) -> int:
        """The bytes that hold all of these."""
        return max(self.mr, self.host, self.used, self.most, self.next + 8, self.id + _ID_SIZE, *self.page_size) + 8


KNOWN = Layout()


class Raw(NamedTuple):
    """A block as QEMU has it; addresses in the target."""

    at: int
    block: Block
    mr: int
    flags: int
    pages: tuple[int, ...]
    """What stands in each of the places where the page size may be."""


def parse_block(data: bytes, layout: Layout = KNOWN, at: int = 0) -> tuple[Raw, int, int]:
    """Read a struct RAMBlock; return it, and its pointers forward and back.

    Raises Malformed.
    """
    if len(data) < layout.size:
        raise Malformed("a short block")

    def word(offset: int) -> int:
        return int.from_bytes(data[offset : offset + 8], "little")

    host, used, most = word(layout.host), word(layout.used), word(layout.most)
    name, end, _ = data[layout.id : layout.id + _ID_SIZE].partition(b"\0")
    if not end or any(not 0x20 <= byte < 0x7F for byte in name):
        raise Malformed("a name that is no text")
    if not 0 < used <= most or used % _SMALLEST_PAGE or host % _SMALLEST_PAGE or host + used >= 1 << 63:
        raise Malformed("a size that cannot be")
    flags = word(layout.flags) & 0xFFFFFFFF
    pages = tuple(word(offset) for offset in layout.page_size)
    raw = Raw(at, Block(name.decode("ascii"), host, used), word(layout.mr), flags, pages)
    return raw, word(layout.next), word(layout.next + 8)


def walk(
    read: Read, head: int, mapped: list[Area], deadline: Deadline | None = None, layout: Layout = KNOWN
) -> list[Raw]:
    """Follow the list whose first pointer is at the address `head`.

    Raises Malformed when anything in it is not as it must be, OSError when memory cannot be read.
    """
    blocks: list[Raw] = []
    seen = set()
    link, at = head, _pointer(read, head)
    while at:
        if at % 8 or at in seen or len(blocks) == BLOCKS_MOST:
            raise Malformed("a list without end")
        if deadline is not None and deadline.expired:
            raise Malformed("it takes too long to read")
        seen.add(at)
        raw, forward, back = parse_block(read(at, layout.size), layout, at)
        if back != link:
            raise Malformed("a list that does not hold together")
        if not hold(mapped, raw.block):
            raise Malformed("memory that is not mapped")
        blocks.append(raw)
        link, at = at + layout.next, forward
    names = [raw.block.id for raw in blocks if raw.block.id]
    if len(set(names)) != len(names):
        raise Malformed("two blocks of one name")
    return blocks


def find(
    read: Read,
    start: int,
    size: int,
    mapped: list[Area],
    deadline: Deadline | None = None,
    layout: Layout = KNOWN,
) -> list[Raw]:
    """Find the list in the variable `ram_list`, `size` bytes at `start`: the pointer in it that is pointed back to.

    Returns no blocks when there is no such pointer: there is no RAM yet. Raises Malformed and OSError.
    """
    for head in range(start, start + min(size, _HEAD_MOST) - 7, 8):
        first = _pointer(read, head)
        if first == 0 or first % 8:
            continue
        try:
            if _pointer(read, first + layout.next + 8) == head:
                return walk(read, head, mapped, deadline, layout)
        except OSError:
            continue
    return []


def page_sizes(raws: list[Raw]) -> list[int]:
    """Return the page size of each block: the first place in which every block has one; 0 where none is."""
    for column in zip(*(raw.pages for raw in raws), strict=True):
        if all(0x1000 <= size <= _PAGE_MOST and size & (size - 1) == 0 for size in column) and all(
            raw.block.host % size == 0 for raw, size in zip(raws, column, strict=True)
        ):
            return list(column)
    return [0] * len(raws)


def guest_memfd(raws: list[Raw]) -> bool:
    """Whether the guest's private memory is where nobody can map it."""
    return any(raw.flags & _GUEST_MEMFD for raw in raws)


def judge(read: Read, raws: list[Raw], uses: Mapping[str, str]) -> Found:
    """Say which blocks are guest RAM; `uses` is what the command line says of backends (qemuargs.Wanted).

    These are the blocks of memory backends that are in use. Where machine RAM is no backend (before 5.0), also those
    that a board names "pc.ram" and so on. Where a block's owner is not found, its name has to do, which is a guess.
    Raises Malformed when they overlap.
    """
    owners = [qom.owner(read, raw.mr, raw.at) for raw in raws]
    old = any(
        owner is not None and not owner.backend and named_like_machine_ram(raw.block.id)
        for raw, owner in zip(raws, owners, strict=True)
    )
    machine = any(named_like_machine_ram(raw.block.id) or uses.get(raw.block.id) == qemuargs.MACHINE for raw in raws)
    ram: list[Block] = []
    others: list[Block] = []
    doubts = []
    for raw, owner, page_size in zip(raws, owners, page_sizes(raws), strict=True):
        block = raw.block._replace(page_size=page_size)
        if owner is None:
            doubts.append(f"whose {block} is was not found")
        if owner is not None and owner.backend:
            used = owner.in_use(old=old) and _is_main(block, owner, uses, machine=machine)
            # Before 6.1 nothing leads from the block to the device.
            partly = owner.virtio_mem or uses.get(_backend(block), "").startswith("virtio-mem")
            (ram if used else others).append(block._replace(virtio_mem=partly))
        else:
            (ram if named_like_machine_ram(block.id) else others).append(block)
    ram.sort(key=lambda block: block.host)
    if any(one.end > other.host for one, other in itertools.pairwise(ram)):
        raise Malformed("guest RAM that overlaps")
    return Found("symbols", not doubts, ram, tuple(doubts[:3]), tuple(others))


def _is_main(block: Block, owner: qom.Owner, uses: Mapping[str, str], *, machine: bool) -> bool:
    """Whether what uses a backend makes main memory of it: the machine, a DIMM, virtio-mem; not an NVDIMM or ivshmem.

    Of what was plugged in later the command line knows nothing. A DIMM's block is put into the machine's region for
    such memory, an NVDIMM's is shown there by an alias, another device's is in the device's own region. Of the devices
    on a bus, whose address is then part of the block's name, some use the machine's region too: virtio-pmem, and
    virtio-mem, of which only QEMU 6.1 and later tell. `machine` is whether the machine's own memory is known: if not,
    it may be this.
    """
    if owner.virtio_mem or named_like_machine_ram(block.id):
        return True
    if (use := uses.get(_backend(block))) is not None:
        return use == qemuargs.MACHINE or use.startswith(qemuargs.MAIN_MEMORY)
    if "/" in block.id.removeprefix("/objects/"):
        return False
    return owner.holder.endswith("-machine") or (not owner.holder and not machine)


def _backend(block: Block) -> str:
    """The name of the memory backend that a block belongs to."""
    return block.id.rsplit("/", 1)[-1]


def named_like_machine_ram(name: str) -> bool:
    """Whether boards name machine RAM so: "pc.ram", "mach-virt.ram"; devices' blocks have a path in their name."""
    return len(name) > 4 and name.endswith(".ram") and "/" not in name


def _pointer(read: Read, address: int) -> int:
    return int(struct.unpack("<Q", read(address, 8))[0])
