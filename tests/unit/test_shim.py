"""Where the shim is found, and which paths LD_PRELOAD cannot hold."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path

import pytest

from ramlock import shim
from ramlock.errors import CannotPreload


def test_the_first_place_that_exists(tmp_path: Path) -> None:
    places = tmp_path / "a" / "ramlock.so", tmp_path / "b" / "ramlock.so", tmp_path / "c" / "ramlock.so"
    for place in places[1:]:
        place.parent.mkdir()
        place.touch()
    assert shim.find({}, places) == places[1]
    assert shim.find({"RAMLOCK_SHIM": str(places[2])}, places) == places[2]


def test_a_relative_path_becomes_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.so").touch()
    assert shim.find({"RAMLOCK_SHIM": "x.so"}) == tmp_path / "x.so"


def test_none(tmp_path: Path) -> None:
    with pytest.raises(CannotPreload, match="not installed"):
        shim.find({}, (tmp_path / "ramlock.so",))
    with pytest.raises(CannotPreload, match="no file"):
        shim.find({"RAMLOCK_SHIM": str(tmp_path)})


@pytest.mark.parametrize("folder", ["a b", "a:b", "$ORIGIN"])
def test_what_ld_preload_cannot_hold(tmp_path: Path, folder: str) -> None:
    (tmp_path / folder).mkdir()
    (tmp_path / folder / "ramlock.so").touch()
    with pytest.raises(CannotPreload, match="LD_PRELOAD cannot hold") as error:
        shim.find({}, (tmp_path / folder / "ramlock.so",))
    assert "RAMLOCK_SHIM" in error.value.hint


def test_where_nothing_may_be_executed() -> None:
    place = Path("/proc/self/status")  # a file on a file system that is nearly always mounted noexec
    if not os.statvfs(place).f_flag & os.ST_NOEXEC:
        pytest.skip("/proc is not mounted noexec here")
    with pytest.raises(CannotPreload, match="noexec"):
        shim.find({}, (place,))
