"""Guest RAM that comes, goes and is told from outside: the guarantee follows it, and nothing else is ever locked."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Need, absent
from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds
from tests.qemu.guest import GIB, MIB, Guest
from tests.qemu.monitor import MonitorError

pytestmark = pytest.mark.usefixtures("lockable")
MICROVM = "/usr/bin/qemu-system-x86_64-microvm"
ABOVE = 4 * GIB
"""Where DIMMs are in the guest, and what does not fit below the PCI hole."""

Block = dict[str, Any]


def host_of(guest: Guest, address: int) -> int:
    """Where a guest's physical address is in QEMU, as QEMU says."""
    return int(guest.monitor.human(f"gpa2hva {address:#x}").rsplit(" ", 1)[1], 16)


def block(name: str, host: int, size: int, backing: str = "anonymous", page_size: int = 4096) -> Block:
    return {"id": name, "host": host, "size": size, "page-size": page_size, "backing": backing}


def push(guest: Guest, *blocks: Block) -> None:
    with guest.shim() as shim:
        assert shim.execute("set-ram-blocks", {"blocks": list(blocks)}) == {}


def unplug(guest: Guest, device: str, slot: int = 0) -> None:
    """Unplugs a DIMM and agrees to it as a guest's ACPI code does: see QEMU's docs/specs/acpi_mem_hotplug."""
    guest.monitor.execute("device_del", {"id": device})
    guest.monitor.human(f"o /4 0xa00 {slot}")  # select the slot
    guest.monitor.human("o /1 0xa14 8")  # eject
    assert guest.monitor.wait_event("DEVICE_DELETED", timeout=30)


# ---- A QEMU that does not export its symbols ----


def test_guest_ram_told_from_outside(need: Need) -> None:
    """A guarantee of the launch waits until guest RAM is told, and is then held."""
    need(MICROVM, "qemu-system-x86")
    with Guest(
        qemu=MICROVM, machine="microvm", accel="qtest", memory=512 * MIB, ramlock=["--guarantee", "50%"]
    ) as guest:
        reply = guest.query()
        assert (reply["state"], reply["waiting"]["reason"]) == ("waiting", "no-symbols")
        assert "ramlock set" in reply["waiting"]["desc"]
        ram = guest.ram()
        assert truth.vm_lck(guest.pid) == 0
        push(guest, block("microvm.ram", ram.start, ram.size))
        guest.settle()
        assert_holds(guest, 256 * MIB)
        with guest.shim() as shim:
            (told,) = shim.execute("query-ram-blocks")
        assert told == {**block("microvm.ram", ram.start, ram.size), "source": "controller"}
        guest.guarantee(512 * MIB)
        assert_holds(guest, 512 * MIB)
        push(guest, block("microvm.ram", ram.start, ram.size))
        assert_holds(guest, 512 * MIB)
        guest.guarantee(0)
        assert truth.vm_lck(guest.pid) == 0


def test_what_is_not_so_is_refused(need: Need) -> None:
    """Each lie is told from the truth by the kernel's list of mappings, and leaves what was known before."""
    need(MICROVM, "qemu-system-x86")
    with Guest(qemu=MICROVM, machine="microvm", accel="qtest", memory=64 * MIB) as guest:
        ram = guest.ram()
        true = block("microvm.ram", ram.start, ram.size)
        others = {entry.path: entry.range for entry in truth.mappings(guest.pid) if "w" in entry.permissions}
        lies = [
            [true, true],
            [{**true, "size": ram.size + 4096}],
            [{**true, "size": ram.size - 4096}],
            [{**true, "host": ram.start + 4096}],
            [{**true, "host": ram.start - 4096}],
            [{**true, "host": ram.start + 1}],
            [{**true, "size": 0}],
            [{**true, "page-size": 2 * MIB}],
            [{**true, "page-size": 2 * MIB, "backing": "hugetlb"}],
            [{**true, "backing": "memfd"}],
            [true, block("x", 4096, 4096)],
            [true, block("x", (1 << 64) - 8192, 4096)],
            [true, *(block("x", area.start, area.size) for path, area in others.items() if path == "[heap]")],
            [true, *(block("x", area.start, area.size) for path, area in others.items() if path == "[stack]")],
            [true, *(block("x", area.start, area.size, "file") for path, area in others.items() if path == MICROVM)],
            [true] * 257,
        ]
        assert {"[heap]", "[stack]", MICROVM} <= set(others)
        with guest.shim() as shim:
            for blocks in lies:
                with pytest.raises(MonitorError) as error:
                    shim.execute("set-ram-blocks", {"blocks": blocks})
                assert error.value.desc.startswith("[maps] "), (blocks, error.value.desc)
            odd: list[Block] = [{"host": -1}, {"host": 1 << 64}, {"backing": "gold"}, {"id": "x" * 256}, {"id": 1}]
            for nonsense in ([1], [{}], *([{**true, **member}] for member in odd)):
                with pytest.raises(MonitorError):
                    shim.execute("set-ram-blocks", {"blocks": nonsense})
        assert guest.query()["state"] == "waiting"
        push(guest, true)
        with guest.shim() as shim:
            with pytest.raises(MonitorError):
                shim.execute("set-ram-blocks", {"blocks": lies[1]})
            assert len(shim.execute("query-ram-blocks")) == 1
        assert truth.vm_lck(guest.pid) == 0


def test_a_qemu_that_can_be_asked_is_not_told() -> None:
    with Guest(memory=64 * MIB) as guest:
        ram = guest.ram()
        guest.settle()
        with guest.shim() as shim:
            with pytest.raises(MonitorError) as error:
                shim.execute("set-ram-blocks", {"blocks": [block("pc.ram", ram.start, ram.size)]})
            assert error.value.desc.startswith("[symbols] ")
            assert [entry["source"] for entry in shim.execute("query-ram-blocks")] == ["qemu"]


def test_a_told_block_that_goes_is_not_missed(need: Need) -> None:
    """Nobody tells of a block that vanishes: the shim sees it for itself, and locks elsewhere what is left."""
    need(MICROVM, "qemu-system-x86")
    with Guest(
        qemu=MICROVM,
        machine="q35",
        accel="qtest",
        memory=0,
        args=["-m", "128M,slots=2,maxmem=1G", "-object", "memory-backend-memfd,id=m,size=64M,share=on"],
    ) as guest:
        guest.monitor.execute("device_add", {"driver": "pc-dimm", "id": "d", "memdev": "m"})
        ram = block("pc.ram", host_of(guest, 0), 128 * MIB)
        dimm = block("m", host_of(guest, ABOVE), 64 * MIB, "memfd")
        push(guest, ram, dimm)
        guest.guarantee(192 * MIB)
        assert truth.locked(guest.pid).resident == 192 * MIB
        with guest.shim() as shim:
            unplug(guest, "d")
            guest.monitor.execute("object-del", {"id": "m"})
            event = shim.wait_event("RAM_MINGUARANTEE_SHORT", timeout=60)
        assert event["data"]["reason"] == "no-ram"
        assert guest.query()["ram"] == 128 * MIB
        assert truth.locked(guest.pid).vm_lck == 128 * MIB


# ---- DIMMs that come and go; nobody asks the shim meanwhile ----


def with_slots(memory: int, *more: str) -> list[str]:
    return ["-m", f"{memory // MIB}M,slots=4,maxmem=4G", *more]


def add_backend(guest: Guest, name: str, size: int, kind: str = "memory-backend-ram", **more: Any) -> None:
    guest.monitor.execute("object-add", {"qom-type": kind, "id": name, "size": size, **more})


def add_dimm(guest: Guest, name: str, backend: str) -> None:
    guest.monitor.execute("device_add", {"driver": "pc-dimm", "id": name, "memdev": backend})


def backend_range(guest: Guest, address: int, size: int) -> truth.Range:
    start = host_of(guest, address)
    return truth.Range(start, start + size)


def wait_locked(guest: Guest, *ranges: truth.Range, seconds: float = 60) -> None:
    """Waits until exactly these addresses are locked. The time only ends a test that hangs."""
    deadline = time.monotonic() + seconds
    while (held := truth.locked(guest.pid)).ranges != truth.join(ranges) or held.resident != held.span:
        assert time.monotonic() < deadline, (ranges, held)
        time.sleep(0.05)


def test_a_dimm_that_comes_is_locked() -> None:
    """With `all`, whatever the order in which backend and device come, and also where no backend was there before."""
    with Guest(memory=0, args=with_slots(64 * MIB), ramlock=["--guarantee", "all"]) as guest:
        guest.settle()
        machine = backend_range(guest, 0, 64 * MIB)
        wait_locked(guest, machine)
        time.sleep(0.3)
        add_backend(guest, "m0", 32 * MIB)
        time.sleep(0.3)
        assert truth.vm_lck(guest.pid) == 64 * MIB  # not plugged in: no guest RAM yet
        add_dimm(guest, "d0", "m0")
        first = backend_range(guest, ABOVE, 32 * MIB)
        wait_locked(guest, machine, first)
        add_backend(guest, "m1", 32 * MIB, "memory-backend-memfd", share=True)
        add_dimm(guest, "d1", "m1")
        wait_locked(guest, machine, first, backend_range(guest, ABOVE + 32 * MIB, 32 * MIB))
        assert guest.query()["requested"] == 128 * MIB


def test_an_unplugged_dimm_is_locked_elsewhere() -> None:
    """Its bytes move to what is left; its backend, which stays, is unlocked. Then there is nothing left: short."""
    with Guest(memory=0, args=with_slots(64 * MIB)) as guest, guest.shim() as shim:
        guest.settle()
        for slot in range(2):
            add_backend(guest, f"m{slot}", 32 * MIB)
            add_dimm(guest, f"d{slot}", f"m{slot}")
        machine = backend_range(guest, 0, 64 * MIB)
        dimms = [backend_range(guest, ABOVE + slot * 32 * MIB, 32 * MIB) for slot in range(2)]
        guest.guarantee(96 * MIB, order="address")
        held = truth.locked(guest.pid)
        assert held.vm_lck == 96 * MIB
        # All but the last 32 MiB by address, wherever the host has put what: at least one DIMM is locked.
        full = next(slot for slot in range(2) if any(part.contains(dimms[slot]) for part in held.ranges))
        unplug(guest, f"d{full}", full)
        wait_locked(guest, machine, dimms[1 - full])
        shim.events.clear()
        unplug(guest, f"d{1 - full}", 1 - full)
        event = shim.wait_event("RAM_MINGUARANTEE_SHORT", timeout=60)
        assert event["data"]["reason"] == "no-ram"
        wait_locked(guest, machine)
        reply = guest.query()
        assert (reply["state"], reply["short"]["reason"], reply["foreign"]) == ("short", "no-ram", 0)
        for slot in range(2):
            guest.monitor.execute("object-del", {"id": f"m{slot}"})
        wait_locked(guest, machine)
        # Plugged in again, it is locked again.
        add_backend(guest, "m0", 32 * MIB)
        add_dimm(guest, "d0", "m0")
        wait_locked(guest, machine, backend_range(guest, ABOVE, 32 * MIB))
        shim.wait_event("RAM_MINGUARANTEE_REACHED", timeout=60)
        guest.check_unharmed()


# ---- Huge pages of hugetlbfs: always locked once there, and never in VmLck ----


def hugetlb_resident(guest: Guest) -> int:
    """Bytes of huge pages that the process has, by the kernel's word."""
    lines = Path(f"/proc/{guest.pid}/smaps").read_text().splitlines()
    fields = [line.split() for line in lines if line.startswith(("Shared_Hugetlb:", "Private_Hugetlb:"))]
    return sum(int(words[1]) * 1024 for words in fields)


@pytest.fixture
def huge_pages(root: None, setting: Setting) -> None:
    """64 free huge pages of 2 MiB; skips where the machine has none."""
    pool = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    if not pool.exists():
        absent("this kernel has no huge pages of 2 MiB")
    setting(str(pool / "nr_hugepages"), str(int((pool / "nr_hugepages").read_text()) + 64))
    if int((pool / "free_hugepages").read_text()) < 64:
        absent("there is no room for 64 huge pages of 2 MiB")


@pytest.mark.usefixtures("huge_pages")
def test_huge_pages_count_by_their_own_evidence(need: Need) -> None:
    need(MICROVM, "qemu-system-x86")
    backend = "memory-backend-memfd,id=m,size=64M,share=on,hugetlb=on,hugetlbsize=2M,prealloc=off"
    args = ["-m", "64M", "-object", backend]
    with Guest(memory=0, machine="pc,memory-backend=m", args=args) as guest:
        guest.settle()
        before = hugetlb_resident(guest)
        assert before < 64 * MIB
        reply = guest.guarantee(before + 16 * MIB)
        assert before + 16 * MIB <= reply["locked"] <= hugetlb_resident(guest)
        assert [(entry["backing"], entry["page-size"]) for entry in reply["blocks"]] == [("hugetlb", 2 * MIB)]
        assert truth.vm_lck(guest.pid) == 0
        # Armed is not there yet; what the guest has of it counts.
        guest.guarantee(0)
        reply = guest.guarantee(64 * MIB, prefault=False)
        assert (reply["armed"], reply["locked"]) == (64 * MIB, hugetlb_resident(guest))
        reply = guest.guarantee(64 * MIB, prefault=True)
        assert reply["locked"] == hugetlb_resident(guest) == 64 * MIB
        assert truth.vm_lck(guest.pid) == 0
    # Told from outside: the page size is the file system's.
    with Guest(qemu=MICROVM, accel="qtest", memory=0, machine="microvm,memory-backend=m", args=args) as guest:
        host = host_of(guest, 0)
        with guest.shim() as shim, pytest.raises(MonitorError, match=r"\[maps\] .* another backing"):
            shim.execute("set-ram-blocks", {"blocks": [block("m", host, 64 * MIB, "memfd")]})
        with guest.shim() as shim, pytest.raises(MonitorError, match=r"\[maps\] .* another page size"):
            shim.execute("set-ram-blocks", {"blocks": [block("m", host, 64 * MIB, "hugetlb")]})
        push(guest, block("m", host, 64 * MIB, "hugetlb", 2 * MIB))
        reply = guest.guarantee(32 * MIB)
        assert reply["locked"] == hugetlb_resident(guest) == 32 * MIB


# ---- What is main memory, and what is not ----


def test_other_backends_are_not_main_memory() -> None:
    """NVDIMMs, memory shared between VMs, and backends that nobody uses are never locked, whatever their names."""
    more = [
        *("-machine", "pc,nvdimm=on"),
        *("-object", "memory-backend-ram,id=x.ram,size=32M", "-device", "nvdimm,id=n,memdev=x.ram"),
        *("-object", "memory-backend-memfd,id=s,size=16M,share=on", "-device", "ivshmem-plain,memdev=s"),
        *("-object", "memory-backend-ram,id=d,size=64M", "-device", "pc-dimm,id=d0,memdev=d"),
        *("-object", "memory-backend-ram,id=unused,size=16M"),
    ]
    with Guest(memory=0, args=with_slots(64 * MIB, *more), ramlock=["--guarantee", "all"]) as guest:
        reply = guest.settle()
        assert {entry["id"]: entry["size"] for entry in reply["blocks"]} == {"pc.ram": 64 * MIB, "d": 64 * MIB}
        assert {"x.ram", "s"} <= {name.rsplit("/", 1)[-1] for name in guest.blocks()}
        assert truth.locked(guest.pid).vm_lck == reply["locked"] == 128 * MIB


# ---- virtio-mem ----

BACKENDS = ["memory-backend-ram,id=m0,size=512M", "memory-backend-memfd,id=m1,size=512M,share=on"]


def plugged(guest: Guest) -> list[int]:
    """What each device has plugged, in bytes."""
    return [
        guest.monitor.execute("qom-get", {"path": f"/machine/peripheral/v{i}", "property": "size"})
        for i in range(len(BACKENDS))
    ]


def request(guest: Guest, size: int) -> None:
    """Asks the guest to have so much of each device."""
    for i in range(len(BACKENDS)):
        value = {"path": f"/machine/peripheral/v{i}", "property": "requested-size", "value": size}
        guest.monitor.execute("qom-set", value)


def wait_vm_lck(guest: Guest, size: int, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while truth.vm_lck(guest.pid) != size:
        assert time.monotonic() < deadline, (size, truth.locked(guest.pid), plugged(guest), guest.said())
        time.sleep(0.05)


def test_virtio_mem_that_grows_and_shrinks() -> None:
    """What is plugged is locked by itself, and let go of when the guest wants to give it back or starts anew."""
    args = with_slots(256 * MIB)
    for i, backend in enumerate(BACKENDS):
        args += ["-object", backend, "-device", f"virtio-mem-pci,id=v{i},memdev=m{i},requested-size=0"]
    modules = "modules=virtio_pci,virtio_mem memhp_default_state=online_movable"
    with Guest(boot=True, memory=0, args=args, append=modules, ramlock=["--guarantee", "all"]) as guest:
        wait_vm_lck(guest, 256 * MIB)
        request(guest, 256 * MIB)
        wait_vm_lck(guest, 768 * MIB)
        assert plugged(guest) == [256 * MIB, 256 * MIB]
        reply = guest.settle()  # what is in VmLck may still be about to be filled
        for i in range(len(BACKENDS)):
            parts = [entry for entry in reply["blocks"] if entry["id"].endswith(f"/m{i}")]
            assert sum(entry["size"] for entry in parts) == 256 * MIB
        held = truth.locked(guest.pid)
        assert held.resident == held.span == 768 * MIB == reply["locked"] == reply["ram"]
        guest.agent.ask(f"touch {64 * MIB}")
        # Less is asked for than is plugged: all of it is unlocked, and what the guest keeps is locked again.
        request(guest, 128 * MIB)
        wait_vm_lck(guest, 512 * MIB)
        assert plugged(guest) == [128 * MIB, 128 * MIB]
        assert guest.agent.ask("verify") == str(64 * MIB)
        # A guest that starts anew unplugs everything first, and can.
        memory = guest.agent.ask("memory")
        guest.monitor.execute("set-action", {"reboot": "reset"})
        guest.monitor.execute("system_reset")
        assert guest.agent.answer() == "ready"
        deadline = time.monotonic() + 60
        while guest.agent.ask("memory") != memory:
            assert time.monotonic() < deadline, guest.said()
            time.sleep(0.2)
        wait_vm_lck(guest, 512 * MIB)
        assert plugged(guest) == [128 * MIB, 128 * MIB]
        guest.guarantee(0)
        assert truth.vm_lck(guest.pid) == 0
        guest.check_unharmed()
