"""Who can reach a VM's guarantee: all of libvirt's VMs have one uid, and a VM's process may have been taken over."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.qemu.conftest import ramlock
from tests.qemu.guest import MIB, Guest, How

pytestmark = pytest.mark.usefixtures("root", "lockable")

# No user of this host has these uids.
VMS = 3_100_000 + os.getpid()
STRANGER = VMS + 1

SAY = """
import os, socket, sys
uid = int(sys.argv[2])
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
client = socket.socket(socket.AF_UNIX)
client.settimeout(20)
try:
    client.connect(sys.argv[1])
    client.sendall(b'{"execute":"qmp_capabilities"}{"execute":"set_ram_minguarantee","arguments":{"size":0}}')
    client.shutdown(socket.SHUT_WR)
    print(b"".join(iter(lambda: client.recv(4096), b"")).count(b"return"))
except PermissionError:
    print("no permission")
except (ConnectionResetError, BrokenPipeError):
    print(0)
"""


def say(path: Path, uid: int) -> str:
    """What a process of that uid, without any capability, gets for setting the guarantee to nothing."""
    command = [sys.executable, "-I", "-c", SAY, str(path), str(uid)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    return result.stdout.strip()


def vm(how: How, folder: Path) -> Guest:
    return Guest(
        how=how, user=VMS, memory=64 * MIB, env={"RAMLOCK_SOCKET": str(folder / "sock"), "XDG_RUNTIME_DIR": ""}
    )


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One that both VMs can write, in a path that is open to all."""
    path = Path(f"/tmp/ramlock-peers-{os.getpid()}")
    path.mkdir(mode=0o755)
    os.chown(path, VMS, VMS)
    yield path
    shutil.rmtree(path)


def test_a_neighbour_of_the_same_uid_cannot_reach_a_preloaded_shim(folder: Path) -> None:
    """Started by root as another user with LD_PRELOAD in its environment: what <qemu:env> in libvirt comes to."""
    with vm("env", folder) as guest:
        guest.guarantee(4 * MIB)  # the limit of an ordinary user is 8
        assert (folder / "sock").stat().st_uid == VMS  # so that the mode of the file does not forbid it
        assert say(folder / "sock", VMS) == "0"
        assert say(folder / "sock", STRANGER) == "no permission"
        assert guest.query()["requested"] == 4 * MIB
        assert say(folder / "sock", 0) == "2"
        assert guest.query()["requested"] == 0


def test_a_neighbour_of_the_same_uid_cannot_reach_an_injected_shim() -> None:
    with Guest(how="plain", user=VMS, memory=64 * MIB) as guest:
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "4M")
        assert result.returncode == 0, result.stderr
        path = Path(f"/run/ramlock/{guest.pid}/sock")
        try:
            assert path.parent.stat().st_uid == VMS
            assert say(path, VMS) == "0"
            assert say(path, STRANGER) == "no permission"
            assert "4 MiB" in ramlock("status", "--pid", guest.pid).stdout
            assert say(path, 0) == "2"
        finally:
            ramlock("eject", "--pid", guest.pid)


def test_only_who_ran_it_can(folder: Path) -> None:
    """`ramlock run` by root: root may, and nobody else, even where the file is open to all."""
    with Guest(memory=64 * MIB, env={"RAMLOCK_SOCKET": str(folder / "sock")}) as guest:
        assert guest.settle()["requested"] == 0
        assert say(folder / "sock", VMS) == "no permission"
        os.chmod(folder / "sock", 0o666)  # even so
        assert say(folder / "sock", VMS) == "0"


@pytest.mark.parametrize("sign", ["parent", "runtime"])
def test_a_person_can(folder: Path, sign: str) -> None:
    """Who started QEMU from a process of their own, or has a runtime directory, may connect."""
    runtime = {"XDG_RUNTIME_DIR": str(folder) if sign == "runtime" else ""}
    prepare = ("sh", "-c", '"$@" & wait', "sh") if sign == "parent" else ()
    environ = {"RAMLOCK_SOCKET": str(folder / "sock"), **runtime}
    with Guest(how="env", user=VMS, memory=64 * MIB, env=environ, prepare=prepare) as guest:
        guest.settle()
        guest.pid = int((guest.directory / "pid").read_text())
        assert say(folder / "sock", VMS) == "2"
        assert say(folder / "sock", STRANGER) == "no permission"
