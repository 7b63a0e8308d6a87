"""Asking for more than there is: refused beforehand, or short, and never an OOM kill."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds, assert_refused, ramlock
from tests.qemu.guest import GIB, MIB, Guest
from tests.qemu.pressure import Zram, can_swap

pytestmark = pytest.mark.usefixtures("root", "lockable")

REFUSED, SHORT = 4, 5
MEMORY_V1 = Path("/sys/fs/cgroup/memory")
JOIN = 'echo $$ > "$0"/cgroup.procs && exec "$@"'


class Cgroup:
    """A memory cgroup of version 1."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def limit(self, size: int) -> None:
        """Limits memory, and memory and swap together, in the order that the kernel takes."""
        names = ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
        if size > int((self.path / names[0]).read_text()):
            names.reverse()
        for name in names:
            if (self.path / name).exists():
                (self.path / name).write_text(str(size))

    @property
    def prepare(self) -> list[str]:
        """Words that start a command in it."""
        return ["sh", "-c", JOIN, str(self.path)]

    def kills(self) -> int:
        text = (self.path / "memory.oom_control").read_text()
        return int(text.rsplit("oom_kill ", 1)[1])

    def usage(self) -> int:
        return int((self.path / "memory.usage_in_bytes").read_text())

    def wanted(self) -> int:
        """Bytes that are not locked, in memory or in swap."""
        stat = dict(line.split() for line in (self.path / "memory.stat").read_text().splitlines())
        swapped = int((self.path / "memory.memsw.usage_in_bytes").read_text()) - self.usage()
        return int(stat["total_inactive_anon"]) + int(stat["total_active_anon"]) + swapped

    def remove(self) -> None:
        deadline = time.monotonic() + 10
        while self.path.exists() and time.monotonic() < deadline:
            with suppress(OSError):
                self.path.rmdir()
                return
            time.sleep(0.02)


@pytest.fixture
def cgroup() -> Iterator[Cgroup]:
    """A memory cgroup, removed when the test has ended."""
    if not (MEMORY_V1 / "memory.limit_in_bytes").exists():
        absent("there is no memory controller of cgroup v1")
    made = Cgroup(MEMORY_V1 / f"ramlock-test-room-{os.getpid()}-{time.monotonic_ns()}")
    try:
        yield made
    finally:
        for child in made.path.iterdir():
            if child.is_dir():
                child.rmdir()
        made.remove()


def wait_until_idle(guest: Guest) -> dict[str, Any]:
    """What the shim says when it is not short any more."""
    deadline = time.monotonic() + 60
    while (held := guest.query())["state"] != "idle":
        assert time.monotonic() < deadline, held
        time.sleep(0.1)
    return held


def test_a_small_cgroup(cgroup: Cgroup) -> None:
    """More than the cgroup can take, with prefault and without, while the guest writes; then there is room."""
    cgroup.limit(448 * MIB)
    asked = 700 * MIB
    with Guest(boot=True, memory=768 * MIB, prepare=cgroup.prepare) as guest:
        guest.agent.ask(f"touch {48 * MIB}")
        guest.agent.tell("churn 3")
        before = guest.query()
        refused = ramlock("set", asked, "--pid", guest.pid)
        assert_refused(refused, REFUSED)
        assert cgroup.path.name in refused.stderr
        assert "448 MiB" in refused.stderr
        assert "beyond what is in memory already" in refused.stderr
        assert guest.query()["generation"] == before["generation"]

        for how in ("--no-prefault", "--prefault"):
            result = ramlock("set", asked, "--force", how, "--pid", guest.pid)
            assert result.returncode == SHORT, (result.stdout, result.stderr)
            assert guest.query()["short"]["reason"] == "cgroup"
            assert cgroup.usage() <= 448 * MIB - 16 * MIB
            assert cgroup.kills() == 0
        assert guest.agent.answer()  # it has written all the time
        assert guest.agent.ask("verify")
        held = guest.query()
        assert 0 < held["locked"] < asked
        assert truth.vm_lck(guest.pid) <= held["armed"] + 4 * MIB

        cgroup.limit(2 * GIB)
        wait_until_idle(guest)  # nobody asks it to try again
        assert_holds(guest, asked)
        assert cgroup.kills() == 0
        assert guest.agent.ask("verify")
        guest.check_unharmed()


# In a namespace of its own; the second also mounts the hierarchy again, and so sees its own cgroup as the root.
BLIND = 'exec unshare --cgroup "$@"'
FOOLED = (
    "exec unshare --cgroup --mount sh -c '"
    'umount /sys/fs/cgroup/memory && mount -t cgroup -o memory ramlock-test /sys/fs/cgroup/memory && exec "$@"'
    '\' sh "$@"'
)


@pytest.mark.parametrize("enter", [BLIND, FOOLED], ids=["blind", "fooled"])
def test_limits_that_a_namespace_hides(cgroup: Cgroup, enter: str) -> None:
    """What the shim cannot see the controller tells; what is told ends, and then nothing more is locked."""
    cgroup.limit(384 * MIB)
    inner = Cgroup(cgroup.path / "inner")
    with Guest(memory=512 * MIB, prepare=[*inner.prepare, "sh", "-c", enter, "sh"]) as guest:
        before = guest.settle()
        assert before["cgroups-seen"] is (enter == FOOLED)
        if enter == BLIND:
            short = guest.guarantee(64 * MIB)
            assert short["short"]["reason"] == "cgroup"
            assert short["locked"] < 32 * MIB  # what was there already takes nothing
        result = ramlock("set", 64 * MIB, "--pid", guest.pid)
        assert result.returncode == 0, result.stderr
        assert_holds(guest, 64 * MIB)
        assert_refused(ramlock("set", 480 * MIB, "--pid", guest.pid), REFUSED)
        result = ramlock("set", 480 * MIB, "--force", "--pid", guest.pid)
        assert result.returncode == SHORT, (result.stdout, result.stderr)
        held = guest.query()
        assert held["short"]["reason"] == "cgroup"
        assert 64 * MIB <= held["locked"] < 384 * MIB
        with guest.shim() as shim:
            shim.execute("set-headroom-limits", {"cgroup-left": 0, "valid-s": 1})
        time.sleep(2.5)  # it has been tried again since
        assert guest.query()["locked"] == held["locked"]
        assert cgroup.kills() == 0
        guest.check_unharmed()
    inner.remove()


def memory_total() -> int:
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def test_the_hosts_reserve_and_who_holds_what() -> None:
    with (
        Guest(memory=256 * MIB, args=["-name", "one"]) as one,
        Guest(memory=256 * MIB, args=["-name", "other"], ramlock=["--guarantee", "128M"]) as other,
    ):
        other.settle()
        assert one.settle()["host-reserve"] == max(512 * MIB, memory_total() // 50)
        # Nothing that could be allocated: what is there already may be locked still.
        reserve = memory_total() - 256 * MIB
        result = ramlock("set", 200 * MIB, "--host-reserve", reserve, "--pid", one.pid)
        assert_refused(result, REFUSED)
        rows = [line.split() for line in result.stderr.splitlines()]
        assert any(row[:2] == [str(other.pid), "other"] and row[3:5] == ["128", "MiB"] for row in rows), result.stderr
        assert any(row[:2] == [str(one.pid), "one"] and "asked:" in row for row in rows), result.stderr
        assert one.query()["requested"] == 0

        result = ramlock("set", 200 * MIB, "--host-reserve", reserve, "--force", "--pid", one.pid)
        assert result.returncode == SHORT, result.stderr
        reply = one.query()
        assert (reply["short"]["reason"], reply["host-reserve"]) == ("host-memory", reserve)
        assert reply["locked"] < 200 * MIB
        # With --timeout what does not fit now, but could, is waited for.
        reserve = memory_total() - 512 * MIB
        result = ramlock("set", 200 * MIB, "--host-reserve", reserve, "--timeout", 0.5, "--pid", one.pid)
        assert result.returncode in (REFUSED, SHORT), result.stderr
        result = ramlock("set", 200 * MIB, "--host-reserve", "default", "--pid", one.pid)
        assert result.returncode == 0, result.stderr
        assert_holds(one, 200 * MIB)


def test_memory_bound_to_a_node() -> None:
    """With policy=bind the node is asked too, and the guarantee is held."""
    backend = "memory-backend-ram,id=ram0,size=256M,host-nodes=0,policy=bind"
    with Guest(memory=256 * MIB, machine="pc,memory-backend=ram0", args=["-S", "-object", backend]) as guest:
        guest.guarantee(128 * MIB)
        assert guest.query()["locked"] == 128 * MIB
        assert truth.vm_lck(guest.pid) == 128 * MIB
        guest.monitor.execute("cont")
        guest.check_unharmed()


def test_few_mappings_are_left(setting: Setting) -> None:
    """A host that allows hardly more mappings than QEMU has: known beforehand, not by a failing system call."""
    with Guest(memory=256 * MIB) as guest:
        guest.settle()
        setting("/proc/sys/vm/max_map_count", str(len(list(truth.mappings(guest.pid))) + 8))
        short = guest.guarantee(64 * MIB)
        assert short["short"]["reason"] == "map-count", short
        assert truth.vm_lck(guest.pid) == 0
        guest.check_unharmed()


@pytest.mark.skipif(not can_swap(), reason="no zram, or not root")
def test_what_can_be_swapped_out_is_not_all_locked(cgroup: Cgroup) -> None:
    """To lock what is there allocates nothing, but a cgroup in which nothing can be swapped out any more is killed."""
    with Zram(2 * GIB), Guest(boot=True, memory=768 * MIB, prepare=cgroup.prepare) as guest:
        (cgroup.path / "memory.limit_in_bytes").write_text(str(400 * MIB))  # and as much swap as there is
        guest.agent.ask(f"touch {400 * MIB}")
        # 300 MiB are there, or in swap, but would leave 100 to what else is used, some 250.
        refused = ramlock("set", 300 * MIB, "--pid", guest.pid)
        assert_refused(refused, REFUSED)
        assert "would be left unlocked" in refused.stderr
        assert guest.query()["requested"] == 0
        for prefault in (False, True):
            held = guest.guarantee(768 * MIB, prefault=prefault, threads=4)
            assert held["short"]["reason"] == "cgroup"
            assert guest.agent.ask("verify")  # it swaps through what is left
        assert 32 * MIB < held["locked"] < 300 * MIB
        assert 400 * MIB - held["locked"] > cgroup.wanted() // 2 - 8 * MIB, (held["locked"], cgroup.wanted())
        assert cgroup.kills() == 0
        guest.check_unharmed()


def test_memory_files_without_room(setting: Setting, tmp_path: Path) -> None:
    """Huge pages that nobody set aside, and a file system that is full: short, and the VM goes on."""
    pages = "/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages"
    if not Path(pages).exists():
        absent("this kernel has no huge pages of 2 MiB")
    setting(pages, str(int(Path(pages).read_text()) + 8))
    few = "memory-backend-memfd,id=m,size=64M,hugetlb=on,hugetlbsize=2M,reserve=off"
    full = f"memory-backend-file,id=m,size=64M,share=on,mem-path={tmp_path}/ram"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "ramlock-test", tmp_path], check=True)
    try:
        for backend, says in ((few, "in huge pages of 2048 KiB"), (full, "no more room")):
            with Guest(memory=64 * MIB, machine="pc,memory-backend=m", args=["-S", "-object", backend]) as guest:
                for prefault in (False, True):
                    held = guest.guarantee(64 * MIB, threads=4, prefault=prefault)
                    assert held["state"] == "short", (backend, prefault)
                    assert says in held["short"]["desc"]
                    assert held["locked"] <= 16 * MIB
                if backend == full:
                    assert "the guest may need" in held["short"]["desc"]  # so what is left is left to it
                    subprocess.run(["mount", "-o", "remount,size=80m", tmp_path], check=True)
                    wait_until_idle(guest)  # nobody asks it to try again
                    assert_holds(guest, 64 * MIB)
                assert guest.guarantee(0)["locked"] == 0
                assert guest.monitor.execute("query-status")["status"] == "prelaunch"
    finally:
        subprocess.run(["umount", tmp_path], check=True)


def test_huge_pages_that_are_not_set_aside(setting: Setting) -> None:
    """A guest that finds no huge page is killed: the last of them are left to it, and taken when all can be had."""
    pages = Path("/sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages")
    if not pages.exists():
        absent("this kernel has no huge pages of 2 MiB")
    before = int(pages.read_text())
    setting(str(pages), str(before + 24))
    backend = "memory-backend-memfd,id=m,size=64M,hugetlb=on,hugetlbsize=2M,reserve=off"
    with Guest(memory=64 * MIB, machine="pc,memory-backend=m", args=["-object", backend]) as guest:
        held = guest.guarantee(40 * MIB)
        assert held["state"] == "short"
        assert held["short"]["reason"] == "host-memory"
        guest.check_unharmed()
        pages.write_text(str(before + 40))
        assert wait_until_idle(guest)["locked"] == 40 * MIB  # nobody asks it to try again
        guest.check_unharmed()
