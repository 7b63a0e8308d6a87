"""Guest RAM is what is locked: no firmware, no video RAM, no page of QEMU itself."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import time

import pytest

from tests.qemu import truth
from tests.qemu.conftest import assert_holds
from tests.qemu.guest import MIB, Guest

pytestmark = pytest.mark.usefixtures("lockable")


def test_all_is_exactly_guest_ram() -> None:
    with Guest(memory=512 * MIB, args=["-device", "VGA"]) as guest:
        with guest.shim() as shim:
            shim.execute("set_ram_minguarantee", {"all": True})
            blocks = shim.execute("query-ram-blocks")
        guest.settle()
        qemus = guest.blocks()
        assert "pc.bios" in qemus
        assert any("vram" in name for name in qemus)
        assert [block["id"] for block in blocks] == ["pc.ram"]
        assert blocks[0]["size"] == qemus["pc.ram"] == 512 * MIB
        held = assert_holds(guest, 512 * MIB)
        assert held.ranges == (guest.ram(),)


def test_hotplugged_memory_is_guest_ram() -> None:
    """A DIMM that comes later counts, and a guarantee of all follows it."""
    with Guest(memory=256 * MIB, args=["-m", "256M,slots=2,maxmem=1G"]) as guest:
        with guest.shim() as shim:
            shim.execute("set_ram_minguarantee", {"all": True})
            guest.settle()
            guest.monitor.human("object_add memory-backend-ram,id=dimm,size=128M")
            guest.monitor.human("device_add pc-dimm,id=d0,memdev=dimm")
            deadline = time.monotonic() + 30
            while (reply := shim.execute("query-ram-minguarantee"))["locked"] != 384 * MIB:
                assert time.monotonic() < deadline, reply
                time.sleep(0.05)
        assert reply["ram"] == 384 * MIB
        assert {block["id"] for block in reply["blocks"]} == {"pc.ram", "dimm"}
        held = truth.locked(guest.pid)
        assert held.resident == held.vm_lck == 384 * MIB
        guest.check_unharmed()
