"""A new guarantee takes effect while the former is still worked at, and the guest's memory stays as it was."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import random
import time

import pytest

from tests.qemu.conftest import assert_holds, ramlock
from tests.qemu.guest import GIB, MIB, SLACK, Guest

pytestmark = pytest.mark.usefixtures("lockable")


def test_lower_in_mid_flight() -> None:
    """The first goal is never reached: the second is taken up before."""
    with Guest(memory=4 * GIB) as guest, guest.shim() as shim:
        shim.execute("set_ram_minguarantee", {"size": 3 * GIB})
        deadline = time.monotonic() + 60
        while shim.execute("query-ram-minguarantee")["armed"] < 64 * MIB:
            assert time.monotonic() < deadline
        shim.execute("set_ram_minguarantee", {"size": 32 * MIB})
        locked = shim.execute("query-ram-minguarantee")["armed"]
        assert locked < 3 * GIB
        highest = 0
        while (reply := shim.execute("query-ram-minguarantee"))["state"] != "idle":
            highest = max(highest, reply["armed"])
            assert reply["eta-s"] >= 0
            assert time.monotonic() < deadline
        # What was in work when the new value came may still be done, and no more.
        assert highest <= locked + 256 * MIB
        reached = [event for event in shim.events if event["event"] == "RAM_MINGUARANTEE_REACHED"]
        assert all(event["data"]["requested"] != 3 * GIB for event in reached)
        assert_holds(guest, 32 * MIB)


def test_raise_in_mid_flight() -> None:
    with Guest(memory=2 * GIB) as guest:
        for size in (1536 * MIB, 16 * MIB, 1024 * MIB, 64 * MIB, 512 * MIB):
            result = ramlock("set", size, "--pid", guest.pid, "--no-wait")
            assert result.returncode == 0, result.stderr
        guest.settle()
        assert_holds(guest, 512 * MIB)
        guest.check_unharmed()


def test_a_thousand_retargets_end_at_the_last() -> None:
    """As fast as they can be sent, most of them while the one before is worked at."""
    chance = random.Random(0)
    with Guest(memory=512 * MIB) as guest, guest.shim() as shim:
        for _ in range(1000):
            size = chance.randrange(512 * MIB + 1)
            order = chance.choice(["resident", "address"])
            shim.execute("set_ram_minguarantee", {"size": size, "order": order, "prefault": chance.random() < 0.9})
        size = chance.randrange(256 * MIB)
        shim.execute("set_ram_minguarantee", {"size": size, "prefault": True})
        reply = guest.settle()
        assert reply["requested"] == size
        assert reply["generation"] >= 1001
        assert size <= reply["locked"] < size + 4096
        assert_holds(guest, size)
        guest.check_unharmed()


def test_a_waiting_command_is_told_that_another_value_came() -> None:
    with Guest(memory=4 * GIB) as guest:
        guest.guarantee(8 * MIB)
        with guest.shim() as shim:
            shim.execute("set_ram_minguarantee", {"size": 16 * MIB})
            generation = shim.execute("query-ram-minguarantee")["generation"]
            shim.execute("set_ram_minguarantee", {"size": 16 * MIB})
            assert shim.execute("query-ram-minguarantee")["generation"] == generation + 1
        guest.settle()
        assert_holds(guest, 16 * MIB)


@pytest.mark.deadline(900)
def test_random_retargets_under_a_writing_guest() -> None:
    """A hundred of them; the guest verifies and rewrites its memory meanwhile, and nothing of it is ever wrong."""
    seed = int(os.environ.get("RAMLOCK_STRESS_SEED", "0")) or random.SystemRandom().randrange(1 << 32)
    seconds = float(os.environ.get("RAMLOCK_STRESS_SECONDS", "0"))
    print(f"RAMLOCK_STRESS_SEED={seed}")
    chance = random.Random(seed)
    with Guest(boot=True, memory=GIB, args=["-smp", "2"]) as guest, guest.shim() as shim:
        guest.agent.ask(f"touch {400 * MIB}")
        begin = time.monotonic()
        done = 0
        while done < 100 or time.monotonic() - begin < seconds:
            guest.agent.tell("churn 1")
            for _ in range(10):
                size = chance.choice([0, chance.randrange(GIB + 1), chance.randrange(64) * 16 * MIB])
                order = chance.choice(["resident", "address"])
                shim.execute("set_ram_minguarantee", {"size": size, "order": order})
                time.sleep(chance.random() * 0.2)
                done += 1
            guest.agent.answer()
            assert guest.settle()["requested"] == size
            assert_holds(guest, size)
        assert guest.agent.ask("verify") == str(400 * MIB)
        guest.check_unharmed()


def test_settling_leaves_no_slack_behind() -> None:
    """Many small changes do not add up."""
    with Guest() as guest:
        for step in range(20):
            guest.guarantee(128 * MIB + step * 4096)
        assert assert_holds(guest, 128 * MIB + 19 * 4096).vm_lck <= 128 * MIB + 19 * 4096 + SLACK
