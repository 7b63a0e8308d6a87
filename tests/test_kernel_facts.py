"""What the engine relies on in the kernel holds on this one: runs the programs of docs/kernel-facts."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.qemu.guest import MIB, ROOT
from tests.qemu.pressure import Zram, can_swap
from tests.test_make import make

FACTS = ROOT / "docs/kernel-facts"
NAMES = sorted(path.stem for path in FACTS.glob("*.c"))
UNASKED = 77
SWAPS = {
    "locking-brings-swapped-pages-back": 128 * MIB,
    "no-mutex-is-needed": 128 * MIB,
    "full-cgroup-kills": 512 * MIB,
    "the-mapping-is-what-locks": 128 * MIB,
}


@pytest.fixture(scope="module")
def built() -> Path:
    make("facts-built")
    return ROOT / "build/kernel-facts"


@pytest.fixture
def swap(request: pytest.FixtureRequest) -> Iterator[None]:
    """Swap for the fact that is about swap, where some can be made."""
    with ExitStack() as stack:
        size = SWAPS.get(request.getfixturevalue("name"))
        if size and can_swap():
            stack.enter_context(Zram(size))
        yield


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.usefixtures("swap")
def test_fact(built: Path, name: str) -> None:
    result = subprocess.run([str(built / name)], capture_output=True, text=True, timeout=120, check=False)
    if result.returncode == UNASKED:
        pytest.skip(result.stdout.strip())
    assert result.returncode == 0, result.stdout + result.stderr
    assert "  yes  " in result.stdout


def test_the_table_has_all_of_them() -> None:
    named = re.findall(r"^\| \[([\w-]+)\]\(([\w-]+)\.c\)", (FACTS / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in named) == NAMES
    assert all(name == path for name, path in named)
