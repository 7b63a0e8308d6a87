"""A program that looks at itself finds nothing changed by an injection but the shim."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import threading
import time
from pathlib import Path

import pytest

from ramlock import tracee
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import CannotInject, NeverParked, VmGone
from tests.victim.conftest import Victim

ROUNDS = 20


def eject(victim: Victim) -> None:
    with victim.connect(10) as sock:
        client = Client(sock, "the victim's shim")
        client.greet(Deadline(10))
        client.execute("ramlock-eject", deadline=Deadline(10))
    end = time.monotonic() + 10
    while victim.socket.exists() or any(name.startswith("ramlock") for name in victim.threads()):
        assert time.monotonic() < end, victim.threads()
        time.sleep(0.005)


def test_registers_are_what_they_were(victim: Victim) -> None:
    """General, vector, mask and control registers, while the thread is injected again and again in its sleep."""
    victim.tell("canary 300")  # 3 s
    for _ in range(ROUNDS):
        victim.inject()
        victim.wait_injected()
        eject(victim)
    assert victim.answer().startswith("ok")


def test_mask_and_errno_are_what_they_were(victim: Victim) -> None:
    mask = victim.ask("mask")
    victim.tell("sleep 300")
    time.sleep(0.05)
    victim.inject()
    _, result, errno = victim.answer().split()
    assert (result, errno) == ("0", "4711")
    assert victim.ask("mask") == mask


def test_a_timeout_ends_when_it_should(victim: Victim) -> None:
    """Injections do not begin it anew: five of them in 1 s would make 2 s of it otherwise."""
    victim.tell("sleep 1000")
    time.sleep(0.1)
    for _ in range(5):
        victim.inject()
        victim.wait_injected()
        eject(victim)
        time.sleep(0.1)
    took = float(victim.answer().split()[0])
    assert 1000 <= took < 1500, took


def test_each_directed_signal_arrives_once(victim: Victim) -> None:
    """Real-time signals are counted, not merged; they are sent at the main thread all the while."""
    sent = 0
    stop = threading.Event()

    def send() -> None:
        nonlocal sent
        while not stop.is_set():
            os.kill(victim.pid, signal.SIGRTMIN)
            sent += 1
            time.sleep(0.0005)

    sender = threading.Thread(target=send)
    sender.start()
    try:
        for _ in range(ROUNDS):
            try:
                victim.inject()
            except NeverParked:
                continue
            victim.wait_injected()
            eject(victim)
    finally:
        stop.set()
        sender.join()
    end = time.monotonic() + 10
    while int(victim.ask("signals")) < sent and time.monotonic() < end:
        time.sleep(0.01)
    assert int(victim.ask("signals")) == sent


def test_a_thread_that_never_parks_is_left_alone(victim: Victim) -> None:
    victim.tell("spin 3000")
    time.sleep(0.1)
    before = victim.maps()
    begun = time.monotonic()
    with pytest.raises(NeverParked):
        victim.inject(timeout=0.5)
    assert time.monotonic() - begun < 2.5
    assert victim.maps() == before
    assert victim.answer() == "ok"
    victim.inject()
    victim.wait_injected()


def test_only_the_shim_is_mapped(victim: Victim) -> None:
    """Rounds of injection and ejection leave what the first left, and that is the shim and what it allocated."""
    before = victim.maps()
    counts = []
    for _ in range(ROUNDS):
        victim.inject()
        victim.wait_injected()
        eject(victim)
        counts.append((len(victim.maps()), len(os.listdir(f"/proc/{victim.pid}/fd")), len(victim.threads())))
    assert counts[-1] == counts[0], counts
    files = {m.path for m in victim.maps()} - {m.path for m in before}
    assert all(path.endswith("/ramlock.so") for path in files if path.startswith("/")), files
    gone = {(m.start, m.path) for m in before if m.path.startswith("/")} - {(m.start, m.path) for m in victim.maps()}
    assert not gone


@pytest.mark.parametrize(("size", "fits"), [(60 << 10, True), (200 << 10, False)])
def test_the_stack_ends_at_its_limit(tmp_path: Path, size: int, fits: bool) -> None:
    """Loading the shim where the stack cannot grow would kill by SIGSEGV."""
    deep = Victim(tmp_path, ("sh", "-c", 'ulimit -Ss 256; exec "$@"', "sh"))
    try:
        deep.tell(f"deep {size}")
        time.sleep(0.2)
        if fits:
            deep.inject()
            deep.wait_injected()
        else:
            with pytest.raises(CannotInject, match="too little stack"):
                deep.inject(timeout=0.3)
        assert deep.answer() == "ok"
        deep.ask("mask")
    finally:
        deep.close()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGTSTP])
def test_signals_wait_until_it_is_done(victim: Victim, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """A controller that is stopped or ended by a signal in between would leave the thread stopped."""
    arrived: list[int] = []
    seen: list[str] = []

    def at(name: str) -> None:
        seen.append(name)
        if name == "ptrace-getregs":
            os.kill(os.getpid(), number)
            assert not arrived

    monkeypatch.setattr("ramlock.tracee.step", at)
    former = signal.signal(number, lambda n, _: arrived.append(n))
    try:
        victim.inject()
    finally:
        signal.signal(number, former)
    assert arrived == [number]
    assert "ptrace-detach-done" in seen
    victim.wait_injected()


@pytest.mark.parametrize("place", ["ptrace-getregs", "write-frame"])
def test_a_stop_by_a_signal_is_not_ours(victim: Victim, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    before = victim.maps()
    name = "ptrace-interrupt" if place == "ptrace-getregs" else place

    def at(step: str) -> None:
        if step == name:
            os.kill(victim.pid, signal.SIGSTOP)

    monkeypatch.setattr("ramlock.tracee.step", at)
    monkeypatch.setattr("ramlock.detour.step", at)
    with pytest.raises((CannotInject, NeverParked)):
        victim.inject(timeout=0.3)
    assert victim.maps() == before
    monkeypatch.undo()
    os.kill(victim.pid, signal.SIGCONT)
    victim.ask("mask")
    victim.inject()
    victim.wait_injected()


@pytest.mark.parametrize(
    "place", ["ptrace-interrupt", "ptrace-getregs", "ptrace-getregset", "write-code", "write-frame"]
)
def test_it_is_killed_meanwhile(victim: Victim, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    def at(step: str) -> None:
        if step == place:
            os.kill(victim.pid, signal.SIGKILL)
            time.sleep(0.05)

    monkeypatch.setattr("ramlock.tracee.step", at)
    monkeypatch.setattr("ramlock.detour.step", at)
    with pytest.raises(VmGone):
        victim.inject(timeout=1)


def test_who_does_not_stop_is_not_seized_again(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    seized: list[tracee.Tracee] = []

    def seize(self: tracee.Tracee) -> None:
        self._seized = True
        seized.append(self)

    monkeypatch.setattr(tracee.Tracee, "seize", seize)
    monkeypatch.setattr(tracee.Tracee, "stop", _never)
    with pytest.raises(NeverParked, match="in the kernel"):
        victim.inject(timeout=5)
    assert len(seized) == 1


def _never(self: tracee.Tracee, timeout: float) -> None:
    raise tracee.NotStopped
