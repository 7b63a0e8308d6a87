"""Give way to the VM: a low CPU priority while ramlock only looks, the usual one while QEMU waits for us.

Looking takes a few hundred milliseconds of CPU time, which on a busy host the vCPUs and QEMU's main loop would miss.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ramlock import procfs

_LESS = 10
"""Steps of niceness: about a tenth of the CPU where others want it too, so that we are slow there, but never stuck."""
_CAP_SYS_NICE = 23
_usual: int | None = None


def give_way(proc: Path = procfs.PROC) -> None:
    """Lower our priority, unless it is low already or we could not raise it again (setpriority(2), RLIMIT_NICE)."""
    global _usual
    now = os.getpriority(os.PRIO_PROCESS, 0)
    if _usual is not None or now >= _LESS or not _may_return_to(now, proc):
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, now + _LESS)
        _usual = now


@contextmanager
def hurry() -> Iterator[None]:
    """Have the usual priority for a while."""
    if _usual is None:
        yield
        return
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, _usual)
    try:
        yield
    finally:
        with suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, 0, _usual + _LESS)


def _may_return_to(niceness: int, proc: Path) -> bool:
    if procfs.capabilities(os.getpid(), "CapEff", proc) >> _CAP_SYS_NICE & 1:
        return True
    return 20 - niceness <= resource.getrlimit(resource.RLIMIT_NICE)[0]
