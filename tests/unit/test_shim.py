"""Where the shim is found, and which paths LD_PRELOAD cannot hold."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

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


def test_an_older_glibc_will_do() -> None:
    """The shim is loaded into QEMUs of other systems, with whichever glibc they have."""
    with shim.find({}).open("rb") as file:
        needs = ELFFile(file).get_section_by_name(".gnu.version_r")
        assert isinstance(needs, GNUVerNeedSection)
        versions = {(need.name, aux.name) for need, auxes in needs.iter_versions() for aux in auxes}
    assert ("libc.so.6", "GLIBC_2.14") in versions  # of memcpy(): these are the shim's needs indeed
    assert {library for library, _ in versions} <= {"libc.so.6", "ld-linux-x86-64.so.2"}
    numbers = [tuple(map(int, version.removeprefix("GLIBC_").split("."))) for _, version in versions]
    assert max(numbers) <= (2, 28), versions


def test_it_tells_nothing_of_where_it_was_built() -> None:
    place = shim.find({})
    assert os.fsencode(place.parents[2]) not in place.read_bytes()
