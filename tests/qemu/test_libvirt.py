"""A VM that libvirt runs: another user's, sandboxed, in a mount namespace of its own, with libvirt as its monitor."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ramlock import __version__
from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import assert_refused, ramlock
from tests.qemu.guest import MIB, QEMU, SHIM, Guest
from tests.qemu.libvirt import MEMORY, SIZE, Domain, daemons, running, virsh, wait_gone

pytestmark = pytest.mark.usefixtures("lockable", "root")


@pytest.fixture(scope="module")
def libvirt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """The file that libvirtd logs to, where it is ours."""
    directory = tmp_path_factory.mktemp("libvirt")
    with daemons(directory) as daemon:
        yield directory / "libvirtd.log" if daemon.ours else None


@pytest.fixture(params=["q35", "pc"])
def domain(request: pytest.FixtureRequest, libvirt: None) -> Iterator[Domain]:
    with running(request.param) as found:
        yield found


def test_a_vm_of_libvirts(domain: Domain) -> None:
    """From the injection to the ejection, and again; libvirt rules its VM all the while."""
    assert truth.status(domain.pid, "Uid").split()[1] != "0"
    assert os.stat(f"/proc/{domain.pid}/ns/mnt").st_ino != os.stat("/proc/self/ns/mnt").st_ino
    assert truth.status(domain.pid, "Seccomp") == "2"
    domain.check_unharmed()
    for which in (("--pid", domain.pid), ("--vm", domain.name)):
        result = ramlock("inject", *which, "--json")
        assert result.returncode == 0, result.stderr
        reply = json.loads(result.stdout)
        assert (reply["already"], reply["source"]) == (False, "qemu")
        assert Path(reply["socket"]).is_socket()
        domain.check_holds(0)
        assert ramlock("set", SIZE, *which).returncode == 0
        domain.check_holds(SIZE)
        virsh("suspend", domain.name)
        domain.check_unharmed("paused")
        domain.check_holds(SIZE)
        assert ramlock("set", SIZE // 2, *which).returncode == 0
        virsh("resume", domain.name)
        domain.check_unharmed()
        domain.check_holds(SIZE // 2)
        assert json.loads(ramlock("inject", *which, "--json").stdout)["already"]
        result = ramlock("eject", *which)
        assert result.returncode == 0, result.stderr
        assert truth.vm_lck(domain.pid) == 0
        assert not Path(f"/run/ramlock/{domain.pid}.sock").is_symlink()
        domain.check_unharmed()
    virsh("destroy", domain.name)
    wait_gone(domain.pid)


@pytest.mark.parametrize("domain", ["q35"], indirect=True)
def test_in_libvirts_monitor(domain: Domain) -> None:
    """libvirt's own client code sets and asks."""

    def ask(command: str, **arguments: object) -> dict[str, Any]:
        request = json.dumps({"execute": command, "arguments": arguments})
        reply: dict[str, Any] = json.loads(virsh("qemu-monitor-command", domain.name, request))
        return reply

    assert ask("query-ram-minguarantee")["error"]["class"] == "CommandNotFound"
    result = ramlock("inject", "--vm", domain.name, "--monitor")
    assert result.returncode == 0, result.stderr
    assert ask("set_ram_minguarantee", size=SIZE)["return"] == {}
    assert ramlock("status", "--vm", domain.name).returncode == 0
    deadline = time.monotonic() + 60
    while (reply := ask("query-ram-minguarantee")["return"])["state"] != "idle":
        assert time.monotonic() < deadline, reply
    domain.check_holds(SIZE)
    assert "error" in ask("set_ram_minguarantee", size=2 * MEMORY)
    domain.check_holds(SIZE)
    assert ramlock("eject", "--vm", domain.name).returncode == 0
    assert ask("query-ram-minguarantee")["error"]["class"] == "CommandNotFound"
    domain.check_unharmed()


def test_the_limit_of_locked_memory(domain: Domain) -> None:
    """libvirt gives a VM 8 MiB. It is raised where that is allowed; where not, that is said, and nothing is locked."""
    limit = truth.memlock_limit(domain.pid)
    result = ramlock("inject", "--pid", domain.pid, "--guarantee", MEMORY // 2, "--json")
    if truth.memlock_limit(domain.pid) > limit or limit >= MEMORY:
        assert result.returncode == 0, result.stderr
        domain.check_holds(MEMORY // 2)
    else:
        assert_refused(result, 4)
        assert "128 MiB is more than QEMU's locked-memory limit" in result.stderr
        domain.check_holds(0)
        assert ramlock("set", SIZE, "--pid", domain.pid).returncode == 0
        assert_refused(ramlock("set", MEMORY // 2, "--pid", domain.pid), 4)
        domain.check_holds(SIZE)
    domain.check_unharmed()


def test_a_killed_controller(domain: Domain) -> None:
    """libvirt does not notice, and the next one succeeds."""
    for step in ("write-frame", "ptrace-setregs", "ptrace-setregs-done", "wait-socket", "set-guarantee"):
        result = ramlock(
            "inject", "--vm", domain.name, "--guarantee", SIZE, env={"RAMLOCK_TEST_KILL_AT": step}, timeout=60
        )
        assert result.returncode == -9, (step, result.stderr)
        domain.check_unharmed()
        result = ramlock("inject", "--vm", domain.name, "--guarantee", SIZE)
        assert result.returncode == 0, result.stderr
        domain.check_holds(SIZE)
        assert ramlock("eject", "--vm", domain.name).returncode == 0
        domain.check_unharmed()


def test_a_policy_counts_for_what_libvirt_started(libvirt: Path | None, tmp_path: Path) -> None:
    """Though its user is neither root nor listed; another process of that user that takes its name is left alone."""
    file = tmp_path / "policy.toml"
    with running("q35") as domain:
        file.write_text(f'[vm."{domain.name}*"]\nguarantee = "{SIZE}"\n')
        uid = int(truth.status(domain.pid, "Uid").split()[1])
        assert uid != 0
        with Guest(how="plain", memory=64 * MIB, user=uid, args=["-name", domain.name]) as other:
            result = ramlock("apply", file, "--wait")
            assert result.returncode == 0, result.stderr
            assert f"! {domain.name} (pid {other.pid}): left alone, it is user {uid}'s" in result.stdout
            assert truth.vm_lck(other.pid) == 0
        domain.check_holds(SIZE)
        assert "as it is" in ramlock("apply", file).stdout
        domain.check_unharmed()


# Where libvirt wants QEMU's monitor the shim listens; QEMU's own goes elsewhere.
EMULATOR = """#!/bin/bash
words=() monitor=
while [ $# -gt 0 ]; do
	case $1 in
	-qmp) monitor=${2#unix:}; words+=(-qmp "unix:${monitor%%,*}.qemu,server=on,wait=off"); shift ;;
	*) words+=("$1") ;;
	esac
	shift
done
[ -n "$monitor" ] && export LD_PRELOAD=FOLDER/ramlock.so RAMLOCK_SOCKET="${monitor%%,*}"
exec QEMU "${words[@]}"
"""


def test_the_client_in_libvirt(libvirt: Path | None) -> None:
    """libvirt learns what an emulator can do over QMP; here its client is led to the shim instead of to QEMU's monitor.

    It takes the greeting, negotiates, asks for the version and says it: so it has understood all three answers. There
    it ends, since it wants a QEMU of 4.2 at least.
    """
    if libvirt is None:
        absent("a libvirtd that tests did not start runs here, and what it says is not seen")
    folder = Path(f"/tmp/ramlock-emulator-{os.getpid()}")
    folder.mkdir(mode=0o755)
    try:
        shutil.copy(SHIM, folder)
        emulator = folder / "qemu-system-x86_64"
        emulator.write_text(EMULATOR.replace("FOLDER", str(folder)).replace("QEMU", f"/usr/bin/{QEMU}"))
        emulator.chmod(0o755)
        virsh("domcapabilities", "--virttype", "qemu", "--emulatorbin", str(emulator), check=False)
    finally:
        shutil.rmtree(folder)
    said = [line for line in libvirt.read_text().splitlines() if str(emulator) in line]
    assert any(line.endswith(f", but {__version__} found") for line in said), said
