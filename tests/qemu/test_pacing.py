"""How the steps of the lock thread follow what memory costs, and how few mappings they leave, whatever is resident."""
# SPDX-License-Identifier: GPL-2.0-or-later

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds
from tests.qemu.guest import MIB, Guest
from tests.qemu.pressure import Zram, can_swap

pytestmark = pytest.mark.usefixtures("lockable")

SIZE = 512 * MIB
PAGE = mmap.PAGESIZE
HUGE = 2 * MIB
MAPPINGS_MAX = 1500
"""What QEMU may have because of us, at most."""
SYS_PROCESS_MADVISE = 440
MADV_PAGEOUT = 21
IOV_MAX = 1024


@pytest.fixture
def guest(setting: Setting) -> Iterator[Guest]:
    """A VM on swap, whose RAM is in small pages, all of it resident and nothing locked."""
    if not can_swap():
        absent("swap in compressed RAM cannot be made here: it takes root and the module zram")
    setting("/sys/kernel/mm/transparent_hugepage/enabled", "never")
    with Zram(2 * SIZE), Guest(memory=SIZE, machine="pc,mem-merge=off") as running:
        running.guarantee(SIZE)
        running.guarantee(0)
        yield running


class Iovec(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def page_out(pid: int, ranges: Sequence[truth.Range]) -> None:
    """Has the kernel swap out these parts of a process (process_madvise(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(pid)
    try:
        for first in range(0, len(ranges), IOV_MAX):
            some = ranges[first : first + IOV_MAX]
            vector = (Iovec * len(some))(*(Iovec(r.start, r.size) for r in some))
            if libc.syscall(SYS_PROCESS_MADVISE, handle, vector, len(some), MADV_PAGEOUT, 0) < 0:
                raise OSError(ctypes.get_errno(), "process_madvise")
    finally:
        os.close(handle)


def bytes_per_step(guest: Guest) -> float:
    """Locks all of guest RAM; how much of it in one system call."""
    before = int(guest.query()["step-times"]["count"])
    return SIZE / (int(guest.guarantee(SIZE)["step-times"]["count"]) - before)


def swapped(guest: Guest) -> int:
    return int(truth.status(guest.pid, "VmSwap").split()[0]) * 1024


def n_mappings(pid: int) -> int:
    return Path(f"/proc/{pid}/maps").read_text().count("\n")


def test_steps_are_as_long_as_memory_is_quick(guest: Guest) -> None:
    """What is in swap takes many times as long as what is resident, so as many times less is taken at once."""
    resident = bytes_per_step(guest)
    guest.guarantee(0)
    page_out(guest.pid, [guest.ram()])
    assert swapped(guest) > SIZE / 2
    in_swap = bytes_per_step(guest)
    assert swapped(guest) < SIZE / 8
    assert in_swap < resident / 4
    guest.guarantee(0)
    # And back: what was learnt from swap is not held against memory.
    assert bytes_per_step(guest) > resident / 2
    assert_holds(guest, SIZE)


def test_a_step_takes_as_long_as_it_may(guest: Guest) -> None:
    """The hold budget, 500 us unless told otherwise, is what a system call is sized by."""
    assert guest.query()["hold-budget"] == 500
    steps = {}
    for budget in (2000, 100):
        guest.guarantee(0, **{"hold-budget": budget})
        steps[budget] = bytes_per_step(guest)
        assert guest.query()["hold-budget"] == budget
    assert steps[2000] > 4 * steps[100], steps


@pytest.mark.parametrize("piece", [PAGE, HUGE])
def test_mappings_stay_few_where_every_other_piece_is_resident(guest: Guest, piece: int) -> None:
    before = n_mappings(guest.pid)
    ram = guest.ram()
    out = [truth.Range(at, at + piece) for at in range(ram.start, ram.end, 2 * piece)]
    page_out(guest.pid, out)
    assert swapped(guest) > SIZE / 4
    most = before
    with guest.shim() as shim:
        for size in (SIZE // 8, SIZE // 2, SIZE - 32 * MIB, SIZE // 4):
            shim.execute("set_ram_minguarantee", {"size": size})
            while (reply := shim.execute("query-ram-minguarantee"))["state"] != "idle":
                assert reply["state"] != "short", reply
                most = max(most, n_mappings(guest.pid))
            most = max(most, n_mappings(guest.pid))
            assert reply["extents"] <= 256
            assert_holds(guest, size)
    assert most - before <= MAPPINGS_MAX
