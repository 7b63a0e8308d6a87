"""`ramlock apply`: real VMs get what a policy says, and nothing else is touched."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu import truth
from tests.qemu.conftest import assert_holds, assert_refused, ramlock
from tests.qemu.guest import MIB, RAMLOCK, ROOT, Guest

pytestmark = pytest.mark.usefixtures("lockable", "root")

MEMORY = 64 * MIB
NOBODY = 65534
TAG = f"apply-{os.getpid()}"
"""Begins the names of our VMs: a policy must not come to count for those of others on this machine."""
UUID = f"0c9f3bb2-5d0f-4a5f-9f1c-{os.getpid():012x}"


class File:
    """A policy, and what applying it does."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> None:
        self.path.write_text(text.replace("TAG", TAG))

    def apply(self, *words: str) -> subprocess.CompletedProcess[str]:
        return ramlock("apply", self.path, *words)

    def done(self, *words: str) -> list[str]:
        result = self.apply(*words)
        assert result.returncode == 0, (result.stdout, result.stderr)
        return result.stdout.splitlines()


@pytest.fixture
def file(tmp_path: Path) -> File:
    return File(tmp_path / "policy.toml")


@pytest.fixture(scope="module")
def guests() -> Iterator[tuple[Guest, Guest]]:
    """One under ramlock, one without a shim yet."""
    with (
        Guest(memory=MEMORY, args=["-name", f"{TAG}-one"]) as one,
        Guest(how="plain", memory=MEMORY, args=["-name", f"{TAG}-two", "-uuid", UUID]) as two,
    ):
        one.settle()
        yield one, two


def test_from_nothing_and_again(file: File, guests: tuple[Guest, Guest]) -> None:
    """Lowering comes before raising, the shim comes where it is needed, and a second time there is nothing to do."""
    one, two = guests
    one.guarantee(32 * MIB)
    file.write(f'[vm."TAG-*"]\nguarantee = "25%"\n[vm.{UUID}]\nguarantee = "20M"\npriority = 5\n')
    plan = [f"- {TAG}-one (pid {one.pid}): 32 MiB -> 16 MiB (25%)"]
    plan += [f"+ {TAG}-two (pid {two.pid}): nothing -> 20 MiB, the shim is brought in"]
    assert file.done("--dry-run") == plan
    assert one.query()["requested"] == 32 * MIB
    assert not two.shim_socket.exists()
    assert file.done("--wait") == plan
    assert_holds(one, 16 * MIB)
    assert_holds(two, 20 * MIB)
    before = [guest.query()["generation"] for guest in guests]
    assert all(line.startswith("  ") and line.endswith("as it is") for line in file.done("--wait"))
    assert [guest.query()["generation"] for guest in guests] == before
    for guest in guests:
        guest.check_unharmed()


def test_ctrl_z_does_not_stop_it_with_a_vm_in_its_hands(file: File) -> None:
    """It injects in a thread of its own, which would stop as well, and QEMU's main thread would wait."""
    with Guest(how="plain", memory=MEMORY, args=["-name", f"{TAG}-held"]) as guest:
        file.write('[vm.TAG-held]\nguarantee = "16M"\n')
        with subprocess.Popen(
            [RAMLOCK, "apply", file.path],
            env={**os.environ, "RAMLOCK_TEST_CTRL_Z_AT": "ptrace-setregs-done"},
            stdin=subprocess.DEVNULL,
            preexec_fn=os.setpgrp,  # of a group that nobody looks after Ctrl-Z stops nothing
        ) as process:
            try:
                assert process.wait(60) == 0
            finally:
                process.kill()
        assert_holds(guest, 16 * MIB)
        guest.check_unharmed()


def test_an_impossible_plan_touches_nothing(file: File, guests: tuple[Guest, Guest]) -> None:
    one, two = guests
    one.guarantee(8 * MIB)
    file.write('[vm."TAG-one"]\nguarantee = "4M"\n[vm."TAG-two"]\nguarantee = "1G"\n')
    result = file.apply()
    assert result.returncode == 4, result.stderr
    assert "guest RAM" in result.stderr
    assert "line 3" in result.stderr
    assert one.query()["requested"] == 8 * MIB
    file.write('[vm."TAG-one"]\nguarantee = "4M"\n[vm."TAG-*"]\nguarantee = "all"\n')
    assert "nothing" not in file.done()[1]
    assert two.settle()["all"] is True
    file.write('[vm."TAG-*"]\nguarantee = 0\n')
    assert len(file.done()) == 2
    assert truth.vm_lck(two.pid) == 0


def test_more_than_the_host_has(file: File, guests: tuple[Guest, Guest]) -> None:
    """The sum of all, less what is left for the host: 1 MiB is less than the two ask for, whatever others hold."""
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    head = f"host-reserve = {total - MIB}\n"
    file.write(head + '[vm."TAG-*"]\nguarantee = "32M"\n')
    result = file.apply()
    assert result.returncode == 4, result.stdout
    assert "this host can guarantee" in result.stderr
    assert all(truth.vm_lck(guest.pid) == 0 for guest in guests)


def test_a_bad_policy_is_told_by_its_line(file: File) -> None:
    file.write('[vm."TAG-one"]\nguarantee = "2GB"\n')
    result = file.apply()
    assert_refused(result, 2)
    assert "line 2" in result.stderr
    assert_refused(ramlock("apply", file.path.with_name("none")), 2)
    file.path.write_text("")  # what is left of one that was written to a full disk
    assert_refused(ramlock("apply", "--prune", "--dry-run", file.path), 2)


def test_a_stopped_vm_does_not_keep_others_from_theirs(file: File, guests: tuple[Guest, Guest]) -> None:
    one, two = guests
    file.write('[vm."TAG-*"]\nguarantee = "12M"\n')
    os.kill(one.pid, signal.SIGSTOP)
    try:
        result = file.apply()
    finally:
        os.kill(one.pid, signal.SIGCONT)
    assert result.returncode == 1, result.stderr
    assert f"{TAG}-one (pid {one.pid}) was left as it is: stopped" in result.stderr
    assert two.settle()["requested"] == 12 * MIB
    assert len(file.done()) == 2
    assert one.settle()["requested"] == 12 * MIB


def test_whose_name_anybody_could_take(file: File) -> None:
    with Guest(how="plain", memory=MEMORY, user=NOBODY, args=["-name", f"{TAG}-evil"]) as guest:
        file.write('[vm."TAG-evil"]\nguarantee = "8M"\n')
        (line,) = file.done()
        assert line.startswith(f"! {TAG}-evil (pid {guest.pid}): left alone")
        assert truth.vm_lck(guest.pid) == 0
        file.write(f'uids = [{NOBODY}]\n[vm."TAG-evil"]\nguarantee = "8M"\n')
        file.done("--wait")
        assert truth.locked(guest.pid).resident >= 8 * MIB


def test_two_of_one_name(file: File) -> None:
    args = ["-name", f"{TAG}-double"]
    with Guest(memory=MEMORY, args=args) as one, Guest(memory=MEMORY, args=args) as two:
        for guest in (one, two):
            guest.settle()
        file.write('[vm."TAG-double"]\nguarantee = "8M"\n')
        result = file.apply()
        assert result.returncode == 4
        assert str(one.pid) in result.stderr
        assert str(two.pid) in result.stderr
        file.write('[vm."TAG-double*"]\nguarantee = "8M"\n')
        file.done("--wait")
        assert truth.locked(one.pid).resident >= 8 * MIB <= truth.locked(two.pid).resident


PRUNE = """
import sys
from pathlib import Path
from tests.qemu.conftest import ramlock
from tests.qemu.guest import MIB, Guest
policy = Path(sys.argv[1])
args = ["-name", "kept"], ["-name", "left"]
with Guest(memory=64 * MIB, args=args[0]) as kept, Guest(memory=64 * MIB, args=args[1]) as left:
    for guest in (kept, left):
        guest.settle()
        guest.guarantee(8 * MIB)
    policy.write_text('[vm.kept]\\nguarantee = "8M"\\n')
    assert ramlock("apply", policy).returncode == 0
    assert left.query()["requested"] == 8 * MIB
    result = ramlock("apply", policy, "--prune")
    assert result.returncode == 0, result.stderr
    assert "8 MiB -> nothing" in result.stdout, result.stdout
    assert (kept.query()["requested"], left.settle()["requested"]) == (8 * MIB, 0)
"""


def test_prune(tmp_path: Path) -> None:
    """In a pid namespace, as it takes the guarantee from every VM of a host."""
    words = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, "-c", PRUNE]
    result = subprocess.run(
        [*words, tmp_path / "p.toml"], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
