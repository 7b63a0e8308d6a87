"""Taking the shim out again: nothing stays locked, no thread and no socket is left, and the VM runs on."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

from pathlib import Path

import pytest

from tests.qemu import truth
from tests.qemu.conftest import assert_holds, assert_refused, ramlock
from tests.qemu.guest import MIB, Guest, How

pytestmark = pytest.mark.usefixtures("lockable", "root")


def check_gone(guest: Guest) -> None:
    assert truth.vm_lck(guest.pid) == 0
    assert {"ramlock-ctl", "ramlock-lock"}.isdisjoint(truth.threads(guest.pid))
    assert not Path(f"/run/ramlock/{guest.pid}.sock").exists()
    assert not Path(f"/run/ramlock/{guest.pid}").exists()
    assert_refused(ramlock("status", "--pid", guest.pid), 6)
    guest.check_unharmed()


@pytest.mark.parametrize("how", ["run", "env", "plain"])
def test_eject(how: How) -> None:
    """However the shim came."""
    with Guest(how=how) as guest:
        if how == "plain":
            assert ramlock("inject", "--pid", guest.pid).returncode == 0
        guest.guarantee(256 * MIB)
        assert_holds(guest, 256 * MIB)
        result = ramlock("eject", "--pid", guest.pid)
        assert result.returncode == 0, result.stderr
        check_gone(guest)
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "64M")
        assert result.returncode == 0, result.stderr
        assert_holds(guest, 64 * MIB)
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        check_gone(guest)


@pytest.mark.parametrize("args", [["-runas", "nobody"], ["-name", "go"]], ids=["another-user", "by-name"])
def test_folders_go_too(args: list[str]) -> None:
    with Guest(how="plain", args=args) as guest:
        assert ramlock("inject", "--pid", guest.pid, "--guarantee", "4M").returncode == 0
        which = ("--vm", "go") if "go" in args else ("--pid", guest.pid)
        assert ramlock("eject", *which).returncode == 0
        check_gone(guest)


def test_what_was_touched_in_mid_flight() -> None:
    """A guarantee that is still being locked is no hindrance."""
    with Guest(how="plain") as guest:
        assert ramlock("inject", "--pid", guest.pid, "--guarantee", "900M", "--no-wait").returncode == 0
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        check_gone(guest)


def test_nothing_to_eject() -> None:
    with Guest(how="plain") as guest:
        assert_refused(ramlock("eject", "--pid", guest.pid), 6)
        guest.check_unharmed()


def test_leftovers_of_the_dead_are_swept() -> None:
    """What a killed VM leaves in /run/ramlock goes with the next injection."""
    with Guest(how="plain", args=["-runas", "nobody"]) as guest:
        assert ramlock("inject", "--pid", guest.pid).returncode == 0
        dead = guest.pid
    assert Path(f"/run/ramlock/{dead}").exists()
    with Guest(how="plain") as guest:
        assert ramlock("inject", "--pid", guest.pid).returncode == 0
        assert not Path(f"/run/ramlock/{dead}").exists()
        assert not Path(f"/run/ramlock/{dead}.sock").is_symlink()
