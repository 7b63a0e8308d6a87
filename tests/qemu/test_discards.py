"""Memory that the guest gives back: with --follow-discards the host has it, and other pages hold the guarantee."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.qemu import truth
from tests.qemu.conftest import assert_holds, ramlock
from tests.qemu.guest import MIB, SLACK, Guest

pytestmark = pytest.mark.usefixtures("lockable")

SIZE = 512 * MIB
SMALL = 192 * MIB
MIDDLE = 320 * MIB
GUARANTEE = 256 * MIB
MODULES = "modules=virtio_pci,virtio_balloon"
BALLOON = ["-device", "virtio-balloon-pci,id=balloon"]


def wait_for(condition: Callable[[], bool], what: Callable[[], object]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


def balloon(guest: Guest, size: int) -> None:
    """Sets what the guest is to keep, and waits for it."""

    def actual() -> int:
        return int(guest.monitor.execute("query-balloon")["actual"])

    guest.monitor.execute("balloon", {"value": size})
    wait_for(lambda: actual() == size, actual)


def calm(guest: Guest) -> dict[str, Any]:
    """Waits until the last discards have been looked at too, which is a little later; the shim's word then."""
    deadline = time.monotonic() + 60
    while True:
        before = guest.settle()
        time.sleep(0.1)
        reply = guest.query()
        if all(reply[key] == before[key] for key in ("state", "locked", "given-back")):
            return reply
        assert time.monotonic() < deadline, reply


def rss(guest: Guest) -> int:
    """Bytes of guest RAM that are in memory."""
    ram = guest.ram()
    return sum(entry.rss for entry in truth.mappings(guest.pid) if ram.contains(entry.range))


def inflate_and_deflate(guest: Guest) -> None:
    """From all to little and back, with a guarantee in between that is not always possible."""
    agent = guest.agent
    agent.ask(f"touch {300 * MIB}")
    agent.ask("free")
    guest.guarantee(GUARANTEE)
    assert_holds(guest, GUARANTEE)
    before = rss(guest)

    # As much as the guarantee is left: it moves.
    balloon(guest, MIDDLE)
    calm(guest)
    assert_holds(guest, GUARANTEE)
    assert rss(guest) <= MIDDLE + SLACK
    assert rss(guest) < before

    # Less than the guarantee is left: all of that is locked, nothing else, and it is said.
    balloon(guest, SMALL)
    reply = calm(guest)
    assert reply["state"] == "short", reply
    assert reply["short"]["reason"] == "discarded"
    held = truth.locked(guest.pid)
    assert rss(guest) <= SMALL + SLACK
    assert SMALL * 0.9 <= held.resident <= SMALL + SLACK, (held, reply)
    assert held.span <= SMALL + SLACK
    assert reply["locked"] <= held.resident
    assert reply["extents"] < 300

    # And back.
    agent.ask(f"touch {64 * MIB}")
    agent.ask("verify")
    balloon(guest, SIZE)
    wait_for(lambda: guest.query()["state"] == "idle", guest.query)
    calm(guest)
    assert_holds(guest, GUARANTEE)
    agent.ask("verify")
    agent.ask(f"touch {300 * MIB}")
    calm(guest)
    assert_holds(guest, GUARANTEE)
    guest.guarantee(0)
    assert truth.vm_lck(guest.pid) == 0


def test_preloaded() -> None:
    with Guest(memory=SIZE, boot=True, args=BALLOON, append=MODULES, ramlock=["--follow-discards"]) as guest:
        assert guest.query()["follow-discards"] is True
        inflate_and_deflate(guest)
        assert guest.said() == ""  # QEMU complains of a discard that fails
        guest.check_unharmed()


@pytest.mark.usefixtures("root")
def test_injected_and_taken_out_again() -> None:
    with Guest(how="plain", memory=SIZE, boot=True, args=BALLOON, append=MODULES) as guest:
        before = tables(guest)
        done = ramlock("inject", "--pid", guest.pid, "--follow-discards", "--guarantee", GUARANTEE)
        assert done.returncode == 0, done.stderr
        wait_for(lambda: tables(guest) != before, lambda: "nothing is redirected")
        now = tables(guest)
        assert [(start, end) for start, end, _ in now] == [(start, end) for start, end, _ in before]
        words = [changed(*pair) for pair in zip(before, now, strict=True)]
        assert 1 <= sum(words) <= 4  # madvise and munlockall; nothing else
        balloon(guest, MIDDLE)
        calm(guest)
        assert_holds(guest, GUARANTEE)
        assert rss(guest) <= MIDDLE + SLACK
        balloon(guest, SIZE)
        done = ramlock("eject", "--pid", guest.pid)
        assert done.returncode == 0, done.stderr
        assert tables(guest) == before
        balloon(guest, MIDDLE)
        assert rss(guest) <= MIDDLE + SLACK
        assert guest.said() == ""
        guest.check_unharmed()


def tables(guest: Guest) -> list[tuple[int, int, bytes]]:
    """The read-only data of QEMU's program, where the addresses are through which it calls libraries (RELRO)."""
    program = str(Path(f"/proc/{guest.pid}/exe").resolve())
    found = []
    with Path(f"/proc/{guest.pid}/mem").open("rb", buffering=0) as memory:
        for entry in truth.mappings(guest.pid):
            if entry.path == program and entry.permissions.startswith("r--"):
                memory.seek(entry.range.start)
                found.append((entry.range.start, entry.range.end, memory.read(entry.range.size)))
    assert found
    return found


def changed(before: tuple[int, int, bytes], now: tuple[int, int, bytes]) -> int:
    """How many words differ."""
    return sum(before[2][at : at + 8] != now[2][at : at + 8] for at in range(0, len(before[2]), 8))


def test_without_following_it_is_lost_on_the_host() -> None:
    """The other way: what is locked stays with the guest, and QEMU says so."""
    with Guest(memory=SIZE, boot=True, args=BALLOON, append=MODULES) as guest:
        guest.guarantee(GUARANTEE)
        balloon(guest, SMALL)
        assert_holds(guest, GUARANTEE)
        assert "Failed to discard" in guest.said()
        guest.check_unharmed()
