"""All ways to start a QEMU with ramlock: daemons, sandboxes, other users, odd machines, the environment alone."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Need
from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds, assert_refused, ramlock
from tests.qemu.guest import GIB, MIB, QEMU, Guest, How

pytestmark = pytest.mark.usefixtures("lockable")

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
NOBODY = 65534
MICROVM = "/usr/bin/qemu-system-x86_64-microvm"


def check_set(guest: Guest) -> None:
    """Up and down again by the command, judged by the kernel."""
    for size in (192 * MIB, 48 * MIB):
        result = ramlock("set", size, "--pid", guest.pid)
        assert result.returncode == 0, result.stderr
        assert_holds(guest, size)
    guest.check_unharmed()


def test_run_execs_qemu() -> None:
    """The process that was started is QEMU itself: same pid, same name, no parent left in between."""
    with Guest() as guest:
        assert Path(f"/proc/{guest.pid}/exe").resolve().name == QEMU
        check_set(guest)


def test_guarantee_from_the_start() -> None:
    with Guest(ramlock=["--guarantee", "256M"]) as guest:
        guest.settle()
        assert_holds(guest, 256 * MIB)


def test_environment_alone() -> None:
    with Guest(how="env", env={"RAMLOCK_GUARANTEE": "256M"}) as guest:
        guest.settle()
        assert_holds(guest, 256 * MIB)
        check_set(guest)


@pytest.mark.parametrize("how", ["run", "env"])
def test_socket_elsewhere(how: How, tmp_path: Path) -> None:
    place = str(tmp_path / "here.sock")
    options = ["--socket", place] if how == "run" else []
    env = {"RAMLOCK_SOCKET": place} if how == "env" else {}
    with Guest(how=how, ramlock=options, env=env) as guest:
        result = ramlock("set", "96M", "--socket", place)
        assert result.returncode == 0, result.stderr
        assert_holds(guest, 96 * MIB)
        assert (os.stat(place).st_mode & 0o777) == 0o600
        # Found by pid as well, wherever it is.
        assert json.loads(ramlock("status", "--pid", guest.pid, "--json").stdout)["requested"] == 96 * MIB


def test_a_guarantee_that_cannot_be_understood() -> None:
    """The VM starts all the same, and whoever asks learns why it has none, until one is set."""
    with Guest(how="env", env={"RAMLOCK_GUARANTEE": "64MB"}) as guest:
        reply = guest.settle()
        assert (reply["requested"], truth.vm_lck(guest.pid)) == (0, 0)
        assert "RAMLOCK_GUARANTEE: '64MB' has an unknown unit" in reply["launch-error"]
        assert "'64MB'" in ramlock("status", "--pid", guest.pid).stdout
        check_set(guest)
        assert "launch-error" not in guest.query()


@pytest.mark.parametrize("how", ["run", "env"])
def test_daemonize(how: How) -> None:
    with Guest(how=how, args=["-daemonize"], env={"RAMLOCK_GUARANTEE": "64M"} if how == "env" else {}) as guest:
        assert guest.wait() == 0  # the process that was started has ended, QEMU goes on
        check_set(guest)


def test_sandbox() -> None:
    with Guest(args=["-sandbox", SANDBOX]) as guest:
        check_set(guest)


def test_booted_in_a_sandbox_with_four_cpus() -> None:
    with Guest(boot=True, args=["-sandbox", SANDBOX, "-smp", "4"]) as guest:
        assert guest.agent.ask("cpus") == "4"
        guest.agent.ask(f"touch {128 * MIB}")
        check_set(guest)
        guest.agent.ask("verify")


@pytest.mark.usefixtures("root")
def test_runas() -> None:
    with Guest(args=["-runas", "nobody"]) as guest:
        assert truth.status(guest.pid, "Uid").split()[1] == str(NOBODY)
        guest.settle()
        # Root may connect, and root's right to lock is gone with root: the limit counts, however high it could be set.
        if truth.memlock_limit(guest.pid) < 256 * MIB:
            result = ramlock("set", "192M", "--pid", guest.pid)
            if result.returncode != 0:  # root could raise the limit from outside
                assert_refused(result, 4)
        result = ramlock("set", "4M", "--pid", guest.pid)
        assert result.returncode == 0, result.stderr
        assert_holds(guest, 4 * MIB)
        guest.check_unharmed()


@pytest.mark.usefixtures("root")
def test_chroot() -> None:
    """The socket is where it always is, as the one who launched QEMU sees it."""
    with Guest(args=["-chroot", "{directory}"]) as guest:
        assert os.readlink(f"/proc/{guest.pid}/root") == str(guest.directory)
        check_set(guest)


def test_nothing_to_lock_without_a_machine() -> None:
    with Guest(machine="none", memory=0, args=["-S"]) as guest:
        result = ramlock("set", "64M", "--pid", guest.pid, timeout=60)
        assert_refused(result, 1, 4, 5)
        assert truth.vm_lck(guest.pid) == 0
        assert guest.monitor.execute("query-status")["status"]


def test_a_qemu_without_symbols(need: Need) -> None:
    """The first `set` or `status` tells the shim where guest RAM is; a guarantee of the launch is held from then on."""
    need(MICROVM, "qemu-system-x86")
    for verb in (["status"], ["set", "64M"]):
        with Guest(
            qemu=MICROVM, machine="microvm", accel="qtest", memory=256 * MIB, ramlock=["--guarantee", "64M"]
        ) as guest:
            reply = guest.query()
            assert (reply["state"], reply["waiting"]["reason"]) == ("waiting", "no-symbols")
            assert truth.vm_lck(guest.pid) == 0
            assert ramlock(*verb, "--pid", guest.pid, timeout=60).returncode == 0
            guest.settle()
            assert_holds(guest, 64 * MIB)
            assert guest.monitor.execute("query-status")["status"]


def test_before_the_machine_is_configured() -> None:
    """With -preconfig there is no RAM yet: wait, and then hold what was asked for."""
    with Guest(ramlock=["--guarantee", "64M"], args=["-preconfig"]) as guest:
        assert guest.query()["state"] == "waiting"
        guest.monitor.execute("x-exit-preconfig")
        guest.settle()
        assert_holds(guest, 64 * MIB)


BACKENDS = {
    "memfd": "memory-backend-memfd,id=m,size=1G",
    "file": "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/{name},share=on,discard-data=on",
    "private-file": "memory-backend-file,id=m,size=1G,mem-path=/dev/shm/{name},share=off",
    "ram": "memory-backend-ram,id=m,size=1G",
}


@pytest.mark.parametrize("kind", BACKENDS)
def test_backends(kind: str, need: Need) -> None:
    need("/dev/shm")
    name = f"ramlock-test-{os.getpid()}"
    backend = BACKENDS[kind].format(name=name)
    try:
        with Guest(machine="pc,memory-backend=m", args=["-object", backend]) as guest:
            check_set(guest)
            (block,) = guest.query()["blocks"]
            assert block["id"] == "m"
            assert block["backing"] == {"memfd": "memfd", "ram": "anonymous"}.get(kind, block["backing"])
    finally:
        Path(f"/dev/shm/{name}").unlink(missing_ok=True)


@pytest.mark.usefixtures("root")
def test_hugetlb_is_always_locked(setting: Setting) -> None:
    """Huge pages of a pool are never swapped; the kernel does not count them as locked."""
    pool = "/proc/sys/vm/nr_hugepages"
    setting(pool, "128")
    if int(Path(pool).read_text()) < 128:
        pytest.skip("the kernel has no 128 huge pages together now")
    backend = "memory-backend-memfd,id=m,size=256M,hugetlb=on,hugetlbsize=2M"
    with Guest(machine="pc,memory-backend=m", memory=256 * MIB, args=["-object", backend]) as guest:
        reply = guest.guarantee(128 * MIB)
        assert reply["state"] == "idle"
        assert 128 * MIB <= reply["locked"] <= 256 * MIB
        (block,) = reply["blocks"]
        assert (block["backing"], block["page-size"]) == ("hugetlb", 2 * MIB)
        guest.check_unharmed()


def test_two_numa_nodes() -> None:
    """Guest RAM of several blocks counts as one amount."""
    args = [
        *("-object", "memory-backend-ram,id=m0,size=512M", "-object", "memory-backend-ram,id=m1,size=512M"),
        *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1", "-smp", "2"),
    ]
    with Guest(args=args) as guest:
        assert {block["id"] for block in guest.query()["blocks"]} == {"m0", "m1"}
        reply = guest.guarantee(768 * MIB)
        held = truth.locked(guest.pid)
        assert reply["ram"] == GIB
        assert 768 * MIB <= held.resident <= 772 * MIB
        assert 768 * MIB <= held.vm_lck <= 772 * MIB


def test_mem_lock_on_is_foreign() -> None:
    """QEMU's own locks are told and never released."""
    with Guest(how="env", args=["-overcommit", "mem-lock=on"], memory=256 * MIB) as guest:
        ram = guest.ram()
        # Other memory of QEMU comes and goes; guest RAM stays locked throughout.
        assert any(part.contains(ram) for part in truth.locked(guest.pid).ranges)
        guest.guarantee(64 * MIB)
        assert guest.query()["foreign"] > 0
        guest.guarantee(0)
        held = truth.locked(guest.pid)
        assert any(part.contains(ram) for part in held.ranges)
