"""KVM's own account of a VM, where there is one: exits, page faults, what MMU notifiers made it drop."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.qemu.guest import MIB, Guest, GuestError

STATISTICS = Path("/sys/kernel/debug/kvm")
TRACING = Path("/sys/kernel/tracing")
# What KVM is told when pages of the host's go away, or are asked for their age.
NOTIFIERS = ("kvm_unmap_hva_range", "kvm_age_hva", "kvm_test_age_hva")
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


@contextmanager
def notifiers() -> Iterator[None]:
    """Has the kernel count MMU notifiers, of all VMs of this host, as far as it can; counters() tells them."""
    made: list[Path] = []
    try:
        for name in NOTIFIERS:
            place = TRACING / "instances" / f"ramlock-{name}"
            if (TRACING / "events/kvm" / name).exists():
                place.mkdir()
                made.append(place)
                (place / "events/kvm" / name / "enable").write_text("1")
        yield
    finally:
        for place in made:
            place.rmdir()


def _recorded(instance: Path) -> int:
    """How many events a trace instance has seen, those that its buffer has forgotten too."""
    lines = [line for file in instance.glob("per_cpu/cpu*/stats") for line in file.read_text().splitlines()]
    return sum(int(line.split()[1]) for line in lines if line.startswith(("entries:", "overrun:")))


def counters(pid: int) -> dict[str, int]:
    """The sums over a VM and its vCPUs, and MMU notifiers; empty without KVM."""
    sums = {place.name.removeprefix("ramlock-"): _recorded(place) for place in TRACING.glob("instances/ramlock-kvm_*")}
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
