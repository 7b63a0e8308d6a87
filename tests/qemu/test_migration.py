"""Both sides of a live migration have the shim: the source keeps its guarantee, the target's is there by itself."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import assert_holds, assert_refused, ramlock
from tests.qemu.guest import MIB, ROOT, Guest
from tests.qemu.monitor import Monitor, MonitorError

pytestmark = pytest.mark.usefixtures("lockable", "root")

MEMORY = 128 * MIB
GUARANTEE = 64 * MIB
NO_SUCH_VM = 6


def wait_for(what: Callable[[], Any], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def status(guest: Guest) -> str:
    return str(guest.monitor.execute("query-migrate").get("status", "none"))


def source() -> Guest:
    return Guest(memory=MEMORY, ramlock=["--guarantee", str(GUARANTEE)])


def target() -> Guest:
    return Guest(memory=MEMORY, ramlock=["--guarantee", str(GUARANTEE)], args=["-incoming", "defer"])


def connect(old: Guest, new: Guest, bandwidth: int) -> None:
    """Begins to migrate, no faster than so many bytes a second."""
    uri = f"unix:{new.directory}/migration"
    new.monitor.execute("migrate-incoming", {"uri": uri})
    old.monitor.execute("migrate-set-parameters", {"max-bandwidth": bandwidth})
    old.monitor.execute("migrate", {"uri": uri})
    wait_for(lambda: status(old) == "active")


def arrive(old: Guest, new: Guest) -> None:
    """Lets it end, and holds the new VM against what was asked for at its launch."""
    wait_for(lambda: status(old) == "completed" and status(new) == "completed")
    assert_holds(old, GUARANTEE)
    wait_for(lambda: new.query()["state"] == "idle")  # by itself
    assert_holds(new, GUARANTEE)
    new.check_unharmed()


def test_precopy() -> None:
    """Nothing there forbids to lock: the guarantee is held on both sides all the time."""
    with source() as old, target() as new:
        for guest in (old, new):
            guest.settle()
            assert_holds(guest, GUARANTEE)
        connect(old, new, 1 * MIB)
        for guest in (old, new):
            assert_holds(guest, GUARANTEE)
        assert status(old) == "active"
        result = ramlock("set", GUARANTEE // 2, "--pid", old.pid)  # goes up and down meanwhile
        assert result.returncode == 0, result.stderr
        result = ramlock("set", GUARANTEE, "--pid", old.pid)
        assert result.returncode == 0, result.stderr
        old.monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 34})
        arrive(old, new)


def test_postcopy() -> None:
    """The target has nothing locked, nor populated, from the beginning to the end, and says why."""
    postcopy = {"capabilities": [{"capability": "postcopy-ram", "state": True}]}
    with source() as old, target() as new:
        try:
            new.monitor.execute("migrate-set-capabilities", postcopy)
        except MonitorError as error:
            absent(f"this machine cannot be the target of a postcopy migration: {error}")
        old.monitor.execute("migrate-set-capabilities", postcopy)
        wait_for(lambda: new.query()["state"] == "short")
        connect(old, new, 1 * MIB)
        old.monitor.execute("migrate-set-parameters", {"max-postcopy-bandwidth": 8 * MIB})
        old.monitor.execute("migrate-start-postcopy")
        wait_for(lambda: status(old) == "postcopy-active")
        seen = 0
        while status(new) != "completed":
            locked = truth.vm_lck(new.pid)
            reply = new.query()
            if status(new) == "completed":
                break
            assert (locked, reply["locked"]) == (0, 0)
            assert (reply["state"], reply["short"]["reason"]) == ("short", "migration"), reply
            assert reply["requested"] == GUARANTEE
            assert old.query()["locked"] >= GUARANTEE
            seen += 1
        assert seen, "it was over before anybody could look"
        arrive(old, new)


def test_savevm_and_loadvm(tmp_path: Path) -> None:
    """The guarantee is held before, after, and when the saved state is there again."""
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    with Guest(
        memory=MEMORY,
        ramlock=["--guarantee", str(GUARANTEE)],
        args=["-drive", f"if=none,id=disk,file={disk},format=qcow2"],
    ) as guest:
        guest.settle()
        for line in ("savevm here", "loadvm here"):
            assert guest.monitor.human(line) == ""
            guest.settle()
            assert_holds(guest, GUARANTEE)
        guest.check_unharmed()


def test_a_qemu_that_executes_itself_again(tmp_path: Path) -> None:
    """Its successor in the same process has no shim: that is said, and `inject` brings the guarantee back."""
    library = tmp_path / "anew.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-o", str(library), str(ROOT / "tests/qemu/anew.c")], check=True)
    with Guest(memory=MEMORY, ramlock=["--guarantee", str(GUARANTEE)], env={"LD_PRELOAD": str(library)}) as guest:
        guest.settle()
        assert_holds(guest, GUARANTEE)
        monitor_path = guest.directory / "qmp"
        monitor_path.unlink()  # or one could still connect to the old one, and be reset
        os.kill(guest.pid, signal.SIGUSR2)
        wait_for(lambda: truth.vm_lck(guest.pid) == 0)
        with Monitor(monitor_path, 60) as monitor:  # QEMU's own, of the successor
            assert monitor.execute("query-status")["running"] is True
            assert not [name for name in truth.threads(guest.pid) if name.startswith("ramlock")]
            result = ramlock("status", "--pid", guest.pid)
            assert_refused(result, NO_SUCH_VM)
            assert "ramlock inject" in result.stderr
            result = ramlock("inject", "--pid", guest.pid, "--guarantee", GUARANTEE)
            assert result.returncode == 0, result.stderr
            held = truth.locked(guest.pid)
            assert held.resident == held.vm_lck >= GUARANTEE
            assert ramlock("status", "--pid", guest.pid).returncode == 0
            assert monitor.execute("query-status")["running"] is True
