"""Memory that the guest gives back: with --follow-discards the host has it, and other pages hold the guarantee."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds, ramlock
from tests.qemu.guest import MIB, SLACK, Guest

pytestmark = pytest.mark.usefixtures("lockable")

FACTOR = int(os.environ.get("RAMLOCK_STRESS_BALLOON", "1"))
"""How many times as large a guest the test of the balloon has: 8 is one of 4 GiB."""
SIZE = 512 * MIB
SMALL = 192 * MIB
MIDDLE = 320 * MIB
GUARANTEE = 256 * MIB
MODULES = "modules=virtio_pci,virtio_balloon"
BALLOON = ["-device", "virtio-balloon-pci,id=balloon"]


def wait_for(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60 * FACTOR
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def balloon(guest: Guest, size: int, guarantee: int = GUARANTEE) -> None:
    """Sets what the guest is to keep, and waits for it; all the while no more than the guarantee is locked."""
    lowest = guarantee

    def actual() -> int:
        nonlocal lowest
        locked = truth.vm_lck(guest.pid)
        assert locked <= guarantee + SLACK
        lowest = min(lowest, locked)
        return int(guest.monitor.execute("query-balloon")["actual"])

    began = time.monotonic()
    guest.monitor.execute("balloon", {"value": size})
    wait_for(lambda: actual() == size, actual)
    print(f"balloon to {size // MIB} MiB: {time.monotonic() - began:.1f} s, at least {lowest // MIB} MiB locked")


def calm(guest: Guest) -> dict[str, Any]:
    """Waits until the last discards have been looked at too, which is a little later; the shim's word then."""
    deadline = time.monotonic() + 60 * FACTOR
    while True:
        before = guest.settle()
        time.sleep(0.1)
        reply = guest.query()
        if all(reply[key] == before[key] for key in ("state", "locked", "given-back")):
            return reply
        assert time.monotonic() < deadline, reply


def rss(guest: Guest) -> int:
    """Bytes of guest RAM that are in memory."""
    ram = guest.ram()
    return sum(entry.rss for entry in truth.mappings(guest.pid) if ram.contains(entry.range))


def inflate_and_deflate(guest: Guest, factor: int = 1) -> None:
    """From all to little and back, with a guarantee in between that is not always possible."""
    agent = guest.agent
    guarantee, middle = GUARANTEE * factor, MIDDLE * factor
    small = max(SMALL, guest.memory // 4)
    slack = SLACK + guest.memory // 50  # what is given back in the very step that fills its range may stay
    agent.ask(f"touch {300 * MIB * factor}")
    agent.ask("free")
    guest.guarantee(guarantee)
    assert_holds(guest, guarantee)
    before = rss(guest)

    # As much as the guarantee is left: it moves.
    balloon(guest, middle, guarantee)
    calm(guest)
    assert_holds(guest, guarantee)
    assert rss(guest) <= middle + slack
    assert rss(guest) < before

    # Less than the guarantee is left: all of that is locked, nothing else, and it is said.
    balloon(guest, small, guarantee)
    reply = calm(guest)
    assert reply["state"] == "short", reply
    assert reply["short"]["reason"] == "discarded"
    held = truth.locked(guest.pid)
    print(f"{small // MIB} MiB left: {rss(guest) // MIB} MiB in memory, {held.resident // MIB} MiB locked")
    assert rss(guest) <= small + slack
    assert small * 0.9 <= held.resident <= small + slack, (held, reply)
    assert held.span <= small + slack
    assert reply["locked"] <= held.resident
    assert reply["extents"] < 300

    # And back.
    agent.ask(f"touch {64 * MIB * factor}")
    agent.ask("verify")
    balloon(guest, guest.memory, guarantee)
    wait_for(lambda: guest.query()["state"] == "idle", guest.query)
    calm(guest)
    assert_holds(guest, guarantee)
    agent.ask("verify")
    agent.ask(f"touch {300 * MIB * factor}")
    calm(guest)
    assert_holds(guest, guarantee)
    assert guest.query()["lost"] == 0
    agent.ask("free")
    guest.guarantee(0)
    assert truth.vm_lck(guest.pid) == 0


def test_preloaded() -> None:
    size = SIZE * FACTOR
    with Guest(memory=size, boot=True, args=BALLOON, append=MODULES, ramlock=["--follow-discards"]) as guest:
        assert guest.query()["follow-discards"] is True
        inflate_and_deflate(guest, FACTOR)
        assert guest.said() == ""  # QEMU complains of a discard that fails
        guest.check_unharmed()


@pytest.mark.usefixtures("root")
def test_injected_and_taken_out_again() -> None:
    """Into a VM whose RAM is a memory file, of which QEMU discards by punching holes; following begins later."""
    args = [*BALLOON, "-object", f"memory-backend-memfd,id=ram0,size={SIZE // MIB}M,share=on"]
    with Guest(
        how="plain", memory=SIZE, boot=True, machine="pc,memory-backend=ram0", args=args, append=MODULES
    ) as guest:
        before = tables(guest)
        inject(guest)
        assert guest.query()["follow-discards"] is False
        assert tables(guest) == before
        assert "given to the host" in inject(guest, "--follow-discards", "--guarantee", GUARANTEE)
        now = tables(guest)
        assert [(start, end) for start, end, _ in now] == [(start, end) for start, end, _ in before]
        words = [changed(*pair) for pair in zip(before, now, strict=True)]
        assert 1 <= sum(words) <= 6  # madvise, fallocate and munlockall; nothing else
        inject(guest, "--follow-discards")  # once is enough
        assert tables(guest) == now
        inflate_and_deflate(guest)
        assert file_size(guest) <= SIZE
        done = ramlock("eject", "--pid", guest.pid)
        assert done.returncode == 0, done.stderr
        assert tables(guest) == before
        balloon(guest, MIDDLE)
        assert file_size(guest) <= MIDDLE + SLACK
        assert guest.said() == ""
        guest.check_unharmed()


def inject(guest: Guest, *options: object) -> str:
    done = ramlock("inject", "--pid", guest.pid, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def file_size(guest: Guest) -> int:
    """Bytes that the memory file really has."""
    for link in Path(f"/proc/{guest.pid}/fd").iterdir():
        if os.readlink(link).startswith("/memfd:memory-backend-memfd"):
            return link.stat().st_blocks * 512
    raise AssertionError("no memory file")


def tables(guest: Guest) -> list[tuple[int, int, bytes]]:
    """The read-only data of QEMU's program, where the addresses are through which it calls libraries (RELRO)."""
    program = str(Path(f"/proc/{guest.pid}/exe").resolve())
    found = []
    with Path(f"/proc/{guest.pid}/mem").open("rb", buffering=0) as memory:
        for entry in truth.mappings(guest.pid):
            if entry.path == program and entry.permissions.startswith("r--"):
                memory.seek(entry.range.start)
                found.append((entry.range.start, entry.range.end, memory.read(entry.range.size)))
    assert found
    return found


def changed(before: tuple[int, int, bytes], now: tuple[int, int, bytes]) -> int:
    """How many words differ."""
    return sum(before[2][at : at + 8] != now[2][at : at + 8] for at in range(0, len(before[2]), 8))


def test_without_following_it_is_lost_on_the_host() -> None:
    """The other way: what is locked stays with the guest, and QEMU says so."""
    with Guest(memory=SIZE, boot=True, args=BALLOON, append=MODULES) as guest:
        guest.guarantee(GUARANTEE)
        balloon(guest, SMALL)
        assert_holds(guest, GUARANTEE)
        assert "Failed to discard" in guest.said()
        guest.check_unharmed()


def test_free_pages_that_the_guest_reports() -> None:
    """They leave the guarantee for others by themselves; here the guest uses more than that."""
    args = ["-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on"]
    guarantee = 64 * MIB
    with Guest(memory=SIZE, boot=True, args=args, append=MODULES, ramlock=["--follow-discards"]) as guest:
        guest.agent.ask(f"touch {300 * MIB}")
        guest.guarantee(guarantee)
        guest.agent.ask("free")
        wait_for(lambda: rss(guest) < 200 * MIB, lambda: rss(guest))
        calm(guest)
        assert_holds(guest, guarantee)
        guest.agent.ask(f"touch {300 * MIB}")
        guest.agent.ask("verify")
        calm(guest)
        assert_holds(guest, guarantee)
        assert guest.query()["lost"] == 0
        assert guest.said() == ""
        guest.check_unharmed()


# ---- virtio-mem ----

BASE = 256 * MIB
HUGE_PAGE = 2 * MIB
BACKENDS = [
    "memory-backend-ram,id=m0,size=128M",
    "memory-backend-memfd,id=m1,size=128M,share=on",
    "memory-backend-memfd,id=m2,size=128M,share=on,hugetlb=on,hugetlbsize=2M",
]
POOL = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


def free_pages() -> int:
    return int((POOL / "free_hugepages").read_text())


def request(guest: Guest, size: int) -> None:
    """Asks the guest to have so much of each device, and waits until it has, and all of it is locked."""
    paths = [f"/machine/peripheral/v{i}" for i in range(len(BACKENDS))]
    for path in paths:
        guest.monitor.execute("qom-set", {"path": path, "property": "requested-size", "value": size})

    def plugged() -> list[int]:
        return [guest.monitor.execute("qom-get", {"path": path, "property": "size"}) for path in paths]

    wait_for(lambda: plugged() == [size] * len(paths), lambda: (plugged(), guest.said()))
    wait_all_locked(guest, size)


def wait_all_locked(guest: Guest, size: int) -> None:
    """So much of each device, and the rest of guest RAM; VmLck leaves huge pages out."""
    ram = BASE + len(BACKENDS) * size
    wait_for(lambda: guest.query()["ram"] == ram and guest.query()["state"] == "idle", guest.query)
    wait_for(lambda: truth.vm_lck(guest.pid) == ram - size, lambda: truth.locked(guest.pid))
    reply, held = guest.query(), truth.locked(guest.pid)
    assert reply["locked"] == ram
    assert "left-out" not in reply
    assert held.resident - resident_huge(guest) == ram - size


def resident_huge(guest: Guest) -> int:
    """Bytes of locked mappings that are huge pages of the pool; smaps may count them as resident, or not."""
    return sum(entry.rss for entry in truth.mappings(guest.pid) if {"lo", "ht"} <= entry.flags)


@pytest.mark.usefixtures("root")
def test_virtio_mem(tmp_path: Path, setting: Setting) -> None:
    """Memory is unplugged while it is locked, by the guest and by an older state that is loaded."""
    setting(str(POOL / "nr_hugepages"), str(int((POOL / "nr_hugepages").read_text()) + 128 * MIB // HUGE_PAGE))
    if free_pages() < 128 * MIB // HUGE_PAGE:
        absent("no huge pages are to be had")
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    args = ["-m", f"{BASE // MIB}M,slots=4,maxmem=2G", "-drive", f"if=none,id=disk,file={disk},format=qcow2"]
    for i, backend in enumerate(BACKENDS):
        args += ["-object", backend, "-device", f"virtio-mem-pci,id=v{i},memdev=m{i},requested-size=0"]
    modules = "modules=virtio_pci,virtio_mem memhp_default_state=online_movable"
    options = ["--guarantee", "all", "--follow-discards"]
    with Guest(boot=True, memory=0, args=args, append=modules, ramlock=options) as guest:
        request(guest, 128 * MIB)
        free = free_pages()
        request(guest, 32 * MIB)
        assert free_pages() - free == 96 * MIB // HUGE_PAGE  # the host has them back
        assert guest.monitor.human("savevm less") == ""
        request(guest, 128 * MIB)
        guest.agent.ask(f"touch {64 * MIB}")
        assert guest.monitor.human("loadvm less") == ""
        wait_all_locked(guest, 32 * MIB)
        assert guest.query()["lost"] == 0
        assert guest.said() == ""
        assert guest.monitor.execute("query-status")["running"] is True
