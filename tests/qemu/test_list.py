"""`ramlock list`: real VMs with a shim and without, and some that would have whoever asks them wait."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from ramlock import survey
from tests.qemu import truth
from tests.qemu.conftest import ramlock
from tests.qemu.guest import MIB, Guest

pytestmark = pytest.mark.usefixtures("lockable")

UUID = "0c9f3bb2-5d0f-4a5f-9f1c-3f3f1f2a7b11"
EVIL = "evil\x1b[2J\u202e\nname"
MEMORY = 64 * MIB
KEYS = {"pid", "name", "uuid", "ram", "resident", "swapped", "shim", "requested", "locked", "state", "problem"}

SILENT = """
import ctypes, os, socket, sys, time
server = socket.socket(socket.AF_UNIX)
server.bind(os.environ["RAMLOCK_SOCKET"])
server.listen()
ctypes.CDLL(None).prctl(15, b"ramlock-ctl", 0, 0, 0)
print("ready", flush=True)
time.sleep(600)
"""
"""A process that looks like a QEMU with a shim, takes connections and never says a word."""


def listed(*words: object) -> dict[int, dict[str, Any]]:
    """What `ramlock list` says of each pid; other VMs of this machine are in it too."""
    result = ramlock("list", "--json", *words)
    assert result.returncode == 0, result.stderr
    said = json.loads(result.stdout)
    assert [vm["pid"] for vm in said] == sorted(vm["pid"] for vm in said)
    assert all(set(vm) == KEYS for vm in said)
    return {vm["pid"]: vm for vm in said}


@pytest.fixture(scope="module")
def guests() -> Iterator[tuple[Guest, Guest]]:
    """One with a shim, one without."""
    with (
        Guest(memory=MEMORY, args=["-name", f"guest={EVIL},debug-threads=on", "-uuid", UUID.upper()]) as one,
        Guest(how="plain", memory=MEMORY, args=["-name", "plain,,but"]) as other,
    ):
        one.settle()
        one.guarantee(24 * MIB)
        yield one, other


def test_a_vm_with_a_shim(guests: tuple[Guest, Guest]) -> None:
    vm = listed()[guests[0].pid]
    assert vm["uuid"] == UUID
    assert vm["name"] == "evil\\x1b[2J\\u202e\\nname"
    assert (vm["ram"], vm["requested"], vm["state"], vm["shim"]) == (MEMORY, 24 * MIB, "idle", True)
    assert vm["locked"] == truth.locked(guests[0].pid).resident
    rss = int(truth.status(guests[0].pid, "VmRSS").split()[0]) * 1024
    assert abs(vm["resident"] - rss) < 8 * MIB
    assert vm["swapped"] == int(truth.status(guests[0].pid, "VmSwap").split()[0]) * 1024
    assert vm["problem"] is None


def test_a_vm_without_one(guests: tuple[Guest, Guest]) -> None:
    vm = listed()[guests[1].pid]
    assert (vm["name"], vm["uuid"], vm["ram"], vm["shim"]) == ("plain,but", None, MEMORY, False)
    assert (vm["requested"], vm["locked"], vm["state"], vm["problem"]) == (None, None, None, None)
    assert vm["resident"] > MIB


def test_for_people(guests: tuple[Guest, Guest]) -> None:
    result = ramlock("list")
    assert result.returncode == 0, result.stderr
    head, *rows = result.stdout.splitlines()
    assert head.split()[:2] == ["pid", "name"]
    lines = {int(row.split()[0]): row for row in rows}
    assert "evil\\x1b[2J" in lines[guests[0].pid]
    assert "24 MiB" in lines[guests[0].pid]
    assert lines[guests[1].pid].endswith("no shim")
    assert "\x1b" not in result.stdout


def test_a_stopped_vm_holds_nobody_up(guests: tuple[Guest, Guest]) -> None:
    os.kill(guests[0].pid, signal.SIGSTOP)
    try:
        vm = listed("--timeout", 60)[guests[0].pid]
    finally:
        os.kill(guests[0].pid, signal.SIGCONT)
    assert (vm["shim"], vm["state"], vm["requested"], vm["problem"]) == (True, None, None, "stopped")
    assert vm["ram"] == MEMORY
    assert listed()[guests[0].pid]["state"] == "idle"


def test_another_users_vm_is_seen_and_not_asked(guests: tuple[Guest, Guest]) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become another user")
    code = "import os, sys, json; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
    code += "from ramlock import survey; seen = {s.pid: s for s in survey.survey()}[int(sys.argv[1])]\n"
    code += "print(json.dumps([seen.name, seen.shim, seen.guarantee is None, seen.problem]))"
    # Imported by root beforehand, since this tree may be closed to other users.
    code = "import ramlock.survey, ramlock.commands.list; '\\x1b'.encode('unicode_escape')\n" + code
    words = [sys.executable, "-c", code, str(guests[0].pid)]
    out = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True).stdout
    name, shim, silent, problem = json.loads(out)
    assert (name, shim, silent, problem) == ("evil\\x1b[2J\\u202e\\nname", True, True, "no permission")


def test_silent_vms_are_waited_for_all_at_once(tmp_path: Path, guests: tuple[Guest, Guest]) -> None:
    """Six that never answer cost no more than one does; those that answer are told all the same."""
    program = Path(shutil.copy(os.path.realpath(sys.executable), tmp_path / "qemu-system-x86_64"))
    with ExitStack() as stack:
        silent: list[int] = []

        def add() -> None:
            environ = {**os.environ, "RAMLOCK_SOCKET": str(tmp_path / f"{len(silent)}"), "PYTHONHOME": sys.base_prefix}
            process = subprocess.Popen([program, "-c", SILENT], env=environ, stdout=subprocess.PIPE)
            stack.callback(process.wait)
            stack.callback(process.kill)
            assert process.stdout is not None
            stack.callback(process.stdout.close)
            assert process.stdout.readline() == b"ready\n"
            silent.append(process.pid)

        def took() -> float:
            before = time.monotonic()
            seen = {vm.pid: vm for vm in survey.survey(1.0)}
            seconds = time.monotonic() - before
            assert all(seen[pid].guarantee is None and seen[pid].problem == "no answer" for pid in silent)
            assert seen[guests[0].pid].guarantee is not None
            return seconds

        add()
        one = took()
        for _ in range(5):
            add()
        assert took() < 3 * one
