"""A guarantee goes up and down under a running guest, and the kernel's own figures agree after each change."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds, ramlock
from tests.qemu.guest import GIB, MIB, SLACK, Guest

pytestmark = pytest.mark.usefixtures("lockable")


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest(boot=True, memory=2 * GIB, args=["-name", "guest=up-and-down"]) as booted:
        booted.agent.ask(f"touch {256 * MIB}")
        yield booted


# Up, down, by a page, to nothing and to everything.
STEPS = [1 * GIB, 256 * MIB, 1537 * MIB, 1537 * MIB + 4096, 4 * MIB, 0, 2 * GIB, 512 * MIB + 12288]


@pytest.mark.parametrize("size", STEPS)
def test_every_change_holds(guest: Guest, size: int) -> None:
    result = ramlock("set", size, "--pid", guest.pid, "--json")
    assert result.returncode == 0, result.stderr
    reply = json.loads(result.stdout)
    assert reply["requested"] == size
    held = assert_holds(guest, size)
    assert abs(reply["locked"] - held.resident) <= SLACK
    assert guest.agent.ask("verify") == str(256 * MIB)
    guest.check_unharmed()


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 * MIB), ("1GiB", GIB), ("50%", GIB), ("768m", 768 * MIB), ("all", 2 * GIB), ("0", 0)],
)
def test_sizes_as_people_write_them(guest: Guest, text: str, size: int) -> None:
    result = ramlock("set", text, "--vm", "up-and-down")
    assert result.returncode == 0, result.stderr
    reply = guest.query()
    assert reply["all"] is (text == "all")
    assert_holds(guest, size)


def test_status_says_what_the_kernel_says(guest: Guest) -> None:
    guest.guarantee(640 * MIB)
    result = ramlock("status", "--pid", guest.pid, "--json")
    assert result.returncode == 0, result.stderr
    reply = json.loads(result.stdout)
    held = assert_holds(guest, 640 * MIB)
    assert reply["locked"] == held.resident
    assert reply["ram"] == 2 * GIB
    (block,) = reply["blocks"]
    assert block["id"] == "pc.ram"
    assert block["host"] == guest.ram().start
    assert block["size"] == guest.blocks()["pc.ram"]
    assert (block["page-size"], block["backing"]) == (4096, "anonymous")
    for form in ("--vm", "up-and-down"), ("--socket", str(guest.shim_socket)):
        assert json.loads(ramlock("status", *form, "--json").stdout)["locked"] == reply["locked"]


def test_status_for_people(guest: Guest) -> None:
    guest.guarantee(640 * MIB)
    result = ramlock("status", "--pid", guest.pid)
    assert result.returncode == 0, result.stderr
    assert "640" in result.stdout
    assert "\x1b" not in result.stdout


def test_no_wait_returns_at_once_and_the_work_goes_on(guest: Guest) -> None:
    guest.guarantee(0)
    result = ramlock("set", "1G", "--pid", guest.pid, "--no-wait")
    assert result.returncode == 0, result.stderr
    guest.settle()
    assert_holds(guest, GIB)


def test_resident_pages_come_first(guest: Guest) -> None:
    """What the guest uses already costs no new memory."""
    guest.agent.ask("free")
    guest.guarantee(0)
    ram = guest.ram()
    before = sum(entry.rss for entry in truth.mappings(guest.pid) if ram.contains(entry.range))
    assert before > 128 * MIB
    guest.guarantee(128 * MIB, order="resident")
    assert_holds(guest, 128 * MIB)
    after = sum(entry.rss for entry in truth.mappings(guest.pid) if ram.contains(entry.range))
    assert after - before <= SLACK


def test_reached_event(guest: Guest) -> None:
    with guest.shim() as shim:
        shim.execute("set_ram_minguarantee", {"size": 300 * MIB})
        event = shim.wait_event("RAM_MINGUARANTEE_REACHED", timeout=60)
    assert event["data"]["requested"] == 300 * MIB
    assert event["data"]["locked"] >= 300 * MIB
    assert_holds(guest, 300 * MIB)


@pytest.mark.parametrize("order", ["address", "resident"])
def test_orders(order: str) -> None:
    with Guest(ramlock=["--order", order, "--guarantee", "192M"]) as fresh:
        reply = fresh.settle()
        assert reply["order"] == order
        held = assert_holds(fresh, 192 * MIB)
        if order == "address":
            assert held.ranges[0].start == fresh.ram().start
            assert len(held.ranges) == 1
        result = ramlock("set", "400M", "--order", order, "--pid", fresh.pid)
        assert result.returncode == 0, result.stderr
        assert_holds(fresh, 400 * MIB)


def test_without_prefault_the_guest_fills_it() -> None:
    """An on-fault lock takes no memory before the guest touches it; what the guest then touches is locked."""
    with Guest(boot=True, memory=GIB, ramlock=["--no-prefault", "--guarantee", "all"]) as fresh:
        reply = fresh.settle()
        assert reply["prefault"] is False
        assert reply["armed"] == GIB
        before = truth.locked(fresh.pid)
        assert before.span == before.vm_lck == GIB
        assert before.resident < 768 * MIB
        fresh.agent.ask(f"touch {512 * MIB}")
        after = truth.locked(fresh.pid)
        assert after.resident >= before.resident + 256 * MIB
        assert after.span == GIB
        assert after.swap == 0
        fresh.guarantee(0)
        assert truth.vm_lck(fresh.pid) == 0
        assert fresh.agent.ask("verify") == str(512 * MIB)


@pytest.mark.usefixtures("root")
def test_small_pages(setting: Setting) -> None:
    """Without transparent huge pages every page is one of 4 KiB: the same, only slower."""
    setting("/sys/kernel/mm/transparent_hugepage/enabled", "never")
    with Guest(args=["-machine", "mem-merge=off"]) as fresh:
        for size in (512 * MIB + 4096, 100 * MIB):
            assert ramlock("set", size, "--pid", fresh.pid).returncode == 0
            assert_holds(fresh, size)
        huge = sum(entry.huge for entry in truth.mappings(fresh.pid) if fresh.ram().contains(entry.range))
        assert huge == 0
        fresh.check_unharmed()
