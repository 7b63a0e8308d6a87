"""Mappings and ELF objects in the memory of a process, which may be anything."""
# SPDX-License-Identifier: GPL-2.0-or-later

import ctypes
import mmap
import os
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ramlock import memory
from ramlock.errors import NotFound, Refused, VmGone
from ramlock.memory import Memory, Object

LINE = b"7f0000000000-7f0000001000 r-xp 00001000 fe:01 4242                       /usr/lib/a b.so (deleted)\n"


def test_a_line_of_maps() -> None:
    (mapping,) = memory.parse_maps(LINE)
    assert (mapping.start, mapping.end) == (0x7F0000000000, 0x7F0000001000)
    assert (mapping.readable, mapping.writable, mapping.executable, mapping.shared) == (True, False, True, False)
    assert (mapping.offset, mapping.device, mapping.inode) == (0x1000, (0xFE, 1), 4242)
    assert mapping.path == "/usr/lib/a b.so (deleted)"
    assert mapping.holds(mapping.start, mapping.end)
    assert not mapping.holds(mapping.start, mapping.end + 1)


def test_our_own_maps() -> None:
    maps = memory.parse_maps(Path("/proc/self/maps").read_bytes())
    assert any(mapping.path == "[stack]" for mapping in maps)
    assert all(mapping.start < mapping.end for mapping in maps)


@pytest.mark.parametrize(
    "name",
    [
        "x (deleted)",
        "a\n7f0000000000-7f0040000000 rw-p 00000000 00:00 0 [heap]",
        "b\r7f0000000000-7f0040000000 rw-p 00000000 00:00 0 ",
        "c\x1b[2J\t\\\x0b\x0c\x1c\x85\r",
    ],
    ids=range(4),
)
def test_the_name_of_a_file_makes_no_mapping(tmp_path: Path, name: str) -> None:
    """A process maps what it likes, and so has names that look like lines, or like what the kernel says of files."""
    path = tmp_path / name
    path.write_bytes(b"x" * 4096)
    before = {mapping.start for mapping in memory.parse_maps(Path("/proc/self/maps").read_bytes())}
    with path.open("rb") as file, mmap.mmap(file.fileno(), 4096, access=mmap.ACCESS_READ):
        path.unlink()
        maps = memory.parse_maps(Path("/proc/self/maps").read_bytes())
    inode = [mapping for mapping in maps if str(tmp_path) in mapping.path]
    assert len(inode) == 1
    assert inode[0].path.endswith("(deleted)")
    assert not any(0x7F0000000000 <= mapping.start < 0x7F0040000000 for mapping in maps if mapping.start not in before)


@given(st.binary(max_size=200))
def test_garbage_is_no_line(text: bytes) -> None:
    try:
        for mapping in memory.parse_maps(text):
            assert mapping.start >= 0
    except ValueError:
        pass


@pytest.fixture
def own() -> Memory:
    return Memory(os.getpid())


def test_symbols_are_where_the_loader_has_them(own: Memory) -> None:
    for mapping in own.maps():
        if mapping.offset == 0 and "libc.so.6" in mapping.path:
            libc = Object(own, mapping.start)
            break
    else:
        pytest.skip("this Python does not run with glibc")
    for name in ("ppoll", "getpid", "__errno_location"):
        symbol = libc.find(name)
        assert symbol is not None
        address = ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value
        assert symbol.address == address
        assert symbol.size > 0
    assert libc.find("no_such_symbol_there") is None
    assert libc.find_first(("no_such_symbol_there", "getpid")) == libc.find("getpid")
    assert len(libc.build_id()) == 40


def test_reading_stays_within_bounds(own: Memory) -> None:
    for address in (0, 1 << 62, 1 << 63, (1 << 64) - 8, -8):
        with pytest.raises(OSError):
            own.read(address, 8)


def test_a_process_that_has_ended(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        Memory(4, proc=tmp_path)
    (tmp_path / "4").mkdir()
    (tmp_path / "4/mem").touch()
    with pytest.raises(VmGone):
        Memory(4, proc=tmp_path).maps()
    (tmp_path / "4/maps").write_bytes(b"nonsense\n")
    with pytest.raises(Refused, match="not understood"):
        Memory(4, proc=tmp_path).maps()


class Image(Memory):
    """A file's bytes as if they were loaded at address 0x10000."""

    BASE = 0x10000

    def __init__(self, data: bytes) -> None:
        self.pid = 4
        self.data = data

    def read(self, address: int, size: int) -> bytes:
        at = address - self.BASE
        if at < 0 or at + size > len(self.data):
            raise OSError(5, "not there")
        return self.data[at : at + size]


def elf_image() -> bytes:
    """A library with one symbol, `f` at 0x100, and a GNU hash table of one bucket."""
    strings, symbols, table, dynamic = 0x200, 0x210, 0x240, 0x270
    wanted = 5381 * 33 + ord("f")
    image = bytearray(0x300)
    struct.pack_into("<4sBBB", image, 0, b"\x7fELF", 2, 1, 1)
    struct.pack_into("<HHIQQQIHHH", image, 16, 3, 62, 1, 0, 64, 0, 0, 64, 56, 2)
    struct.pack_into("<IIQQQQQQ", image, 64, 1, 5, 0, 0, 0, 0x300, 0x300, 0x1000)
    struct.pack_into("<IIQQQQQQ", image, 120, 2, 4, dynamic, dynamic, dynamic, 64, 64, 8)
    image[strings : strings + 3] = b"\0f\0"
    struct.pack_into("<IBBHQQ", image, symbols + 24, 1, 0x12, 0, 1, 0x100, 16)
    struct.pack_into("<4I", image, table, 1, 1, 1, 0)
    struct.pack_into("<QII", image, table + 16, 0, 1, wanted & 0xFFFFFFFF | 1)
    struct.pack_into("<8Q", image, dynamic, 5, strings, 6, symbols, 0x6FFFFEF5, table, 0, 0)
    return bytes(image)


def test_a_made_up_object() -> None:
    found = Object(Image(elf_image()), Image.BASE)
    assert found.machine == 62
    assert found.find("f") == memory.Symbol(Image.BASE + 0x100, 16)
    assert found.find("g") is None
    assert found.loader is None
    assert found.build_id() == ""


@settings(max_examples=400)
@given(st.integers(0, 0x2FF), st.binary(min_size=1, max_size=16))
def test_a_damaged_object_is_refused_or_harmless(at: int, data: bytes) -> None:
    image = bytearray(elf_image())
    image[at : at + len(data)] = data
    try:
        found = Object(Image(bytes(image)), Image.BASE)
        found.find("f")
        found.find("no_such_symbol")
        found.build_id()
    except Refused as error:
        assert error.hint


@given(st.binary(max_size=300))
def test_garbage_is_no_object(data: bytes) -> None:
    with pytest.raises(Refused):
        Object(Image(data), Image.BASE)


def test_build_ids() -> None:
    note = struct.pack("<III", 4, 3, 3) + b"GNU\0" + b"\x0a\x0b\x0c\0"
    other = struct.pack("<III", 4, 4, 1) + b"GNU\0" + b"abcd"
    assert memory.find_build_id(other + note) == "0a0b0c"
    assert memory.find_build_id(other) == memory.find_build_id(note[:-3]) == ""


@given(st.binary(max_size=100))
def test_garbage_notes(data: bytes) -> None:
    assert isinstance(memory.find_build_id(data), str)
