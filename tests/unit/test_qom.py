"""Whose a RAM block is, in made-up memory: a backend is known by its type, anything else is no backend."""
# SPDX-License-Identifier: GPL-2.0-or-later

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramlock import qom, ramlist
from ramlock.guestram import Malformed
from tests.unit.test_ramlist import MIB, Space

REGION, BLOCK, OWNER, MANAGER = 0x20000, 0x30000, 0x40000, 0x50000


def memory(kind: str, flags: bytes = bytes(6), manager: str = "", back: int = 0) -> Space:
    """A memory region whose block is BLOCK and whose owner is of that type."""
    region = bytearray(400)
    struct.pack_into("<QQ", region, 56, BLOCK, OWNER if kind else 0)
    struct.pack_into("<Q", region, 240, MANAGER if manager else 0)
    space = Space({REGION: region})
    back = back or OWNER
    for at, name in ((OWNER, kind), (MANAGER, manager)):
        space.pieces[at] = bytearray(struct.pack("<Q", at + 0x1000) + bytes(40) + flags + bytes(2048))
        space.pieces[at + 0x1000] = bytearray(struct.pack("<Q", at + 0x2000))
        space.pieces[at + 0x2000] = bytearray(struct.pack("<Q", at + 0x3000))
        space.pieces[at + 0x3000] = bytearray(name.encode().ljust(80, b"\0"))
    struct.pack_into("<Q", space.pieces[MANAGER], 800, back)
    return space


def owner(space: Space) -> qom.Owner | None:
    return qom.owner(space.read, REGION, BLOCK)


def test_a_backend() -> None:
    found = owner(memory("memory-backend-ram", b"\1\1\0\0\1\0"))
    assert found is not None
    assert (found.backend, found.in_use(old=False), found.in_use(old=True), found.virtio_mem) == (
        True,
        True,
        False,
        False,
    )
    found = owner(memory("memory-backend-file", b"\1\1\0\0\0\1"))
    assert found is not None
    assert not found.in_use(old=False)


def test_virtio_mem() -> None:
    for manager in ("virtio-mem", "ram-discard-manager"):
        found = owner(memory("memory-backend-ram", manager=manager))
        assert found is not None
        assert found.virtio_mem
    found = owner(memory("memory-backend-ram", manager="virtio-mem", back=OWNER + 8))  # another's
    assert found is not None
    assert not found.virtio_mem
    found = owner(memory("memory-backend-ram", manager="ram-block-attributes"))
    assert found is not None
    assert not found.virtio_mem


def test_devices_and_nobody() -> None:
    assert owner(memory("VGA")) == qom.Owner("VGA")
    assert owner(memory("")) == qom.Owner("")


@pytest.mark.parametrize("flags", [b"\2" + bytes(5), bytes(5) + b"\xff"])
def test_flags_that_are_none(flags: bytes) -> None:
    assert owner(memory("memory-backend-ram", flags)) is None


def test_what_is_not_found() -> None:
    assert qom.owner(memory("VGA").read, REGION, BLOCK + 8) is None
    assert qom.owner(memory("VGA").read, 0, BLOCK) is None
    assert qom.owner(memory("VGA").read, 0x60000, BLOCK) is None
    assert owner(memory("no type\n")) is None


@given(st.sampled_from([REGION, OWNER, OWNER + 0x1000, OWNER + 0x3000]), st.integers(0, 70), st.binary(max_size=9))
def test_damage(piece: int, at: int, data: bytes) -> None:
    space = memory("memory-backend-ram")
    if at + len(data) <= len(space.pieces[piece]):
        space.pieces[piece][at : at + len(data)] = data
    found = owner(space)
    assert found is None or not found.type or found.type.isprintable()


def raw(name: str, at: int, host: int, mr: int = REGION, flags: int = 0, page: int = 4096) -> ramlist.Raw:
    block = ramlist.Block(name, host, MIB)
    return ramlist.Raw(at, block, mr, flags, (0xFFFFFFFF, page, page, page, page))


def test_which_blocks_are_guest_ram() -> None:
    used = ramlist.judge(memory("memory-backend-ram", b"\0\0\0\0\1\0").read, [raw("m", BLOCK, MIB)], {"m": "machine"})
    assert ([b.id for b in used.blocks], used.certain) == (["m"], True)
    spare = ramlist.judge(memory("memory-backend-ram").read, [raw("m", BLOCK, MIB)], {})
    assert ([b.id for b in spare.blocks], [b.id for b in spare.others]) == ([], ["m"])
    device = memory("VGA").read
    assert ramlist.judge(device, [raw("vga.vram", BLOCK, MIB)], {}).blocks == []
    assert [b.id for b in ramlist.judge(device, [raw("pc.ram", BLOCK, MIB)], {}).blocks] == ["pc.ram"]


@pytest.mark.parametrize(
    ("uses", "more", "main"),
    [
        ({"m": "pc-dimm"}, [], True),
        ({"m": "virtio-mem-pci"}, [], True),
        ({"m": "nvdimm"}, [], False),
        ({"m": "ivshmem-plain"}, [], False),
        ({}, [], True),
        ({}, [raw("pc.ram", BLOCK, 8 * MIB)], False),
    ],
)
def test_what_uses_a_backend(uses: dict[str, str], more: list[ramlist.Raw], main: bool) -> None:
    read = memory("memory-backend-ram", b"\0\0\0\0\1\0").read
    found = ramlist.judge(read, [raw("m", BLOCK, MIB), *more], uses)
    assert ("m" in [b.id for b in found.blocks]) == main


def test_only_a_part_of_what_virtio_mem_uses_is_guest_ram() -> None:
    """Before 6.1 the device is not found from the block, but the command line or the block's name tell of it."""
    read = memory("memory-backend-ram", b"\0\0\0\0\1\0").read
    name = "0000:00:01.0/m"
    (block,) = ramlist.judge(read, [raw(name, BLOCK, MIB)], {"m": "virtio-mem-pci"}).blocks
    assert block.virtio_mem
    found = ramlist.judge(read, [raw(name, BLOCK, MIB)], {})
    assert ([b.id for b in found.blocks], [b.id for b in found.others]) == ([], [name])
    assert [b.id for b in ramlist.judge(read, [raw("/objects/m", BLOCK, MIB)], {}).blocks] == ["/objects/m"]


def test_without_an_owner_the_name_is_a_guess() -> None:
    found = ramlist.judge(memory("").read, [raw("pc.ram", BLOCK, MIB, mr=8), raw("pc.bios", BLOCK, 2 * MIB, mr=8)], {})
    assert ([b.id for b in found.blocks], found.certain) == (["pc.ram"], False)
    assert "pc.ram" in found.doubt


def test_guest_ram_that_overlaps() -> None:
    with pytest.raises(Malformed, match="overlaps"):
        ramlist.judge(memory("VGA").read, [raw("a.ram", BLOCK, MIB), raw("b.ram", BLOCK, MIB + 4096)], {})


def test_page_sizes() -> None:
    both = [raw("a", BLOCK, 4 * MIB, page=2 * MIB), raw("b", BLOCK, MIB)]
    assert ramlist.page_sizes(both) == [2 * MIB, 4096]
    assert ramlist.page_sizes([raw("a", BLOCK, MIB, page=2 * MIB)]) == [0]
    assert ramlist.page_sizes([raw("a", BLOCK, MIB, page=4097)]) == [0]


def test_guest_memfd() -> None:
    assert ramlist.guest_memfd([raw("a", BLOCK, MIB), raw("b", BLOCK, MIB, flags=1 << 12)])
    assert not ramlist.guest_memfd([raw("a", BLOCK, MIB, flags=0xFFF)])
