"""What is kept between the two halves of an upgrade belongs to one process, and may be damaged."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path

import pytest

from ramlock import kept, procfs
from ramlock.errors import Refused

HANDED = {"books": {"held": [[4096, 8192]]}, "wish": {"size": 8192}}


def write(process: procfs.Process, run: Path) -> None:
    with kept.Room(process, run) as room:
        room.fill(HANDED)


def test_it_comes_back_for_the_same_process_only(tmp_path: Path) -> None:
    ours = procfs.read(os.getpid())
    assert kept.read(ours, tmp_path) is None
    write(ours, tmp_path)
    assert kept.read(ours, tmp_path) == HANDED
    assert kept.read(ours._replace(start_time=ours.start_time + 1), tmp_path) is None
    kept.remove(ours, tmp_path)
    assert list(tmp_path.iterdir()) == []
    kept.remove(ours, tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "1", '{"start-time": 1}', '{"handed": {}}', "\xff", "[" * 100000])
def test_damage_is_nothing(tmp_path: Path, text: str) -> None:
    ours = procfs.read(os.getpid())
    (tmp_path / f"{os.getpid()}.books").write_text(text, encoding="latin-1")
    assert kept.read(ours, tmp_path) is None


def test_links_are_not_followed(tmp_path: Path) -> None:
    ours = procfs.read(os.getpid())
    target = tmp_path / "precious"
    target.write_text("precious")
    (tmp_path / f"{os.getpid()}.books").symlink_to(target)
    assert kept.read(ours, tmp_path) is None
    (tmp_path / f".{os.getpid()}.books").symlink_to(target)
    write(ours, tmp_path)
    assert target.read_text() == "precious"
    assert kept.read(ours, tmp_path) == HANDED


def test_room_is_taken_first_and_given_back(tmp_path: Path) -> None:
    ours = procfs.read(os.getpid())
    with kept.Room(ours, tmp_path):
        assert kept.read(ours, tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    write(ours, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [f"{os.getpid()}.books"]
    (tmp_path / "file").touch()
    with pytest.raises(Refused, match="cannot be written down"):
        kept.Room(ours, tmp_path / "file")
