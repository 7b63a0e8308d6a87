"""The rules for AppArmor and SELinux compile; AppArmor's cover what the shim opens. Neither is enforced here.

And what a filter of system calls has to allow is said.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

from tests.conftest import Need
from tests.qemu.guest import MIB, ROOT, Guest

APPARMOR = ROOT / "examples/apparmor/libvirt-qemu"
SELINUX = ROOT / "examples/selinux/ramlock.te"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=60, check=False)


def test_apparmor_takes_the_rules(tmp_path: Path, need: Need) -> None:
    """Beside the rules that libvirt has of its own, where they are here."""
    need("apparmor_parser", "apparmor")
    theirs = "abstractions/libvirt-qemu"
    common = theirs if Path("/etc/apparmor.d", theirs).exists() else "abstractions/base"
    profile = tmp_path / "profile"
    for rules, expected in ((APPARMOR.read_text(), 0), (APPARMOR.read_text() + "/run/x nonsense,\n", 1)):
        profile.write_text(f"#include <tunables/global>\nprofile vm {{\n#include <{common}>\n{rules}\n}}\n")
        result = run("apparmor_parser", "--skip-kernel-load", "--skip-cache", profile)
        assert result.returncode == expected, result.stderr


def test_selinux_takes_the_rules(tmp_path: Path, need: Need) -> None:
    need("checkmodule", "checkpolicy")
    result = run("checkmodule", "-M", "-m", "-o", tmp_path / "ramlock.mod", SELINUX)
    assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "ramlock.mod").exists()


@pytest.mark.usefixtures("lockable", "root")
def test_the_rules_cover_what_the_shim_opens(tmp_path: Path, need: Need) -> None:
    """What a QEMU opens with the shim, and not without."""
    need("strace", "strace")
    opened = {how: traced(tmp_path / how, how) for how in ("env", "plain")}
    ours = {path for path in opened["env"] - opened["plain"] if path.startswith(("/proc/", "/sys/", "/run/", "/dev/"))}
    assert len(ours) > 8, ours
    assert {"/proc/meminfo", "/proc/self/pagemap"} <= ours
    rules = re.findall(r"^  (?:owner )?(/\S+|@\S+) \w*r\w*,$", APPARMOR.read_text(), re.MULTILINE)
    patterns = [re.compile(pattern(rule)) for rule in rules]
    assert {path for path in ours if not any(one.fullmatch(path) for one in patterns)} == set()


@pytest.mark.usefixtures("lockable", "root")
def test_the_page_names_every_system_call_of_the_shims_threads(tmp_path: Path, need: Need) -> None:
    """Who answers for a filter with --allow-seccomp has nothing else to go by: one that is missing kills the VM."""
    need("strace", "strace")
    page = (ROOT / "docs/architecture.md").read_text()
    told = re.search(r"`--allow-seccomp` is for those.*?\.\n3\.", page, re.DOTALL)
    assert told
    trace = tmp_path / "trace"
    with Guest(memory=128 * MIB, prepare=["strace", "-f", "-qq", "-o", str(trace)], timeout=120) as guest:
        guest.settle()
        guest.guarantee(64 * MIB, threads=2)
        guest.guarantee(96 * MIB, prefault=False, order="address")
        guest.guarantee(32 * MIB)
        tasks = {
            task.name
            for task in Path(f"/proc/{guest.pid}/task").iterdir()
            if (task / "comm").read_text().startswith("ramlock")
        }
        guest.guarantee(0)
    calls = {line.split()[1].split("(")[0] for line in trace.read_text().splitlines() if line.split()[0] in tasks}
    calls = {call for call in calls if call.isidentifier()}
    assert {"mlock2", "madvise", "getrusage", "accept4"} <= calls
    assert calls - set(re.findall(r"`(\w+)`", told[0])) == set()


def traced(trace: Path, how: str) -> set[str]:
    """The paths that a QEMU opens, from its start until its guarantee is held."""
    words = ["strace", "-f", "-qq", "-o", str(trace), "-e", "trace=open,openat,openat2"]
    env = {"RAMLOCK_GUARANTEE": "64M"} if how == "env" else {}
    socket = {"RAMLOCK_SOCKET": str(trace.with_suffix(".sock"))} if how == "env" else {}
    with Guest(how="env" if how == "env" else "plain", memory=128 * MIB, prepare=words, env={**env, **socket}) as guest:
        if how == "env":
            guest.settle()
            assert guest.query()["locked"] >= 64 * MIB
    paths = re.findall(r"open\w*\((?:AT_FDCWD, )?\"([^\"]+)\"", trace.read_text())
    return {os.path.normpath(path).replace("/proc/thread-self/", "/proc/self/task/1/") for path in paths}


def pattern(rule: str) -> str:
    """A rule's path as a regular expression; /proc/self is what a process calls its own folder."""
    rule = rule.replace("@{PROC}", "/proc").replace("@{pid}", "{self,[0-9]*}")
    words = {"**": ".*", "*": "[^/]*", "{": "(?:", "}": ")", ",": "|"}
    parts = re.split(r"(\*\*|\*|\{|\}|,|\[[^]]*\])", rule)
    return "".join(words.get(part, part if part.startswith("[") else re.escape(part)) for part in parts)
