"""The screen of `ramlock watch`: nothing is wider or higher than the terminal, whatever VMs are called."""
# SPDX-License-Identifier: GPL-2.0-or-later

import io
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some
from rich.cells import cell_len
from rich.console import Console

from ramlock import procfs
from ramlock.commands.screen import MARKS, Screen, bar, short
from ramlock.reply import parse
from ramlock.survey import Seen
from tests.unit.conftest import reply

GIB = 1 << 30


def vm(pid: int = 1, name: str = "web", ram: int | None = 2 * GIB, **more: object) -> Seen:
    process = procfs.Process(pid, 1, "S", (0, 0, 0, 0), pid, 0, "/usr/bin/qemu-system-x86_64", ("q", "-name", name))
    return Seen(pid, process, ram=ram, resident=GIB, swapped=0, shim=True, **more)  # type: ignore[arg-type]


def screen(encoding: str = "utf-8") -> Screen:
    return Screen(Console(file=io.TextIOWrapper(io.BytesIO(), encoding=encoding)))


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
@settings(deadline=None)
@given(
    names=some.lists(some.text(min_size=1, max_size=60), max_size=12),
    width=some.integers(2, 200),
    height=some.integers(1, 50),
)
def test_it_fits(encoding: str, names: list[str], width: int, height: int) -> None:
    everyone = [vm(pid, name, guarantee=parse(reply(requested=GIB, locked=GIB // 2))) for pid, name in enumerate(names)]
    events = deque((0.0, name) for name in ("x" * 300, "y", "z"))
    lines = screen(encoding).lines(everyone, events, width, height)
    assert len(lines) <= height
    assert all(cell_len(line.plain) <= width and "\x1b" not in line.plain for line in lines)


def test_who_lacks_something_comes_first() -> None:
    held = parse(reply(requested=GIB, locked=GIB))
    short_of = parse(reply(requested=GIB, state="short", short={"reason": "cgroup", "desc": ""}))
    everyone = [
        vm(1, "a-none")._replace(shim=False),
        vm(2, "b-held", guarantee=held),
        vm(3, "c-short", guarantee=short_of),
        *[vm(pid, "d-held", guarantee=held) for pid in range(4, 40)],
    ]
    lines = [line.plain for line in screen().lines(everyone, deque(), 80, 24)]
    assert len(lines) <= 24
    assert lines[2].startswith("c-short")
    assert lines[3].startswith("b-held")
    assert lines[-2] == "and 20 more"


@settings(deadline=None)
@given(
    requested=some.integers(0, 3 * GIB),
    locked=some.integers(0, 3 * GIB),
    resident=some.integers(0, 4 * GIB),
    swapped=some.integers(0, 4 * GIB),
    cells=some.integers(0, 100),
)
def test_a_bar_is_never_longer_nor_fuller_than_it_is(
    requested: int, locked: int, resident: int, swapped: int, cells: int
) -> None:
    one = vm(guarantee=parse(reply(requested=requested, locked=locked)))._replace(resident=resident, swapped=swapped)
    widths = bar(one, cells)
    assert sum(widths) == cells
    assert len(widths) == len(MARKS)
    assert all(width >= 0 for width in widths)
    if locked < 2 * GIB and cells:
        assert widths[0] < cells
    assert bar(one._replace(ram=None), cells) == (0,) * len(MARKS)


@settings(deadline=None)
@given(some.integers(0, 1 << 60))
def test_sizes_are_short(size: int) -> None:
    assert len(short(size)) <= 8 if size >= 1 << 50 else len(short(size)) <= 6


def test_sizes() -> None:
    sizes = (None, 0, 1023, 1 << 20, 3 << 29, 512 << 20, (1 << 40) - 1)
    assert [short(size) for size in sizes] == ["-", "0", "1023", "1M", "1.5G", "512M", "1024G"]
