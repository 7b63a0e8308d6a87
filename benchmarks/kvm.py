"""KVM's own account of a VM, where there is one: exits, page faults, what MMU notifiers made it drop."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
from pathlib import Path

from tests.qemu.guest import MIB, Guest, GuestError

STATISTICS = Path("/sys/kernel/debug/kvm")
PROBE_S = 30


def unusable(accel: str = "kvm") -> str | None:
    """Why KVM cannot be used, found out in bounded time: a guest that does not come up under it is ended."""
    if accel == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not there, or not for us"
    try:
        with Guest(how="plain", boot=True, memory=256 * MIB, accel=accel, timeout=PROBE_S) as guest:
            guest.agent.ask("hello", PROBE_S)
    except (GuestError, OSError) as error:
        return f"no guest comes up within {PROBE_S} s ({str(error).splitlines()[-1][-120:]})"
    return None


def counters(pid: int) -> dict[str, int]:
    """The sums over a VM and its vCPUs; empty without KVM."""
    sums: dict[str, int] = {}
    for folder in STATISTICS.glob(f"{pid}-*") if os.access(STATISTICS, os.X_OK) else ():
        for file in folder.rglob("*"):
            if file.is_file():
                try:
                    sums[file.name] = sums.get(file.name, 0) + int(file.read_text())
                except (OSError, ValueError):
                    continue
    return sums


def since(before: dict[str, int], after: dict[str, int]) -> dict[str, int]:
    """What has been counted between."""
    return {name: value - before.get(name, 0) for name, value in after.items()}
