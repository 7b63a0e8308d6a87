"""Work in a child that may be lost: whatever happens to it, there is an answer, and soon."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import struct
import subprocess
import time
from pathlib import Path

import pytest

from ramlock import confined, elf
from ramlock.deadline import Deadline


def test_what_the_work_returns() -> None:
    assert confined.run(lambda: {"a": 1}, 10) == {"a": 1}
    assert confined.run(list, 10) == []


def test_work_that_fails_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    assert confined.run(lambda: 1 // 0, 10) is None
    assert confined.run(lambda: "x" * (1 << 20), 10) is None
    assert confined.run(object, 10) is None
    assert capfd.readouterr() == ("", "")


def test_too_much_memory() -> None:
    assert confined.run(lambda: len(bytearray(2 << 30)), 10) is None
    assert confined.run(lambda: len(bytearray(1 << 20)), 10) == 1 << 20


@pytest.mark.parametrize("work", [lambda: time.sleep(60), lambda: 7 ** (1 << 26)], ids=["asleep", "busy"])
def test_too_much_time(work: object) -> None:
    assert callable(work)
    began = time.monotonic()
    assert confined.run(work, 0.2) is None
    assert time.monotonic() - began < 30


def test_no_child_and_no_descriptor_is_left() -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        confined.run(lambda: time.sleep(60), 0.01)
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_debug_information_that_claims_to_be_of_terabytes(tmp_path: Path) -> None:
    """The file costs its owner nothing; reading it would take all memory of the host."""
    path = tmp_path / "bomb"
    (tmp_path / "b.c").write_text("struct RAMBlock { long a; } b; int main(void) { return 0; }\n")
    subprocess.run(["gcc", "-g", "-o", path, tmp_path / "b.c"], check=True)
    data = bytearray(path.read_bytes())
    offset, count, names = *struct.unpack_from("<Q", data, 40), *struct.unpack_from("<HH", data, 60)
    (strings,) = struct.unpack_from("<Q", data, offset + 64 * names + 24)
    for at in range(offset, offset + 64 * count, 64):
        (name,) = struct.unpack_from("<I", data, at)
        if data[strings + name :].startswith(b".debug_str\0"):
            struct.pack_into("<Q", data, at + 32, 1 << 40)
    path.write_bytes(data)
    os.truncate(path, 2 << 40)

    def read() -> dict[str, int]:
        with path.open("rb") as file:
            return elf.members(file, "RAMBlock", None, Deadline(10))

    assert confined.run(read, 30) is None
