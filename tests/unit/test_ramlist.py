"""QEMU's list of RAM blocks in made-up memory: a right one is read, anything else is an error, never a wrong block."""
# SPDX-License-Identifier: GPL-2.0-or-later

import struct
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramlock import ramlist
from ramlock.deadline import Deadline
from ramlock.guestram import BLOCKS_MOST, Area, Block, Malformed

RAM_LIST, HEAD = 0x1000, 0x1038
SIZE = ramlist.KNOWN.size
MIB = 1 << 20
MAPPED = [Area(0x10000000, 0x10000000 + 64 * MIB)]
BLOCKS = [
    Block("pc.bios", 0x10000000, 256 << 10),
    Block("pc.ram", 0x10200000, 32 * MIB),
    Block("", 0x13000000, 4096),
]


@dataclass
class Space:
    """A process's memory, as pieces at addresses."""

    pieces: dict[int, bytearray] = field(default_factory=dict)

    def read(self, address: int, size: int) -> bytes:
        for start, data in self.pieces.items():
            if start <= address and address + size <= start + len(data):
                return bytes(data[address - start : address - start + size])
        raise OSError(5, "not mapped")


def block_at(index: int) -> int:
    return 0x200000 + 0x400 * index


def space(blocks: list[Block], lengths: dict[int, int] | None = None) -> Space:
    """Memory with a list of these blocks, as QEMU would hold it."""
    ram_list = bytearray(104)
    struct.pack_into("<Q", ram_list, 48, 0x1)  # something that is no pointer
    struct.pack_into("<Q", ram_list, HEAD - RAM_LIST, block_at(0) if blocks else 0)
    result = Space({RAM_LIST: ram_list})
    back = HEAD
    for index, block in enumerate(blocks):
        data = bytearray(SIZE)
        struct.pack_into("<QQQQQQ", data, 16, 0x5555, block.host, 0, 0x40000000, block.size, block.size)
        data[76 : 76 + len(block.id)] = block.id.encode()
        following = block_at(index + 1) if index + 1 < len(blocks) else 0
        struct.pack_into("<QQ", data, 336, following, back)
        result.pieces[block_at(index)] = data
        back = block_at(index) + 336
    return result


def find(memory: Space) -> list[Block]:
    return [raw.block for raw in ramlist.find(memory.read, RAM_LIST, 104, MAPPED)]


def test_a_list() -> None:
    assert find(space(BLOCKS)) == BLOCKS
    assert find(space(BLOCKS[:1])) == BLOCKS[:1]


def test_no_ram_yet() -> None:
    assert find(space([])) == []


@given(st.integers(0, 2), st.integers(0, 351), st.binary(min_size=1, max_size=8))
def test_damage_is_seen(index: int, at: int, data: bytes) -> None:
    """A changed byte gives an error, or changes what no decision rests upon, or is a valid change of name or size."""
    memory = space(BLOCKS)
    piece = memory.pieces[block_at(index)]
    piece[at : at + len(data)] = data
    try:
        found = find(memory)
    except (Malformed, OSError):
        return
    # When the first block's back pointer is gone there is no list; every block that is told lies in mapped memory.
    assert found == [] or [block.host for block in found][:index] == [block.host for block in BLOCKS][:index]
    for block in found:
        assert MAPPED[0].start <= block.host
        assert block.host + block.size <= MAPPED[0].end


@given(st.binary(max_size=768))
def test_garbage_is_no_block(data: bytes) -> None:
    try:
        raw, _, _ = ramlist.parse_block(data)
    except Malformed:
        return
    assert raw.block.size > 0
    assert not raw.block.id or raw.block.id.isprintable()


@given(
    st.dictionaries(st.integers(0, 40).map(lambda i: RAM_LIST + 8 * i), st.binary(min_size=8, max_size=64), max_size=9)
)
def test_garbage_memory_is_no_list(pieces: dict[int, bytes]) -> None:
    memory = Space({at: bytearray(data) for at, data in pieces.items()})
    with suppress(Malformed, OSError):
        assert find(memory) == []


def changed(index: int, at: int, form: str, *values: int) -> Space:
    memory = space(BLOCKS)
    struct.pack_into(form, memory.pieces[block_at(index)], at, *values)
    return memory


@pytest.mark.parametrize(
    ("memory", "says"),
    [
        (changed(2, 336, "<Q", block_at(1)), "without end"),
        (changed(1, 336, "<Q", block_at(2) + 4), "without end"),
        (changed(1, 344, "<Q", HEAD), "hold together"),
        (changed(1, 24, "<Q", 0x20000000), "not mapped"),
        (changed(1, 48, "<QQ", 128 * MIB, 128 * MIB), "not mapped"),
        (changed(1, 48, "<Q", 0), "a size"),
        (changed(1, 48, "<Q", 4095), "a size"),
        (changed(1, 48, "<QQ", 8192, 4096), "a size"),
        (changed(1, 24, "<Q", (1 << 64) - 4096), "a size"),
        (changed(1, 76, "<Q", 0x0101010101010101), "a name"),
        (changed(1, 76, "<256B", *[0x41] * 256), "a name"),
        (space([*BLOCKS, Block("pc.ram", 0x13100000, 4096)]), "two blocks"),
    ],
)
def test_what_cannot_be(memory: Space, says: str) -> None:
    with pytest.raises(Malformed, match=says):
        find(memory)


def test_a_list_that_is_too_long() -> None:
    blocks = [Block(f"b{i}", 0x10000000, 4096) for i in range(BLOCKS_MOST + 1)]
    with pytest.raises(Malformed, match="without end"):
        find(space(blocks))


def test_many_areas_are_no_burden() -> None:
    """A hostile process has as many mappings and blocks as it can."""
    mapped = [Area(0x10000000 + 0x2000 * i, 0x10001000 + 0x2000 * i) for i in range(65000)]
    blocks = [Block(f"b{i}", mapped[-1 - i].start, 4096) for i in range(BLOCKS_MOST)]
    pieces = space(blocks).pieces

    class Counted(list[Area]):
        def __iter__(self) -> Any:
            raise AssertionError("all of them are looked at")

    def read(address: int, size: int) -> bytes:
        start = RAM_LIST if address < 0x2000 else address - (address - 0x200000) % 0x400
        return bytes(pieces[start][address - start : address - start + size])

    assert [raw.block for raw in ramlist.walk(read, HEAD, Counted(mapped))] == blocks
    with pytest.raises(Malformed, match="not mapped"):
        ramlist.walk(read, HEAD, Counted(mapped[:-1]))
    with pytest.raises(Malformed, match="too long"):
        ramlist.walk(read, HEAD, mapped, Deadline(0))
