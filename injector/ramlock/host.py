"""What the kernel lets a process lock: RLIMIT_MEMLOCK, read and raised (getrlimit(2), prlimit(2), mlock(2))."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import resource
from pathlib import Path

from ramlock import procfs

CAP_IPC_LOCK = 14
SLACK = 16 << 20
"""Bytes left in a limit for what else may be locked; a limit cut to the byte would fail on the first such page."""

_INFINITY = resource.RLIM_INFINITY


def total_memory() -> int:
    """Return the bytes of memory that this host has: nobody can lock more."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


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
