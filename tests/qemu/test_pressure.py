"""The demonstration of what a guarantee is worth puts everything back."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.qemu.guest import ROOT
from tests.qemu.pressure import can_swap, hierarchy

pytestmark = pytest.mark.usefixtures("lockable", "root")


@pytest.fixture(autouse=True)
def pressure() -> None:
    if not can_swap() or hierarchy() is None:
        absent("no zram or no memory cgroup here, so no swap pressure")


def groups(pid: int) -> list[Path]:
    """The memory cgroups that a process has made."""
    root = hierarchy()
    assert root
    return list(root.glob(f"ramlock-test-{pid}-*"))


def swaps() -> set[str]:
    return {line.split()[0] for line in Path("/proc/swaps").read_text().splitlines()[1:]}


def test_the_demo_when_interrupted(tmp_path: Path) -> None:
    """While its guests start: they are gone then, and so are swap and cgroup."""
    before = swaps()
    with subprocess.Popen(
        [sys.executable, str(ROOT / "examples/demo_pressure.py")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    ) as demo:
        deadline = time.monotonic() + 60
        while not list(tmp_path.glob("*/pid")):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert groups(demo.pid)
        made = swaps() - before
        assert made
        demo.send_signal(signal.SIGINT)
        demo.send_signal(signal.SIGTERM)  # one who is in a hurry
        said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, said
    assert not made & swaps()
    assert not groups(demo.pid)
    assert list(tmp_path.iterdir()) == []
