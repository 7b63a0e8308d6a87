"""Checks of a target that this host cannot run: other processors."""
# SPDX-License-Identifier: GPL-2.0-or-later

import platform
import struct
from pathlib import Path

import pytest

from ramlock import preflight, procfs
from ramlock.errors import CannotInject

X86_64, AARCH64 = 62, 183
FACTS = procfs.read(1)


def tree(folder: Path, header: bytes) -> tuple[procfs.Process, Path]:
    """A /proc with one process whose program begins like that."""
    (folder / str(FACTS.pid)).mkdir()
    (folder / str(FACTS.pid) / "exe").write_bytes(header)
    return FACTS, folder


def elf(machine: int, bits: int = 2) -> bytes:
    return b"\x7fELF" + bytes([bits, 1, 1]) + bytes(9) + struct.pack("<HH", 3, machine)


def test_this_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    assert preflight._architecture(*tree(tmp_path, elf(X86_64))) == (None, "x86_64")


@pytest.mark.parametrize(
    ("header", "says"),
    [(elf(AARCH64), "for another processor"), (elf(3, 1), "32-bit"), (b"#!/bin/sh\n", "no ELF file")],
    ids=["aarch64", "i386", "script"],
)
def test_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, header: bytes, says: str) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    with pytest.raises(CannotInject, match=says) as error:
        preflight._architecture(*tree(tmp_path, header))
    assert error.value.hint


def test_a_host_of_another_processor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Refused at once, whatever the process is: there is no code of ours for it."""
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(CannotInject, match="does not work on aarch64 yet") as error:
        preflight._architecture(*tree(tmp_path, elf(AARCH64)))
    assert "ramlock run" in error.value.hint
