"""What the kernel lets a process lock (RLIMIT_MEMLOCK, read and raised), and the memory of this host.

See getrlimit(2), prlimit(2), mlock(2) and proc(5).
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
import resource
from pathlib import Path
from typing import NamedTuple

from ramlock import procfs
from ramlock.evictable import Evictable

CAP_IPC_LOCK = 14
SLACK = 16 << 20
"""Bytes left in a limit for what else may be locked; a limit cut to the byte would fail on the first such page."""

_VFIO = ("/dev/vfio/", "/dev/iommu", "anon_inode:[vfio", "anon_inode:kvm-vfio", "anon_inode:[iommufd")
VFIO_SLACK = 1 << 30
"""Bytes besides guest RAM that devices of the host may have pinned on account of RLIMIT_MEMLOCK."""
ASKED_LEAST = 128 << 20
"""Bytes that the host keeps, whatever was asked: with nothing left the kernel kills, and perhaps a VM."""
RESERVE_LEAST = 512 << 20
"""Bytes that the host keeps at least, unless the user says otherwise; the shim's shim/headroom.c says the same."""

_INFINITY = resource.RLIM_INFINITY


def total_memory() -> int:
    """Return the bytes of memory that this host has: nobody can lock more."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class MemoryFacts(NamedTuple):
    """The memory of this host, in bytes."""

    total: int
    available: int
    swap_free: int
    hugetlb: int
    """Set aside for huge pages."""
    evictable: Evictable
    swap_total: int = 0


def memory(proc: Path = procfs.PROC) -> MemoryFacts | None:
    """Read /proc/meminfo; None when it cannot be."""
    try:
        text = (proc / "meminfo").read_text(errors="replace")
        kib = {name: int(value) for name, value in re.findall(r"^([\w()]+):\s*(\d+) kB$", text, re.MULTILINE)}
        total, available = kib["MemTotal"] * 1024, kib["MemAvailable"] * 1024
    except (OSError, KeyError):
        return None
    swap_free, swap_total = kib.get("SwapFree", 0) * 1024, kib.get("SwapTotal", 0) * 1024
    anonymous = (kib.get("Active(anon)", 0) + kib.get("Inactive(anon)", 0)) * 1024
    # What is in swap and in memory as well counts once.
    swapped = max(swap_total - swap_free - kib.get("SwapCached", 0) * 1024, 0)
    evictable = Evictable(available + anonymous, anonymous + swapped, bool(swap_free or swapped))
    return MemoryFacts(total, available, swap_free, kib.get("Hugetlb", 0) * 1024, evictable, swap_total)


def reserve(total: int, asked: int | None) -> int:
    """Return the bytes that the host of `total` bytes keeps; `asked` is the user's word, None or 0 the default."""
    return max(asked, ASKED_LEAST) if asked else max(RESERVE_LEAST, total // 50)


def has_vfio(pid: int, proc: Path = procfs.PROC) -> bool:
    """Tell whether `pid` has a device of the host (VFIO, iommufd); False also when we may not know."""
    try:
        links = [os.readlink(entry.path) for entry in os.scandir(proc / str(pid) / "fd")]
    except OSError:
        return False
    return any(link.startswith(_VFIO) for link in links)


def raise_memlock(pid: int, need: int | None) -> int | None:
    """Raise RLIMIT_MEMLOCK of `pid` (0: ourselves) to `need` bytes, None: unlimited, or as near as we may.

    A limit is never lowered. It works from outside even where QEMU's sandbox forbids it inside.
    Returns the soft limit that is then in force, None when unlimited.
    Raises PermissionError when it may not be changed at all, ProcessLookupError when there is no such process.
    """
    soft, hard = resource.prlimit(pid, resource.RLIMIT_MEMLOCK)
    target = _INFINITY if need is None else need
    if not _reaches(soft, target):
        # The kernel compares limits as unsigned numbers, in which infinity is the largest.
        new_hard = hard if _reaches(hard, target) else target
        try:
            resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (target, new_hard))
            soft = target
        except (PermissionError, ValueError):
            # To raise the hard limit takes CAP_SYS_RESOURCE; up to it anyone may go.
            resource.prlimit(pid, resource.RLIMIT_MEMLOCK, (hard, hard))
            soft = hard
    return None if soft == _INFINITY else soft


def locks_freely_after_exec(proc: Path = procfs.PROC) -> bool:
    """Tell whether a program that we exec will have CAP_IPC_LOCK, and so no limit (capabilities(7))."""
    which = "CapBnd" if os.getuid() == 0 else "CapAmb"
    return bool(procfs.capabilities("self", which, proc) >> CAP_IPC_LOCK & 1)


def _reaches(limit: int, target: int) -> bool:
    return limit == _INFINITY or (target != _INFINITY and limit >= target)
