"""What sources say about guest RAM is held against each other: both the same, or an error that shows both."""
# SPDX-License-Identifier: GPL-2.0-or-later

import pytest

from ramlock import guestram
from ramlock.errors import GuestRamMismatch
from ramlock.guestram import Area, Block, Found
from ramlock.memory import Mapping

MIB = 1 << 20
RAM = Block("pc.ram", 0x10200000, 32 * MIB)
BIOS = Block("pc.bios", 0x10000000, 256 << 10)
FOUND = Found("symbols", True, [RAM], (), (BIOS,))
VIRTIO_MEM = Block("vm", 0x13000000, 8 * MIB, virtio_mem=True)


def mapping(start: int, end: int, *, writable: bool = True) -> Mapping:
    return Mapping(start, end, True, writable, False, False, 0, (0, 0), 0, "")


def test_areas_are_joined() -> None:
    maps = [mapping(0, 4096), mapping(4096, 8192), mapping(8192, 12288, writable=False), mapping(16384, 20480)]
    assert guestram.areas(maps, writable=False) == [Area(0, 12288), Area(16384, 20480)]
    assert guestram.areas(maps, writable=True) == [Area(0, 8192), Area(16384, 20480)]


MAPS = [mapping(0x10000000, 0x10300000), mapping(0x10300000, 0x14000000)]


def test_agreement() -> None:
    guestram.compare([RAM], FOUND, MAPS)
    guestram.compare([], FOUND, MAPS)


def test_of_virtio_mem_the_shim_has_parts() -> None:
    found = FOUND._replace(blocks=[RAM, VIRTIO_MEM])
    parts = [Block("vm", VIRTIO_MEM.host + at * MIB, 2 * MIB) for at in (0, 4)]
    for inside in ([RAM], [RAM, *parts], [RAM, VIRTIO_MEM]):
        guestram.compare(inside, found, MAPS)
    for wrong in (Block("vm", VIRTIO_MEM.end - MIB, 2 * MIB), Block("other", VIRTIO_MEM.host, MIB)):
        with pytest.raises(GuestRamMismatch, match="there is"):
            guestram.compare([RAM, wrong], found, MAPS)


@pytest.mark.parametrize(
    ("inside", "maps", "says"),
    [
        (Block("pc.ram", 0x10200000, 33 * MIB), MAPS, "takes pc.ram 33 MiB.*there is pc.ram 32 MiB"),
        (Block("pc.ram", 0x10200000, 31 * MIB), MAPS, "takes pc.ram 31 MiB.*there is pc.ram 32 MiB"),
        (Block("pc.ram", 0x10201000, 32 * MIB), MAPS, "at 0x10201000.*at 0x10200000"),
        (Block("pc.rom", 0x10200000, 32 * MIB), MAPS, "takes pc.rom.*there is pc.ram"),
        (Block("x", 0x30000000, 4096), MAPS, "nothing like it"),
        (BIOS, MAPS, "takes pc.bios.*which is no guest RAM"),
        (RAM, [mapping(0x10000000, 0x14000000, writable=False)], "not writable"),
        (RAM, [mapping(0x10000000, 0x11000000), mapping(0x11001000, 0x14000000)], "not writable"),
    ],
)
def test_disagreement_shows_both(inside: Block, maps: list[Mapping], says: str) -> None:
    with pytest.raises(GuestRamMismatch, match=says) as error:
        guestram.compare([inside], FOUND, maps)
    assert error.value.exit_code == 4


def test_what_the_shim_leaves_out() -> None:
    found = FOUND._replace(blocks=[RAM, Block("dimm", 0x13000000, MIB)])
    with pytest.raises(GuestRamMismatch, match=r"dimm 1 MiB.*the shim does not know it"):
        guestram.compare([RAM], found, MAPS)


def test_a_guess_only_has_to_know_the_shims_blocks() -> None:
    guess = FOUND._replace(certain=False, blocks=[RAM, Block("dimm", 0x13000000, MIB)])
    guestram.compare([RAM], guess, MAPS)
    guestram.compare([BIOS], guess, MAPS)
    with pytest.raises(GuestRamMismatch):
        guestram.compare([Block("x", 0x13000000, MIB)], guess, MAPS)


def test_sources_agree_or_both_are_shown() -> None:
    mapped = Found("maps", True, [RAM._replace(id="machine")])
    guestram.agree(FOUND, mapped)
    guestram.agree(FOUND._replace(blocks=[RAM, VIRTIO_MEM]), mapped._replace(blocks=[RAM, VIRTIO_MEM]))
    other = mapped._replace(blocks=[RAM._replace(host=RAM.host + MIB)])
    with pytest.raises(
        GuestRamMismatch, match=r"at 0x10200000 by QEMU's list.* at 0x10300000 by its mappings"
    ) as error:
        guestram.agree(FOUND, other)
    assert error.value.exit_code == 4
    guestram.agree(FOUND, other._replace(certain=False))


def test_the_shims_reply() -> None:
    assert guestram.parse_reply([{"id": "pc.ram", "host": 4096, "size": 8192, "page-size": 4096}]) == [
        Block("pc.ram", 4096, 8192)
    ]
    block = {"id": "a", "host": 1, "size": 1}
    for reply in (None, {}, [1], [{}], [{**block, "id": 1}], [{**block, "host": -1}], [{**block, "size": True}], ["x"]):
        with pytest.raises(GuestRamMismatch, match="does not say"):
            guestram.parse_reply(reply)


@pytest.mark.parametrize(
    "blocks",
    [
        [Block("pc.ram", 4096, 4096)] * 2,
        [Block("pc.ram", 4096, 4096), Block("pc.bios", 4096, 8192)],
        [Block("", 4096 * i, 4096) for i in range(guestram.BLOCKS_MOST + 1)],
    ],
    ids=["twice", "one-place", "too-many"],
)
def test_a_reply_with_too_much_in_it(blocks: list[Block]) -> None:
    with pytest.raises(GuestRamMismatch, match="does not say"):
        guestram.parse_reply([block._asdict() for block in blocks])
