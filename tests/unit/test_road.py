"""By which path a process gets the shim, and what our code finds there."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import struct
from pathlib import Path

import pytest

from ramlock import detour, procfs, road, x86_64
from ramlock import shim as shim_file
from ramlock.errors import CannotPreload
from ramlock.loaded import Shim
from ramlock.tracee import Registers
from ramlock.x86_64 import Entries

SHIM = shim_file.find({})


@pytest.fixture
def ours() -> procfs.Process:
    return procfs.read(os.getpid())


def test_the_file_itself(ours: procfs.Process) -> None:
    file = road.read(SHIM)
    assert len(file.build_id) == 40
    assert road.choose(ours, file, [], []) == road.Road(str(SHIM), "")


def test_the_same_build_is_used_again(ours: procfs.Process) -> None:
    file = road.read(SHIM)
    loaded = [Shim(0x1000, "/proc/self/fd/9", file.build_id), Shim(0x2000, str(SHIM), "00")]
    assert road.choose(ours, file, loaded, []).path == "/proc/self/fd/9"


def test_another_build_at_the_path_is_spelled_anew(ours: procfs.Process) -> None:
    path = road.choose(ours, road.read(SHIM), [Shim(0x1000, str(SHIM), "00")], []).path
    assert path is not None
    assert path != str(SHIM)
    assert os.path.samefile(path, SHIM)
    assert road.spelling("/a/b", ["/a/b", "/a/./b"]) == "/a/././b"
    assert road.spelling("/b", ["/b"]) == "/./b"


def test_a_file_that_is_not_the_same(ours: procfs.Process, tmp_path: Path) -> None:
    copy = tmp_path / "ramlock.so"
    copy.write_bytes(SHIM.read_bytes())
    file = road.read(copy)
    assert road.hidden(ours, file) == ""
    copy.rename(tmp_path / "old")
    assert "does not see" in road.hidden(ours, file)
    copy.write_bytes(b"another")
    assert "another file" in road.hidden(ours, file)
    assert road.has_proc(ours)


def test_no_shim_at_all(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\x7fELF")
    for read in (road.read, detour.load_code):
        with pytest.raises(CannotPreload):
            read(tmp_path / "x")  # type: ignore[operator]


def test_the_code_has_its_mark_and_two_entries() -> None:
    code = detour.load_code(SHIM)
    assert code.data.startswith(detour.MARK)
    assert code.trampoline % 16 == code.memfd % 16 == 0
    assert code.trampoline == len(detour.MARK)
    assert len(code.data) < 600  # Debian's QEMU has room for 939


def registers() -> Registers:
    regs = Registers()
    regs.rip, regs.rsp, regs.orig_rax, regs.rax = 0x7000, 0x10008, 271, (1 << 64) - 514
    return regs


def test_an_interrupted_ppoll() -> None:
    regs = registers()
    assert x86_64.is_interrupted_ppoll(regs)
    for name, value in (("orig_rax", 7), ("rax", (1 << 64) - 4), ("rax", 1), ("orig_rax", (1 << 64) - 1)):
        other = registers()
        setattr(other, name, value)
        assert not x86_64.is_interrupted_ppoll(other)


def test_a_bootstrap_stays_below_the_red_zone() -> None:
    regs = registers()
    frame = x86_64.bootstrap(regs, Entries(1, 2, 3), b"/path", b"A=1\n", 2696)
    words = struct.unpack_from("<13Q", frame.data)
    assert frame.address % 64 == 0
    assert frame.end == 0x10008 - 128
    assert frame.address + len(frame.data) <= words[6]
    assert words[6] % 64 == 0
    assert words[6] + 2696 <= frame.end
    assert words[:3] == (1, 2, 3)
    for at, text in zip(words[3:6], (b"/path\0", b"ramlock_start\0", b"A=1\n\0"), strict=True):
        assert frame.data[at - frame.address :].startswith(text)
    assert words[7:10] == (0x7000 - 2, 0x10008, 271)
    changed = x86_64.go_to(regs, 0x4000, frame.address)
    assert (changed.rip, changed.rsp, changed.orig_rax, changed.rax) == (0x4000, frame.address, (1 << 64) - 1, regs.rax)
    assert regs.rip == 0x7000


def test_a_memfd_call_stays_below_the_red_zone() -> None:
    frame = x86_64.memfd_call(registers(), b"name", 9)
    assert frame.address % 64 == 0
    assert frame.address + len(frame.data) <= frame.end == 0x10008 - 128
    assert struct.unpack_from("<4Q", frame.data) == (0x7000 - 2, 0x10008, 271, 9)
    assert frame.data[32:] == b"name\0"
