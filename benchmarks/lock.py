#!/usr/bin/env python3
"""Locks the memory of a running VM in the usual ways and in ramlock's, and measures who has to wait (`make bench`).

Each round does every way once, in one VM, so that whatever else the machine does hits all of them. Results go to
build/bench, one file for each kind of memory; report.py makes the page and the plots of them.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kvm
import reporting
from bench import PAUSE, Measured, Vm, Watch, measured_of
from tests.qemu.guest import GIB, ROOT, SHIM
from tests.qemu.pressure import Zram

RESULTS = ROOT / "build/bench"
QUICK = RESULTS / "quick"  # what a quick look found is nothing to publish
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
# Name: (transparent huge pages, state of the DIMM, part of the size)
KINDS = {
    "cold 4K": ("never", "cold", 1.0),
    "cold THP": ("always", "cold", 1.0),
    "resident": ("never", "resident", 1.0),
    "swapped": ("never", "swapped", 0.25),
}
ALONE = 2.0  # seconds that each way is watched for in a round, with a processor to spare
Work = Callable[[], tuple[float, float]]


class Rounds:
    """Measures all ways in one VM, again and again."""

    def __init__(self, vm: Vm, state: str) -> None:
        self.vm = vm
        self.state = state
        self.measured: dict[str, list[Measured]] = {}
        self.events: dict[str, list[dict[str, int]]] = {}
        self.whole = vm.dimm() if state == "resident" else vm.whole()
        self.asked: int | str = vm.size if state == "resident" else "all"
        self.threads = "threads" in vm.shim.execute("query-ram-minguarantee")
        self._like = (1.0, 1.0)  # what the last ramlock took

    def measure(self, name: str, work: Work, *, inside: bool = True, prepare: bool = True) -> Measured:
        """Does something while everybody is watched."""
        if prepare:
            self.vm.make(self.state)
        rss, unserved, before = self.vm.rss(), self.vm.unserved(), kvm.counters(self.vm.pid)
        with Watch(self.vm, inside) as watch:
            wall, cpu = work()
        measured = Measured(wall, cpu, watch.waits, self.vm.rss() - rss, self.vm.unserved() - unserved)
        self.measured.setdefault(name, []).append(measured)
        self.events.setdefault(name, []).append(kvm.since(before, kvm.counters(self.vm.pid)))
        return measured

    def spin(self) -> tuple[float, float]:
        """Burns as much of a processor, for as long, as the last ramlock took."""
        wall, cpu = self._like
        (burnt,) = self.vm.helper.ask(f"spin {wall} {min(cpu / wall, 1.0)}")
        return wall, float(burnt)

    def wait(self, seconds: float | None = None) -> tuple[float, float]:
        """Nothing, for as long as the last ramlock took."""
        seconds = self._like[0] if seconds is None else seconds
        time.sleep(seconds)
        return seconds, 0.0

    def prealloc(self) -> tuple[float, float]:
        """QEMU populates as much in a new backend, by two threads of its own; nothing is locked."""
        backend = {"qom-type": "memory-backend-ram", "id": "rival", "size": self.vm.size, "share": False}
        begin = time.monotonic()
        self.vm.second.execute("object-add", {**backend, "prealloc": True, "prealloc-threads": 2}, timeout=300)
        took = time.monotonic() - begin
        full = self.vm.rss()
        self.vm.second.execute("object-del", {"id": "rival"}, timeout=300)
        while self.vm.rss() > full - self.vm.size // 2 and time.monotonic() < begin + 300:
            time.sleep(0.1)  # QEMU frees it later: twice the memory may be more than there is
        return took, 0.0

    def round(self) -> None:
        vm, whole = self.vm, self.whole
        ours = self.measure("ramlock", lambda: vm.guarantee(self.asked))
        self._like = (ours.wall, ours.cpu)
        lowered = self.measure("ramlock, lowering", lambda: vm.guarantee(0), prepare=False)
        self.measure("idle, lowering", lambda: self.wait(lowered.wall), prepare=False)
        self.measure("own thread", lambda: vm.do("lock", whole))
        self.measure("own thread, lowering", lambda: vm.do("unlock", whole), prepare=False)
        self.measure("spinner", self.spin)
        self.measure("main thread", lambda: vm.do("lock", whole, "main"))
        self.measure("idle", self.wait)
        # The guest's clock has a thousand gaps a second: one in a thousand is a matter of seconds.
        for _ in range(int(ALONE / (self.alone() + 2 * PAUSE))):
            self.alone()
        if self.state == "cold":
            # The guest is idle here: QEMU's preallocation stops it, and would have its processor besides.
            if self.threads:
                vm.make("cold")
                rss = vm.rss()
                took = vm.guarantee(self.asked, threads=2)
                self.note("idle guest: ramlock, 2 threads", took, vm.rss() - rss)
                vm.guarantee(0, threads=1)
            vm.make("cold")
            self.note("idle guest: prealloc, 2 threads", self.prealloc(), vm.size)

    def alone(self) -> float:
        """With a processor to spare: nobody asks or maps, only the guest looks at its clock. Returns ramlock's time.

        But for the shim's news of its progress, ten times a second, which this process is told.
        """
        vm, whole = self.vm, self.whole
        ours = self.measure("ramlock alone", lambda: vm.guarantee(self.asked), inside=False)
        self._like = (ours.wall, ours.cpu)
        self.measure("ramlock alone, lowering", lambda: vm.guarantee(0), inside=False, prepare=False)
        self.measure("own thread alone", lambda: vm.do("lock", whole), inside=False)
        self.measure("own thread alone, lowering", lambda: vm.do("unlock", whole), inside=False, prepare=False)
        self.measure("spinner alone", self.spin, inside=False)
        self.measure("idle alone", self.wait, inside=False)
        return ours.wall

    def note(self, name: str, took: tuple[float, float], grown: int) -> None:
        """Something that nobody watched, and how many bytes it allocated."""
        self.measured.setdefault(name, []).append(Measured(*took, waits={}, grown=grown))


def path_of(folder: Path, kind: str, size: int) -> Path:
    """Where its results are."""
    return folder / f"{kind.replace(' ', '-')}-{size // GIB}.json"


def run(folder: Path, kind: str, size: int, rounds: int, accel: str, more: bool) -> None:
    """Measures one kind of memory and writes what was found; with `more` it adds to what was found before."""
    pages, state, part = KINDS[kind]
    size = int(size * part) // GIB * GIB or GIB
    former = former_of(path_of(folder, kind, size), accel) if more else None
    with ExitStack() as stack:
        stack.enter_context(reporting.setting(THP, pages))
        if state == "swapped":
            stack.enter_context(Zram(2 * size))
        if accel == "kvm":
            stack.enter_context(kvm.notifiers())
        vm = stack.enter_context(Vm(size, accel))
        # The host's memory is itself a guest's often, and slower when it is used for the first time.
        vm.do("populate", vm.dimm())
        vm.guarantee(0)
        wakeups = [vm.wakeups(10)]
        vm.guarantee(64 << 20)
        wakeups.append(vm.wakeups(10))
        work = Rounds(vm, state)
        if former:
            work.measured = {name: [measured_of(m) for m in many] for name, many in former["measured"].items()}
            work.events = former["events"]
        for number in range(rounds):
            work.round()
            print(f"{kind}, {size // GIB} GiB: round {number + 1} of {rounds}", file=sys.stderr)
            save(folder, kind, size, accel, wakeups, work)


def conditions(accel: str) -> dict[str, str]:
    """What is measured, and on what: results of others are not comparable."""
    memory = os.sysconf("SC_PHYS_PAGES") * 4096 / GIB
    return {
        "accel": accel,
        "machine": f"{os.cpu_count()} processors, {memory:.0f} GiB, Linux {platform.release()}",
        "shim": hashlib.sha256(SHIM.read_bytes()).hexdigest(),
    }


def former_of(path: Path, accel: str) -> dict[str, Any] | None:
    """What was found before of the same shim on the same machine, if anything was."""
    if not path.exists():
        return None
    former: dict[str, Any] = json.loads(path.read_text())
    if any(former.get(name) != value for name, value in conditions(accel).items()):
        sys.exit(f"{path} is of another shim or machine.\nMeasure without --more.")
    return former


def save(folder: Path, kind: str, size: int, accel: str, wakeups: list[int], work: Rounds) -> None:
    """Writes what was found so far: an interrupted run is worth its rounds."""
    result = {
        "kind": kind,
        "size": size,
        "rounds": len(work.measured["idle"]),
        "date": time.strftime("%Y-%m-%d"),
        **conditions(accel),
        "wakeups": wakeups,
        "measured": {name: [dataclasses.asdict(m) for m in many] for name, many in work.measured.items()},
        "events": work.events,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = path_of(folder, kind, size)
    new = path.with_suffix(".new")
    new.write_text(json.dumps(result))
    new.replace(path)


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="8G", help="memory that is locked, in GiB (swapped: a quarter of it)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kind", action="append", choices=KINDS, help="of memory; all when not given")
    parser.add_argument("--more", action="store_true", help="add the rounds to those that were measured before")
    parser.add_argument("--quick", action="store_true", help="1 GiB, two rounds: to see whether it works")
    parser.add_argument("--kvm", action="store_true", help="under KVM, with its exits and MMU notifiers")
    options = parser.parse_args()
    if os.geteuid() != 0:
        sys.exit("Only root may lock so much, set huge pages and make swap.\nRun make bench as root.")
    if options.kvm and (why := kvm.unusable()):
        sys.exit(f"KVM cannot be used here: {why}\nRun make bench without KVM=1 for figures of emulation (TCG).")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))  # settings of the host are put back
    size, rounds = (GIB, 2) if options.quick else (int(options.size.rstrip("GgiB")) * GIB, options.rounds)
    folder = QUICK if options.quick else RESULTS
    with nullcontext() if options.quick else reporting.kept():
        for kind in options.kind or KINDS:
            run(folder, kind, size, rounds, "kvm" if options.kvm else "tcg", options.more)


if __name__ == "__main__":
    main()
