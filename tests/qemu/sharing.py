"""Two guests that share too little memory: what each of them has to bear, as the kernel and the guest count it."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import select
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.qemu import truth
from tests.qemu.guest import Guest
from tests.qemu.pressure import Confined


@dataclass(frozen=True)
class Borne:
    """What one guest had to bear while it worked, and where its memory was then."""

    faults: int  # major ones of the whole process: pages that had to be fetched from swap
    swapped: int  # bytes of guest RAM that are in swap
    others_swapped: int  # bytes of QEMU's own memory that are in swap
    guaranteed: int  # bytes that the kernel has locked
    guaranteed_swapped: int  # of these, what is in swap
    rounds: int  # how often the guest has verified and rewritten its working set
    touches: int  # pages that a thread of the guest has touched, at most one in each millisecond
    slowest: tuple[float, ...]  # the slowest fiftieth of these touches, in seconds, slowest first

    def touch(self, rank: float) -> float:
        """Seconds that this percentage of the touches did not exceed; at least 99."""
        return self.slowest[min(int(self.touches * (1 - rank / 100)), len(self.slowest) - 1)]


def guest_in(group: Confined, name: str, memory: int) -> Guest:
    """A guest that is charged to the group; of one vCPU, so that two do not wait for processors but for memory."""
    args = ["-name", name]
    return Guest(boot=True, memory=memory, accel="tcg,tb-size=32", args=args, prepare=group.prepare)


def fill(guest: Guest, working_set: int) -> None:
    """Has the guest write its working set, and set aside the pages whose touching is timed."""
    guest.agent.ask("where")
    guest.agent.ask(f"touch {working_set}")


def work(guests: Sequence[Guest], seconds: float) -> list[Borne]:
    """All guests verify and rewrite their working sets for so long, at the same time. Raises GuestError."""
    before = {guest.pid: _major_faults(guest.pid) for guest in guests}
    borne: dict[int, Borne] = {}
    for guest in guests:
        guest.agent.ask("feel")
        guest.agent.tell(f"churn {seconds}")
    deadline = time.monotonic() + seconds + 120  # under pressure a round takes its time
    working = {guest.agent: guest for guest in guests}
    while working:
        ready, _, _ = select.select(list(working), [], [], max(0, deadline - time.monotonic()))
        if not ready:
            raise TimeoutError("a guest did not finish its round")
        for agent in ready:
            guest = working.pop(agent)
            borne[guest.pid] = _borne(guest, before[guest.pid], int(agent.answer()))
    return [borne[guest.pid] for guest in guests]


def _borne(guest: Guest, faults_before: int, rounds: int) -> Borne:
    faults = _major_faults(guest.pid) - faults_before
    _, _, touches, slowest = guest.agent.ask("felt").split()
    ram = guest.ram()
    entries = list(truth.mappings(guest.pid))
    locked = [entry for entry in entries if "lo" in entry.flags]
    swapped = sum(entry.swap for entry in entries if ram.contains(entry.range))
    return Borne(
        faults=faults,
        swapped=swapped,
        others_swapped=sum(entry.swap for entry in entries) - swapped,
        guaranteed=sum(entry.rss + entry.swap for entry in locked),
        guaranteed_swapped=sum(entry.swap for entry in locked),
        rounds=rounds,
        touches=int(touches),
        slowest=tuple(float(word) for word in slowest.split(",")),
    )


def _major_faults(pid: int) -> int:
    # The command's name stands in parentheses and may itself contain spaces.
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[9])
