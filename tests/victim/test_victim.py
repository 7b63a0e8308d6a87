"""A program that looks at itself finds nothing changed by an injection but the shim."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import NeverParked
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
