#!/usr/bin/env python3
"""How long is QEMU silent while 1 GiB is locked? (`make bench`): ramlock against QEMU's own ways, and against idleness.

Each round measures every way once, one after another, so that whatever else the machine does hits all of them; the
table shows medians over the rounds and the ratio to idle. Absolute times are those of this machine; with transparent
huge pages for all they are many times shorter than without.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import reporting
from rich.console import Console
from rich.table import Table
from tests.qemu import truth
from tests.qemu.guest import GIB, Guest
from tests.qemu.monitor import Monitor
from tests.qemu.silence import Silence

ROUNDS = 10


@dataclass(frozen=True)
class Result:
    """One measurement: the longest silence of QEMU's monitor, and how long the whole work took, in seconds."""

    silence: float
    took: float


def idle(seconds: float) -> Result:
    """Nothing is done: the noise of this machine."""
    with Guest(how="plain", memory=2 * GIB) as guest, Silence(guest.monitor) as silence:
        time.sleep(seconds)
    return Result(silence.longest, 0)


def ramlock() -> Result:
    """The shim locks 1 GiB of a running VM, none of it resident before."""
    with Guest(memory=2 * GIB) as guest, guest.shim(120) as shim:
        guest.settle()
        with Silence(guest.monitor) as silence:
            begin = time.monotonic()
            shim.execute("set_ram_minguarantee", {"size": GIB})
            while shim.wait_event("RAM_MINGUARANTEE_REACHED", timeout=120)["data"]["requested"] != GIB:
                pass  # that of the guarantee of nothing, which it starts with
            took = time.monotonic() - begin
        if truth.locked(guest.pid).resident < GIB:
            raise AssertionError("ramlock said that it was done, and the kernel does not")
    return Result(silence.longest, took)


def mem_lock() -> Result:
    """QEMU locks all of 1 GiB at its start, once for ever: its monitor says nothing before that is done."""
    times = []
    for overcommit in ("mem-lock=on", "mem-lock=off"):
        begin = time.monotonic()
        with Guest(how="plain", memory=GIB, args=["-overcommit", overcommit]):
            times.append(time.monotonic() - begin)
    took = max(times[0] - times[1], 0)
    return Result(took, took)


def prealloc() -> Result:
    """QEMU populates 1 GiB of a running VM on request (qom-set prealloc), unlocked and once for ever."""
    backend = ["-object", "memory-backend-ram,id=m,size=1G", "-qmp", "unix:{directory}/second,server=on,wait=off"]
    request = {"path": "/objects/m", "property": "prealloc", "value": True}
    with (
        Guest(how="plain", machine="pc,memory-backend=m", args=backend) as guest,
        Monitor(guest.directory / "second") as second,
        Silence(guest.monitor) as silence,
    ):
        begin = time.monotonic()
        second.execute("qom-set", request, timeout=120)
        took = time.monotonic() - begin
        time.sleep(0.1)  # the question that had to wait is answered now
    return Result(silence.longest, took)


RAMLOCK = "ramlock set 1G"
WAYS: dict[str, Callable[[], Result]] = {
    RAMLOCK: ramlock,
    "mem-lock=on: start takes longer by": mem_lock,
    "qom-set prealloc, unlocked": prealloc,
}


def main() -> None:
    """Measures and prints the table."""
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    results: dict[str, list[Result]] = {name: [] for name in ("idle", *WAYS)}
    with reporting.kept():
        for number in range(ROUNDS):
            for name, way in WAYS.items():
                results[name].append(way())
            results["idle"].append(idle(results[RAMLOCK][-1].took))  # the longest of as many waits
            print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
    table = Table(title=f"1 GiB, emulated VM, medians of {ROUNDS} interleaved rounds")
    for column in ("", "longest silence", "of the worst round", "times idle", "took", "GiB/s"):
        table.add_column(column, justify="left" if not column else "right")
    noise = statistics.median(result.silence for result in results["idle"])
    for name, runs in results.items():
        silence = statistics.median(result.silence for result in runs)
        took = statistics.median(result.took for result in runs)
        worst = max(result.silence for result in runs)
        work = (f"{took:.2f} s", f"{1 / took:.2f}") if took else ("", "")
        table.add_row(name, f"{silence * 1e3:.1f} ms", f"{worst * 1e3:.1f} ms", f"{silence / noise:.1f}", *work)
    console.print(table)


if __name__ == "__main__":
    main()
