"""Guest RAM by its mappings: exactly one mapping for each block is certain, everything else is a guess or nothing."""
# SPDX-License-Identifier: GPL-2.0-or-later

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramlock import mapsource
from ramlock.guestram import Found, Malformed
from ramlock.memory import Mapping, parse_maps
from ramlock.qemuargs import MIB, Want, Wanted

BASE = 0x7F0000000000
RAM = Want("pc.ram", 64 * MIB, "anonymous")
MEMFD = "/memfd:memory-backend-memfd (deleted)"


def mapping(start: int, size: int, rights: str = "rw-p", path: str = "", offset: int = 0) -> Mapping:
    r, w, x, shared = (letter not in "-p" for letter in rights)
    return Mapping(BASE + start, BASE + start + size, r, w, x, shared, offset, (0, 1 if path else 0), len(path), path)


def block(start: int, size: int) -> list[Mapping]:
    return [mapping(start, size), mapping(start + size, 4096, "---p")]


def locate(maps: list[Mapping], *wants: Want, wanted: Wanted | None = None) -> Found:
    wanted = wanted or Wanted(list(wants))
    return mapsource.locate(wanted, sorted(maps), lambda m: ("file" if m.path else "anonymous", 4096), 2 * MIB)


def starts(found: Found) -> list[int]:
    return [b.host - BASE for b in found.blocks]


def test_one_block() -> None:
    found = locate(block(0, 64 * MIB), RAM)
    assert (found.source, found.certain, starts(found)) == ("maps", True, [0])
    assert found.blocks[0].size == 64 * MIB


def test_what_splits_and_what_lies_before() -> None:
    """mlock() and madvise() split it; a stack, or what malloc() has mapped, is its neighbour, or one with it."""
    parts = [mapping(0, 2 * MIB), mapping(2 * MIB, 60 * MIB), mapping(62 * MIB, 2 * MIB)]
    guard = mapping(64 * MIB, 4096, "---p")
    for before in ([], [mapping(-MIB, MIB)], [mapping(-8 * MIB - 4096, 4096, "---p"), mapping(-8 * MIB, 8 * MIB)]):
        found = locate([*before, *parts, guard], RAM)
        assert (found.certain, starts(found)) == (True, [0])
    merged = mapping(-MIB, 65 * MIB)
    assert starts(locate([merged, guard], RAM)) == [0]
    with pytest.raises(Malformed):
        locate([mapping(-2 * MIB, 66 * MIB), guard], RAM)


@pytest.mark.parametrize(
    "maps",
    [
        [],
        [mapping(0, 64 * MIB)],
        [mapping(0, 64 * MIB), mapping(64 * MIB, 4096, "r--p")],
        [mapping(0, 64 * MIB), mapping(65 * MIB, 4096, "---p")],
        [mapping(0, 64 * MIB), mapping(64 * MIB, 64 * MIB, "---p")],
        [mapping(0, 64 * MIB, "rwxp"), mapping(64 * MIB, 4096, "---p")],
        [mapping(0, 64 * MIB, "r--p"), mapping(64 * MIB, 4096, "---p")],
        [mapping(0, 64 * MIB, "rw-s", "/dev/zero (deleted)"), mapping(64 * MIB, 4096, "---p")],
        [mapping(0, 64 * MIB, "rw-p", "/some/file"), mapping(64 * MIB, 4096, "---p")],
        block(0, 62 * MIB),
        block(0, 128 * MIB),
        block(4096, 64 * MIB),
        [*block(0, 64 * MIB), *block(128 * MIB, 64 * MIB)],
    ],
)
def test_what_is_no_block(maps: list[Mapping]) -> None:
    with pytest.raises(Malformed):
        locate(maps, RAM)


def test_equal_blocks() -> None:
    maps = [*block(0, 64 * MIB), *block(128 * MIB, 64 * MIB)]
    found = locate(maps, RAM, RAM._replace(id="other"))
    assert (found.certain, starts(found)) == (True, [0, 128 * MIB])
    assert {b.id for b in found.blocks} == {"pc.ram", "other"}


def test_some_of_the_blocks() -> None:
    other = Want("dimm", 32 * MIB, "anonymous")
    found = locate(block(0, 64 * MIB), RAM, other)
    assert (found.certain, starts(found)) == (False, [0])
    assert "dimm (32 MiB): no mapping looks like it" in found.doubt


def test_one_too_many() -> None:
    """What looks like guest RAM and is not asked for may have been plugged in; devices' own memory is small."""
    found = locate([*block(0, 64 * MIB), *block(128 * MIB, 32 * MIB)], RAM)
    assert (found.certain, starts(found)) == (False, [0])
    assert locate([*block(0, 64 * MIB), *block(128 * MIB, 16 * MIB)], RAM).certain
    arena = [mapping(128 * MIB, 63 * MIB), mapping(191 * MIB, MIB, "---p")]
    assert locate([*block(0, 64 * MIB), *arena], RAM).certain


def test_memory_files() -> None:
    memfd = Want("m", 64 * MIB, "memfd", shared=True)
    file = [mapping(4096, 32 * MIB, "rw-s", MEMFD), mapping(4096 + 32 * MIB, 32 * MIB, "rw-s", MEMFD, 32 * MIB)]
    assert starts(locate(file, memfd)) == [4096]
    wrong = [mapping(4096, 32 * MIB, "rw-s", MEMFD), mapping(4096 + 32 * MIB, 32 * MIB, "rw-s", MEMFD, 64 * MIB)]
    with pytest.raises(Malformed):
        locate(wrong, memfd)
    with pytest.raises(Malformed):
        locate(file, memfd._replace(shared=False))
    huge = locate(file, memfd._replace(huge=0))
    assert (huge.blocks[0].page_size, huge.blocks[0].backing) == (2 * MIB, "hugetlb")


def test_files_are_known_by_their_names() -> None:
    maps = [
        mapping(0, 64 * MIB, "rw-s", "/ram/qemu_back_mem.a.Xy12Zz (deleted)"),
        mapping(128 * MIB, 64 * MIB, "rw-s", "/ram/qemu_back_mem.b.Xy12Zz (deleted)"),
        mapping(256 * MIB, 64 * MIB, "rw-s", "/ram/c"),
    ]
    wants = [Want(name, 64 * MIB, "file", True, "/ram") for name in "ba"]
    found = locate(maps, *wants, Want("c", 64 * MIB, "file", True, "/ram/c"))
    assert [(b.id, b.host - BASE) for b in found.blocks] == [("a", 0), ("b", 128 * MIB), ("c", 256 * MIB)]
    assert found.certain
    with pytest.raises(Malformed):
        locate(maps, Want("c", 64 * MIB, "file", True, "/ram/d"))


SIZES = st.sampled_from([4096, MIB, 2 * MIB, 32 * MIB, 64 * MIB])
KINDS = st.sampled_from([("rw-p", ""), ("---p", ""), ("r-xp", "/usr/bin/qemu"), ("rw-s", MEMFD), ("rw-p", "[heap]")])


@given(st.lists(st.tuples(SIZES, SIZES, KINDS), max_size=20), st.lists(SIZES, min_size=1, max_size=3))
def test_never_a_wrong_block(parts: list[tuple[int, int, tuple[str, str]]], sizes: list[int]) -> None:
    """Whatever is mapped: a block lies in anonymous memory that is written and not executed, with a guard behind it."""
    maps, at = [], 0
    for gap, size, (rights, path) in parts:
        at += gap if gap > 4096 else 0
        maps.append(mapping(at, size, rights, path))
        at += size
    wanted = Wanted([Want(f"n{i}", size, "anonymous") for i, size in enumerate(sizes)])
    try:
        found = locate(maps, wanted=wanted)
    except Malformed:
        return
    for b in found.blocks:
        inside = [m for m in maps if m.start < b.end and b.host < m.end]
        assert sum(min(m.end, b.end) - max(m.start, b.host) for m in inside) == b.size
        assert all(m.writable and not m.executable and not m.path for m in inside)
        assert any(m.start == b.end and not m.readable for m in maps)
        assert b.host % (2 * MIB) == 0
        assert b.size in sizes


LINE = st.builds(
    lambda a, b, c: f"{a:x}-{b:x} {c} 0 00:00 0".encode(), *[st.integers(0, 1 << 64)] * 2, st.text(max_size=5)
)


@given(st.lists(LINE | st.binary(max_size=60), max_size=8))
def test_garbage_is_no_mapping(lines: list[bytes]) -> None:
    try:
        maps = parse_maps(b"\n".join(lines))
        locate(maps, RAM)
    except ValueError:
        return
    raise AssertionError("a block was found in garbage")


def test_a_hostile_process_does_not_take_our_time() -> None:
    maps = [mapping(8192 * i, 4096) for i in range(60_000)]
    with pytest.raises(Malformed, match="too much"):
        locate(maps, *(RAM._replace(id=str(i), size=4096 * i) for i in range(1, 1000)))
