"""Is it safe that vCPUs, QEMU's main thread and the lock thread touch the same memory without a mutex?

A guest with an anonymous and a file backend, in a memory cgroup that is smaller than it is and with swap, verifies and
rewrites its memory for ever. Meanwhile its guarantee and its cgroup's limit are changed at random, its balloon is blown
up and emptied, snapshots of it are saved and loaded, and its memory is read from outside. Not one word of it may ever
be wrong. The answer that this is the proof of: docs/concurrency.md.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import contextlib
import os
import random
import subprocess
import threading
import time
from pathlib import Path
from types import TracebackType

import pytest

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.guest import MIB, Guest
from tests.qemu.monitor import Monitor, MonitorError
from tests.qemu.pressure import Confined, Zram, can_confine, can_swap
from tests.qemu.silence import Background

NODE = 256 * MIB  # each of the two
PATROL = 256 * MIB
LIMITS = (256 * MIB, 304 * MIB)  # for what of guest RAM is in memory, and QEMU's own some 100 MiB
CHANGES = int(os.environ.get("RAMLOCK_STRESS_CHANGES", "80"))


class Onlooker(Background):
    """Reads guest RAM from outside in a thread, as KVM's get_user_pages and vhost do, by way of /proc/PID/mem."""

    def __init__(self, pid: int, seed: int) -> None:
        super().__init__(0.001)
        self.reads = 0
        self._ranges = [m.range for m in truth.mappings(pid) if m.range.size >= 32 * MIB and m.permissions[:2] == "rw"]
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        self._chance = random.Random(seed)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            super().__exit__(kind, error, trace)
        finally:
            os.close(self._memory)

    def once(self) -> None:
        where = self._chance.choice(self._ranges)
        at = where.start + self._chance.randrange(where.size // 4096) * 4096
        assert len(os.pread(self._memory, 4096, at)) == 4096
        self.reads += 1


class Snapshots:
    """Saves and loads snapshots in turn, in a thread, since QEMU's main thread is away meanwhile."""

    def __init__(self, path: Path) -> None:
        self.saved = self.loaded = 0
        self._monitor = Monitor(path, 120)
        self._said: list[str] = []
        self._thread: threading.Thread | None = None

    def next(self) -> None:
        """Begins the next one, unless one is on its way."""
        if self._thread is None or not self._thread.is_alive():
            self.finish()
            self._thread = threading.Thread(target=self._work, daemon=True)
            self._thread.start()

    def finish(self) -> None:
        """Waits for the one that is on its way. Fails when QEMU had anything to say."""
        if self._thread is not None:
            self._thread.join(120)
            assert not self._thread.is_alive(), "a snapshot takes too long"
        assert not any(self._said), self._said

    def _work(self) -> None:
        try:
            if self.saved == self.loaded:
                self._said.append(self._monitor.human("savevm s"))
                self.saved += 1
            else:
                self._said.append(self._monitor.human("loadvm s"))
                self.loaded += 1
        except Exception as error:  # noqa: BLE001 - told by finish()
            self._said.append(repr(error))


def guest_of(group: Confined, folder: Path) -> Guest:
    disk = folder / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True, timeout=60)
    return Guest(
        boot=True,
        memory=2 * NODE,
        accel="tcg,tb-size=32,thread=multi",
        prepare=["sh", "-c", f'echo $$ >{group.path}/cgroup.procs && exec "$@"', "sh"],
        append="modules=virtio_pci,virtio_balloon",
        timeout=120,
        args=[
            *("-smp", "2", "-device", "virtio-balloon"),
            *("-object", f"memory-backend-ram,id=a,size={NODE}", "-numa", "node,memdev=a"),
            *("-object", f"memory-backend-file,id=b,size={NODE},mem-path={{directory}}/ram,share=on"),
            *("-numa", "node,memdev=b"),
            *("-drive", f"if=none,id=disk,file={disk},format=qcow2"),
            *("-qmp", "unix:{directory}/second,server=on,wait=off"),
        ],
    )


@pytest.mark.deadline(3600)
@pytest.mark.usefixtures("lockable", "root")
def test_no_word_is_ever_wrong(tmp_path: Path) -> None:
    if not can_swap() or not can_confine():
        absent("no zram or no memory cgroup (version 1) here, so no swap pressure")
    seed = int(os.environ.get("RAMLOCK_STRESS_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    print(f"RAMLOCK_STRESS_SEED={seed}")
    chance = random.Random(seed)
    swapped = refused = held = balloons = verified = locked = 0
    blown: set[int] = set()
    with Zram(1024 * MIB), Confined(LIMITS[1]) as group, guest_of(group, tmp_path) as guest, guest.shim() as shim:
        snapshots = Snapshots(guest.directory / "second")
        guest.agent.ask(f"patrol {PATROL}")
        with Onlooker(guest.pid, seed) as onlooker:
            for change in range(CHANGES):
                size = chance.choice([0, chance.randrange(160 * MIB), chance.randrange(40) * 4 * MIB])
                wish = {
                    "size": size,
                    "order": chance.choice(["resident", "address"]),
                    "prefault": chance.random() < 0.8,
                }
                try:
                    shim.execute("set_ram_minguarantee", wish)
                except MonitorError as error:
                    # While a snapshot has the main thread, guest RAM cannot be looked at.
                    assert error.desc.startswith("[waiting]"), error
                    refused += 1
                time.sleep(chance.random() * 0.04)
                swapped = max(swapped, group.swapped())
                locked = max(locked, shim.execute("query-ram-minguarantee")["locked"])
                if change % 10 == 0:
                    with contextlib.suppress(OSError):  # too much is locked: that limit cannot be had
                        group.squeeze(chance.randrange(*LIMITS))
                if change % 15 == 5:
                    guest.monitor.execute("balloon", {"value": 2 * NODE - balloons % 3 * 16 * MIB})
                    balloons += 1
                if change % 50 == 25:
                    verified += nothing_wrong(guest)  # loading a snapshot makes the guest forget what it saw
                    snapshots.next()
                if change % 25 == 24:
                    snapshots.finish()
                    blown.add(guest.monitor.execute("query-balloon")["actual"])
                    held += settled_and_held(guest)
            snapshots.finish()
            if snapshots.saved > snapshots.loaded:
                snapshots.next()
                snapshots.finish()
        with contextlib.suppress(OSError):
            group.squeeze(LIMITS[1])
        guest.monitor.execute("balloon", {"value": 2 * NODE})
        shim.execute("set_ram_minguarantee", {"size": 64 * MIB, "prefault": True})
        deadline = time.monotonic() + 60
        while not settled_and_held(guest):  # a full cgroup makes it short for a moment
            assert time.monotonic() < deadline, guest.query()
            time.sleep(0.2)
        verified += nothing_wrong(guest, at_least=2)  # all that is in swap now comes back
        print(f"{CHANGES} changes, {refused} refused while a snapshot had the main thread, {held} found held")
        print(f"{balloons} balloon sizes, {snapshots.saved} snapshots saved, {snapshots.loaded} loaded")
        print(f"up to {locked // MIB} MiB locked, up to {swapped // MIB} MiB in swap")
        print(f"{onlooker.reads} pages read from outside")
        print(f"{verified} rounds of verifying {PATROL // MIB} MiB, no word wrong")
        assert swapped > 0, "there was no pressure"
        assert locked > 0, "nothing was ever locked"
        assert snapshots.loaded > 0
        assert len(blown) > 1, "the balloon was never seen to move"
        guest.check_unharmed()


def nothing_wrong(guest: Guest, at_least: int = 0) -> int:
    """How often the guest has verified its memory since it was last reset. Fails when a word was wrong."""
    deadline = time.monotonic() + 120
    while True:
        rounds, wrong, where = map(int, guest.agent.ask("report").split())
        assert wrong == 0, f"{wrong} words were wrong, one at {where:#x}"
        if rounds >= at_least:
            return rounds
        assert time.monotonic() < deadline, f"only {rounds} rounds of verifying"
        time.sleep(0.1)


def settled_and_held(guest: Guest) -> bool:
    """Under all that pressure nothing that is locked is in swap. Returns whether a guarantee is held."""
    reply = guest.settle()
    locked = truth.locked(guest.pid)
    assert locked.swap == 0, (locked, reply)
    assert locked.vm_lck >= reply["locked"], (locked, reply)
    return bool(reply["state"] == "idle" and reply["requested"])
