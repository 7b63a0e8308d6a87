"""libvirt's hook by itself: what it asks of ramlock, and when; test_libvirt_start.py has it with libvirt."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.qemu.conftest import assert_holds
from tests.qemu.guest import MIB, RAMLOCK, ROOT, Guest

EXAMPLES = ROOT / "examples/libvirt"
UUID = "5d744f21-ba4a-4d6e-bdb2-30a35ff3207d"
RECORDER = """#!/bin/sh
echo "$*" >>"$(dirname "$0")/asked"
[ "$1" = status ] && exit "$(cat "$(dirname "$0")/status")"
echo $$ >"$(dirname "$0")/pid"
[ ! -e "$(dirname "$0")/slow" ] || exec sleep 60
"""
"""Stands for ramlock where only what it is asked for matters."""


class Asked:
    """The hook without libvirt, and what it asks of ramlock."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "log"
        self._ramlock = folder / "ramlock"
        self._ramlock.write_text(RECORDER)
        self._ramlock.chmod(0o755)
        (folder / "status").write_text("6")

    def by(self, operation: str, xml: str, wait: int = 20) -> list[str]:
        (self.folder / "asked").write_text("")
        env = {
            "PATH": f"{self.folder}:/usr/bin:/bin",
            "RAMLOCK_HOOK_LOG": str(self.log),
            "RAMLOCK_HOOK_WAIT": str(wait),
        }
        command = [str(EXAMPLES / "hook"), "web", *operation.split(), "-"]
        result = subprocess.run(command, input=xml, capture_output=True, text=True, timeout=60, env=env, check=True)
        assert (result.stdout, result.stderr) == ("", "")
        assert not self.log.exists() or "Traceback" not in self.log.read_text()
        return (self.folder / "asked").read_text().splitlines()


@pytest.fixture
def asked(tmp_path: Path) -> Asked:
    return Asked(tmp_path)


def domain_xml(amount: str, unit: str = "") -> str:
    element = f'<r:guarantee xmlns:r="urn:ramlock:libvirt"{unit}>{amount}</r:guarantee>'
    return f"<domain><name>web</name><uuid>{UUID}</uuid><metadata><x/>{element}</metadata></domain>"


def test_how_much_is_asked_for(asked: Asked) -> None:
    """libvirt's units for memory, in any case; KiB when there is none."""
    units = {"": 1024, "b": 1, "Bytes": 1, "KB": 1000, "kib": 1024, "k": 1024, "MB": 10**6, "MiB": 1 << 20}
    units |= {"GB": 10**9, "G": 1 << 30, "GiB": 1 << 30, "TiB": 1 << 40}
    for unit, factor in units.items():
        (line,) = asked.by("started begin", domain_xml(" 3\n", f" unit='{unit}'" if unit else ""))
        assert line == f"inject --vm {UUID} --guarantee {3 * factor}B --no-wait"
    for words in ("all", "50%"):
        assert asked.by("started begin", domain_xml(words))[0].split()[4] == words
    nonsense = ["", "two", "-1", "1.5", "1" * 30, "50% of it", "--upgrade"]
    for xml in [domain_xml(word) for word in nonsense] + [domain_xml("1", " unit='parsec'"), "<domain", "", "\0"]:
        assert asked.by("started begin", xml) == []
    assert asked.log.read_text().count("the VM runs as it was") == len(nonsense) + 4


def test_when_it_is_asked_for(asked: Asked) -> None:
    """A filter of XML must print nothing; a VM that libvirt comes back to keeps what was set meanwhile."""
    xml = domain_xml("4096")
    for operation in ("prepare begin", "start begin", "migrate begin", "restore begin", "stopped end", "release end"):
        assert asked.by(operation, xml) == []
    assert asked.by("started begin", "<domain><metadata/></domain>") == []
    assert [line.split()[0] for line in asked.by("reconnect begin", xml)] == ["status", "inject"]
    (asked.folder / "status").write_text("0")
    assert [line.split()[0] for line in asked.by("reconnect begin", xml)] == ["status"]


@pytest.mark.parametrize(
    "setting",
    [
        {"PATH": "/none"},
        {"RAMLOCK_HOOK_LOG": "/none/log"},
        {"RAMLOCK_HOOK_LOG": "/"},
        {"RAMLOCK_HOOK_LOG": "/dev/full"},
        {"RAMLOCK_HOOK_WAIT": "soon"},
        {"RAMLOCK_HOOK_WAIT": "08"},
        {"RAMLOCK_HOOK_WAIT": "-1"},
    ],
    ids=lambda setting: " ".join("=".join(pair) for pair in setting.items()),
)
def test_it_never_fails(tmp_path: Path, setting: dict[str, str]) -> None:
    env = {"PATH": "/usr/bin:/bin", "RAMLOCK_HOOK_LOG": str(tmp_path / "log"), **setting}
    for xml in (domain_xml("4096"), "<domain"):
        command = ["/bin/sh", str(EXAMPLES / "hook"), "web", "started", "begin", "-"]
        result = subprocess.run(command, input=xml, capture_output=True, text=True, timeout=60, env=env, check=False)
        assert (result.returncode, result.stdout) == (0, "")


def test_a_slow_injection_holds_no_start_up(asked: Asked) -> None:
    """The hook is back before it, and leaves it to itself."""
    (asked.folder / "slow").touch()
    began = time.monotonic()
    asked.by("started begin", domain_xml("4096"), 1)
    took = time.monotonic() - began
    pid = asked.folder / "pid"
    while not pid.exists() or not pid.read_text().endswith("\n"):
        assert time.monotonic() < began + 60
        time.sleep(0.05)
    os.kill(int(pid.read_text()), signal.SIGTERM)
    assert took < 30
    assert "goes on by itself" in asked.log.read_text()


@pytest.mark.usefixtures("lockable", "root")
def test_a_vm_that_waits_for_its_migration(tmp_path: Path) -> None:
    """libvirt calls `started` on the host that a VM comes to before the VM has come: so it is already injected then."""
    size = 6 * MIB
    log = tmp_path / "log"
    env = {"PATH": f"{RAMLOCK.parent}:{os.environ['PATH']}", "RAMLOCK_HOOK_LOG": str(log), "RAMLOCK_HOOK_WAIT": "30"}
    with Guest(how="plain", memory=128 * MIB, args=["-incoming", "defer", "-uuid", UUID]) as guest:
        command = [str(EXAMPLES / "hook"), "web", "started", "begin", "-"]
        xml = domain_xml(str(size), " unit='bytes'")
        result = subprocess.run(command, input=xml, capture_output=True, text=True, timeout=60, env=env, check=True)
        assert result.stdout == ""
        assert f"{size}B guaranteed" in log.read_text()
        guest.settle()
        assert_holds(guest, size)
        assert guest.monitor.execute("query-status")["status"] == "inmigrate"
