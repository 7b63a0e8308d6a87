"""Two guests that share too little memory: what a guarantee is worth; and its demonstration puts everything back."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.qemu import sharing
from tests.qemu.conftest import assert_refused, ramlock
from tests.qemu.guest import GIB, MIB, ROOT
from tests.qemu.pressure import Confined, Zram, can_swap, hierarchy

REFUSED, SHORT = 4, 5

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


MEMORY = 256 * MIB
WORKING_SET = 160 * MIB
LIMIT = 496 * MIB


def test_the_guaranteed_guest_does_not_bear_it() -> None:
    """In a cgroup that is too small for both: nothing of it is in swap, but of the other one, and nobody is killed.

    Where others want the processors too, the kernel kills within seconds, with or without a guarantee, unless its
    statistics are kept up to date. So there is a small guarantee from the beginning.
    """
    with ExitStack() as stack:
        stack.enter_context(Zram(GIB))
        busy = stack.enter_context(subprocess.Popen([sys.executable, "-c", "while True: pass"]))
        stack.callback(busy.kill)
        group = stack.enter_context(Confined(LIMIT))
        with ThreadPoolExecutor() as pool:  # one after the other would take twice as long
            gold, other = pool.map(
                lambda name: stack.enter_context(sharing.guest_in(group, name, MEMORY)), ("gold", "other")
            )
        assert ramlock("set", "16M", "--pid", gold.pid).returncode == 0
        for guest in (gold, other):
            sharing.fill(guest, WORKING_SET)
        gold.agent.tell("churn 1")
        other.agent.tell("churn 1")
        result = ramlock("set", "all", "--pid", gold.pid)
        assert result.returncode == 0, result.stderr
        for guest in (gold, other):
            guest.agent.answer()
        kept, paid = sharing.work([gold, other], 3)
        assert kept.guaranteed >= MEMORY
        assert kept.guaranteed_swapped == 0
        assert kept.swapped == 0
        assert paid.guaranteed == 0
        assert paid.swapped > 0

        # What leaves nothing to be swapped is refused before it is tried, and with --force it ends short of that.
        assert_refused(ramlock("set", "all", "--pid", other.pid), REFUSED)
        assert other.query()["requested"] == 0
        result = ramlock("set", "all", "--force", "--pid", other.pid)
        assert result.returncode == SHORT, result.stderr
        assert other.query()["short"]["reason"] == "cgroup"
        assert other.agent.ask("verify")  # it swaps through what is left
        assert group.kills() == 0
        for guest in (gold, other):
            guest.check_unharmed()


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
