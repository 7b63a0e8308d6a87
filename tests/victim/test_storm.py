"""Injections into a QEMU whose other threads keep libc's and the loader's locks as busy as they can."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import time

import pytest

from ramlock import inject
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import NeverParked
from tests.qemu.guest import MIB, SHIM, Guest
from tests.victim.conftest import compile_c, connect, thread_names

# `make stress` asks for a thousand.
INJECTIONS = int(os.environ.get("RAMLOCK_STRESS_INJECTIONS", "30"))
PER_VM = 100
UP = 20.0


def inject_and_eject(guest: Guest) -> bool:
    """One round; False when it was refused cleanly."""
    path = guest.directory / "shim"
    config = b"RAMLOCK_OWNER_UID=%d\nRAMLOCK_SOCKET=%s\n" % (os.geteuid(), os.fsencode(path))
    try:
        inject.inject(guest.pid, SHIM, os.fsencode(SHIM), config, timeout=2.0)
    except NeverParked:
        return False
    with connect(path, UP) as sock:
        client = Client(sock, str(path))
        client.greet(Deadline(UP))
        assert client.execute("query-ramlock", deadline=Deadline(UP))["entry"] == "injected"
        client.execute("ramlock-eject", deadline=Deadline(UP))
    end = time.monotonic() + UP
    while path.exists() or "ramlock-ctl" in thread_names(guest.pid):
        assert time.monotonic() < end, "the shim does not leave"
        time.sleep(0.002)
    return True


@pytest.mark.deadline(60 + 4 * INJECTIONS)
def test_storm() -> None:
    done = refused = 0
    storm = compile_c("storm.c", "storm.so", "-shared", "-fPIC")
    while done + refused < INJECTIONS:
        with Guest(how="plain", memory=128 * MIB, env={"LD_PRELOAD": str(storm)}) as guest:
            time.sleep(1.5)  # the storm begins after a second
            for _ in range(min(PER_VM, INJECTIONS - done - refused)):
                assert guest.monitor.execute("query-status")["status"] == "running"
                if inject_and_eject(guest):
                    done += 1
                else:
                    refused += 1
                assert guest.monitor.execute("query-status")["status"] == "running"
    print(f"{done} of {INJECTIONS} injected, {refused} refused")
    assert done >= 0.95 * INJECTIONS
