"""The shim does nothing in programs that are not QEMU, is not handed to QEMU's children, and sleeps when idle."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.conftest import Need
from tests.qemu import truth
from tests.qemu.guest import MIB, SHIM, Guest


def preloaded(command: Sequence[str]) -> str:
    """Runs a program with the shim preloaded and returns what it printed."""
    env = {**os.environ, "LD_PRELOAD": str(SHIM), "RAMLOCK_GUARANTEE": "64M"}
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60, check=True)
    assert result.stderr == ""
    return result.stdout


def test_shell() -> None:
    assert preloaded(["bash", "-c", "ls /proc/$$/task | wc -l"]).strip() == "1"


def test_the_shell_names_of_qemu_do_not_deceive(tmp_path: Path) -> None:
    """It is the program that counts, not what it is called."""
    link = tmp_path / "qemu-system-x86_64"
    link.symlink_to("/bin/bash")
    assert preloaded([str(link), "-c", "ls /proc/$$/task | wc -l"]).strip() == "1"


def test_qemu_img(need: Need, tmp_path: Path) -> None:
    need("qemu-img", "qemu-utils")
    image = tmp_path / "disk.qcow2"
    preloaded(["qemu-img", "create", "-q", "-f", "qcow2", str(image), "1M"])
    assert "file format: qcow2" in preloaded(["qemu-img", "info", str(image)])


def test_qemu_version() -> None:
    assert "QEMU emulator" in preloaded(["qemu-system-x86_64", "--version"])


def migrate_environment(guest: Guest) -> dict[str, str]:
    """What a child of QEMU finds in its environment: the helper of an outgoing migration."""
    out = guest.directory / "environment"
    guest.monitor.execute("migrate", {"uri": f"exec:cat /proc/self/environ > {out}; cat > /dev/null"})
    deadline = time.monotonic() + 60
    while not (out.exists() and out.stat().st_size):
        assert time.monotonic() < deadline, guest.said()
        time.sleep(0.05)
    data = out.read_bytes().decode(errors="replace")
    return dict(item.split("=", 1) for item in data.split("\0") if "=" in item)


def test_helpers_do_not_get_the_shim() -> None:
    with Guest(how="env", memory=64 * MIB) as guest:
        env = migrate_environment(guest)
        assert "PATH" in env
        assert "ramlock" not in env.get("LD_PRELOAD", "")
        guest.query()


def test_what_else_was_preloaded_stays() -> None:
    """Only the shim's own entry is taken out."""
    with Guest(how="plain", memory=64 * MIB, env={"LD_PRELOAD": f"libm.so.6:{SHIM}"}) as guest:
        assert migrate_environment(guest)["LD_PRELOAD"].strip(":") == "libm.so.6"
        guest.query()


@pytest.mark.usefixtures("root", "lockable")
def test_tap_script(need: Need) -> None:
    """A fork after QEMU is up: the child gets neither the shim nor its threads, and QEMU keeps both."""
    need("/dev/net/tun")
    with Guest(memory=64 * MIB) as guest:
        script = guest.directory / "ifup"
        out = guest.directory / "ifup.out"
        script.write_text(f"#!/bin/sh\ncat /proc/self/environ > {out}.new\nmv {out}.new {out}\n")
        script.chmod(0o755)
        guest.monitor.execute(
            "netdev_add", {"type": "tap", "id": "t0", "script": str(script), "downscript": "no"}, timeout=30
        )
        assert "ramlock.so" not in out.read_text(errors="replace")
        guest.guarantee(32 * MIB)
        assert truth.locked(guest.pid).resident >= 32 * MIB
        guest.check_unharmed()


def shim_threads(pid: int) -> dict[str, int]:
    return {name: task for name, task in truth.threads(pid).items() if name.startswith("ramlock-")}


@pytest.mark.parametrize("after_work", [False, True])
def test_no_wakeups_when_nothing_is_guaranteed(after_work: bool) -> None:
    with Guest(memory=256 * MIB) as guest:
        if after_work:
            guest.guarantee(32 * MIB)
            guest.guarantee(0)
        guest.settle()
        names = shim_threads(guest.pid)
        assert set(names) == {"ramlock-ctl", "ramlock-lock"}
        time.sleep(1)  # the session just closed is still to be cleared away
        before = {name: truth.switches(guest.pid, task) for name, task in names.items()}
        time.sleep(5)
        after = {name: truth.switches(guest.pid, task) for name, task in names.items()}
        assert after == before


def test_the_socket_goes_with_qemu() -> None:
    with Guest(memory=64 * MIB) as guest:
        place = guest.shim_socket
        guest.query()
        assert place.is_socket()
        guest.monitor.execute("quit")
        guest.wait()
        assert not place.exists()
