"""What is lost of a guarantee behind the shim's back is noticed, reported and repaired, without being asked."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Need, absent
from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds
from tests.qemu.guest import MIB, ROOT, Guest, GuestError
from tests.qemu.monitor import Monitor
from tests.qemu.pressure import Zram, can_swap

pytestmark = pytest.mark.usefixtures("lockable")

SIZE = 128 * MIB
KSM = Path("/sys/kernel/mm/ksm")
LOST, REPAIRED = "RAM_MINGUARANTEE_LOST", "RAM_MINGUARANTEE_REPAIRED"
KEEP_SIZE, PUNCH_HOLE = 1, 2  # of fallocate(2)
PROCESS_MADVISE, PAGEOUT = 440, 21  # process_madvise(2) on x86-64, MADV_PAGEOUT
PERIOD = 5  # seconds between two looks of the shim


@pytest.fixture(scope="module")
def breaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something in QEMU's process that takes locks away, see breaker.c."""
    library = tmp_path_factory.mktemp("breaker") / "breaker.so"
    source = ROOT / "tests/qemu/breaker.c"
    subprocess.run(["cc", "-shared", "-fPIC", "-O2", "-pthread", "-o", str(library), str(source)], check=True)
    return library


@pytest.fixture(scope="module")
def shared(breaker: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Guest, Path]]:
    """A VM whose RAM is a shared memory file, all of it guaranteed; and the breaker's FIFO."""
    fifo = tmp_path_factory.mktemp("fifo") / "fifo"
    os.mkfifo(fifo)
    backend = f"memory-backend-memfd,id=ram0,size={SIZE // MIB}M,share=on"
    env = {"LD_PRELOAD": str(breaker), "BREAKER": str(fifo)}
    args = ["-object", backend]
    with Guest(memory=SIZE, machine="pc,memory-backend=ram0", args=args, env=env) as guest:
        guest.guarantee(SIZE)
        yield guest, fifo


def losses(shim: Monitor, name: str, wanted: dict[str, int], timeout: float = 60) -> dict[str, int]:
    """Adds up the events of one name by their cause, until those that are wanted have come."""
    seen: dict[str, int] = {}
    while any(seen.get(cause, 0) < size for cause, size in wanted.items()):
        data = shim.wait_event(name, timeout=timeout)["data"]
        seen[data["cause"]] = seen.get(data["cause"], 0) + data["bytes"]
    return seen


def punch(guest: Guest, offset: int, size: int) -> None:
    """Makes a hole in the VM's memory file, from another process than QEMU."""
    for link in Path(f"/proc/{guest.pid}/fd").iterdir():
        if os.readlink(link).startswith("/memfd:memory-backend-memfd"):
            libc = ctypes.CDLL(None, use_errno=True)
            libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
            fd = os.open(link, os.O_RDWR)
            try:
                assert libc.fallocate(fd, PUNCH_HOLE | KEEP_SIZE, offset, size) == 0, os.strerror(ctypes.get_errno())
            finally:
                os.close(fd)
            return
    raise GuestError("no memory file")


@pytest.mark.usefixtures("root")
def test_locks_and_pages_taken_away(shared: tuple[Guest, Path]) -> None:
    guest, fifo = shared
    start = guest.ram().start
    with guest.shim() as shim:
        fifo.write_text(f"munlock {start + 64 * MIB} {16 * MIB}\n")
        punch(guest, 32 * MIB, 8 * MIB)
        wanted = {"unlocked": 16 * MIB, "discarded": 8 * MIB}
        assert losses(shim, LOST, wanted) == wanted
        assert losses(shim, REPAIRED, wanted) == wanted
        reply = shim.execute("query-ram-minguarantee")
    assert reply["lost"] == reply["repaired"] == 24 * MIB
    assert_holds(guest, SIZE)
    guest.check_unharmed()


@pytest.mark.usefixtures("root")
def test_a_query_never_tells_the_old_figure(shared: tuple[Guest, Path]) -> None:
    guest, fifo = shared
    start = guest.ram().start
    with guest.shim() as shim:
        before = shim.execute("query-ram-minguarantee")
        fifo.write_text(f"munlock {start + 8 * MIB} {4 * MIB}\n")
        deadline = time.monotonic() + 30
        while truth.vm_lck(guest.pid) == SIZE and shim.execute("query-ram-minguarantee")["lost"] == before["lost"]:
            assert time.monotonic() < deadline
        reply = shim.execute("query-ram-minguarantee")
    assert reply["lost"] == before["lost"] + 4 * MIB, reply
    guest.settle()
    assert_holds(guest, SIZE)


def test_a_held_guarantee_is_looked_at_seldom(shared: tuple[Guest, Path]) -> None:
    guest, _ = shared
    guest.settle()
    tasks = {name: task for name, task in truth.threads(guest.pid).items() if name.startswith("ramlock-")}
    time.sleep(1)  # the session just closed is still to be cleared away
    began = time.monotonic()
    before = {name: truth.switches(guest.pid, task) for name, task in tasks.items()}
    time.sleep(2 * PERIOD)
    after = {name: truth.switches(guest.pid, task) for name, task in tasks.items()}
    most = (time.monotonic() - began) / PERIOD + 1
    assert after["ramlock-ctl"] == before["ramlock-ctl"]
    assert 1 <= after["ramlock-lock"] - before["ramlock-lock"] <= most


def test_the_target_of_a_postcopy_migration() -> None:
    """QEMU itself takes all locks away then, and nothing may be locked again until that is over."""
    with Guest(memory=SIZE, args=["-incoming", "defer"]) as guest, guest.shim() as shim:
        guest.guarantee(SIZE)
        postcopy(guest, True)
        assert truth.vm_lck(guest.pid) == 0
        assert losses(shim, LOST, {"unlocked": SIZE}) == {"unlocked": SIZE}
        assert shim.wait_event("RAM_MINGUARANTEE_SHORT", timeout=60)["data"]["reason"] == "migration"
        time.sleep(1.5)  # it does not try all the same
        assert truth.vm_lck(guest.pid) == 0
        postcopy(guest, False)
        assert losses(shim, REPAIRED, {"unlocked": SIZE}) == {"unlocked": SIZE}
        assert truth.vm_lck(guest.pid) == SIZE


def postcopy(guest: Guest, state: bool) -> None:
    capability = {"capability": "postcopy-ram", "state": state}
    try:
        guest.monitor.execute("migrate-set-capabilities", {"capabilities": [capability]})
    except Exception as error:
        if state:
            absent(f"this machine cannot be the target of a postcopy migration: {error}")
        raise


@pytest.mark.usefixtures("root")
def test_locked_pages_are_not_merged(setting: Setting, need: Need) -> None:
    need(str(KSM), "a kernel with KSM")
    setting(str(KSM / "run"), "0")
    with Guest(memory=SIZE) as guest, guest.shim() as shim:
        guest.guarantee(SIZE // 2)
        setting(str(KSM / "pages_to_scan"), "20000")
        setting(str(KSM / "sleep_millisecs"), "1")
        setting(str(KSM / "run"), "1")
        # KSM takes its time on a busy machine, and looks may see it in the midst of its work.
        assert set(losses(shim, LOST, {"merged": 1}, timeout=200)) == {"merged"}
        wait_for(lambda: not merging(guest, "lo"))
        wait_for(lambda: (reply := guest.settle())["repaired"] == reply["lost"])
        assert set(losses(shim, REPAIRED, {"merged": guest.query()["lost"]})) == {"merged"}
        held = assert_holds(guest, SIZE // 2)
        time.sleep(1)  # many rounds of KSM
        assert truth.locked(guest.pid).resident == held.resident
        assert private(guest) == held.resident
        shim.execute("set_ram_minguarantee", {"size": SIZE // 4})
        guest.settle()
        assert not merging(guest, "lo")
        guest.guarantee(0)
        assert merging(guest, "mg") == SIZE  # as before
        guest.check_unharmed()


@pytest.mark.usefixtures("root")
def test_swapped_pages_under_an_on_fault_lock() -> None:
    """They count only when they are in memory again: when the guest touches them, or when that is asked for."""
    if not can_swap():
        absent("no zram here, so no swap")
    backend = f"memory-backend-ram,id=ram0,size={SIZE // MIB}M,merge=off,prealloc=on"
    with (
        Zram(2 * SIZE),
        Guest(memory=SIZE, machine="pc,memory-backend=ram0", args=["-object", backend]) as guest,
        guest.shim() as shim,
    ):
        wait_for(lambda: swap_out(guest) >= SIZE // 2)
        shim.execute("set_ram_minguarantee", {"size": SIZE, "prefault": False})
        reply = guest.settle()
        held = truth.locked(guest.pid)
        assert held.swap >= SIZE // 4, held
        assert reply["armed"] == held.vm_lck == SIZE
        assert reply["locked"] <= held.resident
        with Path(f"/proc/{guest.pid}/mem").open("rb", buffering=0) as memory:  # as a touch of the guest's
            memory.seek(guest.ram().start)
            memory.read(SIZE // 2)
        assert guest.query()["locked"] > reply["locked"]
        shim.execute("set_ram_minguarantee", {"size": SIZE, "prefault": True})
        guest.settle()
        assert_holds(guest, SIZE)
        guest.check_unharmed()


def swap_out(guest: Guest) -> int:
    """Has the kernel swap out guest RAM, and returns how many bytes of it are in swap."""
    ram, libc = guest.ram(), ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(guest.pid)
    try:
        part = (ctypes.c_uint64 * 2)(ram.start, ram.size)
        libc.syscall(PROCESS_MADVISE, handle, ctypes.byref(part), ctypes.c_size_t(1), PAGEOUT, 0)
    finally:
        os.close(handle)
    return sum(entry.swap for entry in truth.mappings(guest.pid) if ram.contains(entry.range))


def wait_for(condition: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def merging(guest: Guest, flag: str) -> int:
    """Bytes of guest RAM that the kernel may merge, in mappings that also have a flag."""
    ram = guest.ram()
    return sum(
        entry.range.size
        for entry in truth.mappings(guest.pid)
        if ram.contains(entry.range) and {"mg", flag} <= entry.flags
    )


def private(guest: Guest) -> int:
    """Bytes of locked memory that are this process's own, not shared with any other page."""
    total, inside = 0, 0
    for line in Path(f"/proc/{guest.pid}/smaps").read_text().splitlines():
        if line.startswith(("Private_Clean:", "Private_Dirty:")):
            inside += int(line.split()[1]) * 1024
        elif line.startswith("VmFlags:"):
            total += inside if "lo" in line.split() else 0
            inside = 0
    return total
