"""How the lock thread goes about it: what it allocates, in what order, in how many mappings, and when it sleeps."""
# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest

from tests.qemu import truth
from tests.qemu.conftest import assert_holds, ramlock
from tests.qemu.guest import GIB, MIB, Guest

pytestmark = pytest.mark.usefixtures("lockable")

TIB = 1024 * GIB


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest(memory=GIB, ramlock=["--hold-budget", "400", "--threads", "2"]) as running:
        yield running


def resident(guest: Guest) -> int:
    return int(truth.status(guest.pid, "VmRSS").split()[0]) * 1024


def test_settings_of_the_launch_are_reported_and_can_be_changed(guest: Guest) -> None:
    reply = guest.query()
    assert (reply["hold-budget"], reply["threads"]) == (400, 2)
    result = ramlock("set", "100M", "--pid", guest.pid, "--hold-budget", "900", "--threads", "3")
    assert result.returncode == 0, result.stderr
    reply = guest.query()
    assert (reply["hold-budget"], reply["threads"]) == (900, 3)
    reply = guest.guarantee(200 * MIB)
    assert (reply["hold-budget"], reply["threads"]) == (900, 3)


def test_steps_are_told_for_the_present_guarantee(guest: Guest) -> None:
    reply = guest.guarantee(900 * MIB)
    assert 0 < reply["step-p99-us"] <= reply["step-max-us"]
    assert reply["rate"] > 0
    reply = guest.guarantee(900 * MIB)
    assert reply["step-max-us"] == 0


def test_raising_to_what_is_resident_allocates_nothing(guest: Guest) -> None:
    guest.guarantee(800 * MIB, prefault=True)
    guest.guarantee(0)
    before = resident(guest)
    reply = guest.guarantee(800 * MIB)
    assert resident(guest) - before < 16 * MIB
    assert reply["gap-filled"] == 0
    assert_holds(guest, 800 * MIB)


def test_by_address_if_asked_for(guest: Guest) -> None:
    guest.guarantee(0)
    guest.guarantee(64 * MIB, order="address")
    ram = guest.ram()
    assert truth.locked(guest.pid).ranges == (truth.Range(ram.start, ram.start + 64 * MIB),)
    guest.guarantee(0, order="resident")


def test_several_threads_fill_and_leave(guest: Guest) -> None:
    guest.guarantee(0)
    guest.guarantee(GIB, threads=4, **{"hold-budget": 50})
    assert_holds(guest, GIB)
    guest.guarantee(0, threads=1, **{"hold-budget": 500})
    guest.check_unharmed()


def test_nothing_wakes_when_nothing_is_to_do(guest: Guest) -> None:
    guest.guarantee(0)
    names = truth.threads(guest.pid)
    helpers = {task for name, task in names.items() if name in ("ramlock-lock", "ramlock-fill")}
    assert names["ramlock-lock"] in helpers
    time.sleep(0.2)
    before = {task: truth.switches(guest.pid, task) for task in helpers}
    time.sleep(2)
    assert {task: truth.switches(guest.pid, task) for task in helpers} == before


def test_the_threads_are_gone_after_eject() -> None:
    with Guest(memory=256 * MIB, ramlock=["--threads", "3", "--hold-budget", "50"]) as fresh:
        fresh.guarantee(256 * MIB)
        result = ramlock("eject", "--pid", fresh.pid)
        assert result.returncode == 0, result.stderr
        deadline = time.monotonic() + 30
        while any(name.startswith("ramlock") for name in truth.threads(fresh.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        fresh.check_unharmed()


def test_a_terabyte_of_which_the_host_has_not_enough() -> None:
    """On fault, what the host has is armed; for the rest the guarantee is short: the guest may touch it."""
    args = ["-m", "1T", "-object", "memory-backend-ram,id=m0,size=1T,reserve=off"]
    with Guest(machine="microvm,memory-backend=m0", memory=0, args=args) as large:
        before = resident(large)
        reply = large.guarantee(2 * GIB, prefault=False)
        assert reply["state"] == "idle"
        assert reply["armed"] == 2 * GIB
        assert truth.vm_lck(large.pid) == 2 * GIB
        reply = large.guarantee(TIB)
        assert reply["state"] == "short"
        assert reply["short"]["reason"] == "host-memory"
        assert 2 * GIB < reply["armed"] < TIB
        assert resident(large) - before < 64 * MIB
        large.guarantee(0)
        assert truth.vm_lck(large.pid) == 0
