"""A VM that libvirt runs: another user's, sandboxed, in a mount namespace of its own, with libvirt as its monitor."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import assert_refused, ramlock
from tests.qemu.guest import MIB, QEMU, SLACK
from tests.qemu.monitor import connect

pytestmark = pytest.mark.usefixtures("lockable", "root")

PACKAGES = "libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients"
MEMORY = 256 * MIB
SIZE = 6 * MIB
"""A guarantee within the 8 MiB that libvirt's user may lock, should nobody here be allowed to raise that."""
REAPER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
while os.wait()[0] != child:
    pass
"""
"""Runs a command and buries its orphans at once: libvirt waits for each QEMU until it is gone, and init may be slow."""
DOMAIN = f"""
<domain type='qemu'>
  <name>{{name}}</name>
  <memory unit='b'>{MEMORY}</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='{{machine}}'>hvm</type></os>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{{emulator}}</emulator>
    <controller type='usb' model='none'/>
  </devices>
</domain>
"""


class Daemon:
    """One of libvirt's daemons. One that runs already is used, and left alone."""

    def __init__(self, name: str, socket: str, directory: Path) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = directory / f"{name}.pid"
        with suppress(OSError):
            connect(socket, 0).close()
            return
        with (directory / f"{name}.log").open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", REAPER, name, "-p", str(self._pid)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        try:
            connect(socket, 30).close()
        except OSError as error:
            self.stop()
            raise RuntimeError(f"{name}: {error}: {(directory / log.name).read_text()}") from error

    def stop(self) -> None:
        if self._process is None:
            return
        if self._process.poll() is None and self._pid.exists():
            os.kill(int(self._pid.read_text()), signal.SIGTERM)
        try:
            self._process.wait(20)
        finally:
            self._process.kill()
            self._process.wait()


def virsh(*args: str, check: bool = True) -> str:
    """Runs a command of virsh and returns what it prints."""
    result = subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0 or not check, (args, result.stdout, result.stderr)
    return result.stdout.strip()


@pytest.fixture(scope="module")
def libvirt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A libvirtd that answers."""
    for command in ("libvirtd", "virtlogd", "virsh"):
        if not shutil.which(command):
            absent(f"{command} is not here", PACKAGES)
    directory = tmp_path_factory.mktemp("libvirt")
    with ExitStack() as stack:
        # Another run of these tests must not come to use daemons that this one will stop.
        lock = stack.enter_context(Path("/run/lock/ramlock-test-libvirt").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name, socket in (("virtlogd", "virtlogd-sock"), ("libvirtd", "libvirt-sock")):
            stack.callback(Daemon(name, f"/run/libvirt/{socket}", directory).stop)
        yield


class Domain:
    """A running VM of libvirt's, transient: it is forgotten when it ends."""

    def __init__(self, name: str, pid: int) -> None:
        self.name = name
        self.pid = pid

    def ram(self) -> truth.Range:
        answer = virsh("qemu-monitor-command", self.name, "--hmp", "gpa2hva 0")
        start = int(answer.rsplit(" ", 1)[1], 16)
        return truth.Range(start, start + MEMORY)

    def check_unharmed(self, state: str = "running") -> None:
        """Fails unless libvirt still has the same VM, and its monitor answers."""
        assert virsh("domstate", self.name) == state
        reply = json.loads(virsh("qemu-monitor-command", self.name, '{"execute": "query-status"}'))
        assert reply["return"]["status"] == state
        assert "vcpu.current=2" in virsh("domstats", self.name)
        os.kill(self.pid, 0)

    def check_holds(self, size: int) -> None:
        """The kernel has this much locked, in guest RAM only; the shim says the same."""
        held = truth.locked(self.pid)
        limit = min(size + SLACK, truth.memlock_limit(self.pid)) if size else 0
        for figure in (held.resident, held.span, held.vm_lck):
            assert size <= figure <= limit, held
        ram = self.ram()
        assert all(ram.contains(part) for part in held.ranges), (ram, held)
        result = ramlock("status", "--vm", self.name, "--json")
        assert result.returncode == 0, result.stderr
        reply = json.loads(result.stdout)
        assert (reply["requested"], reply["state"]) == (size, "idle")
        assert size <= reply["locked"] <= held.resident


@pytest.fixture(params=["q35", "pc"])
def domain(request: pytest.FixtureRequest, libvirt: None, tmp_path: Path) -> Iterator[Domain]:
    name = f"ramlock-test-{os.getpid()}"
    emulator = shutil.which(QEMU)
    file = tmp_path / "domain.xml"
    file.write_text(DOMAIN.format(name=name, machine=request.param, emulator=emulator))
    virsh("create", str(file))
    pid = int(Path(f"/run/libvirt/qemu/{name}.pid").read_text())
    handle = os.pidfd_open(pid)
    try:
        yield Domain(name, pid)
    finally:
        virsh("destroy", name, check=False)
        with suppress(ProcessLookupError):  # it is still there only if libvirt failed
            signal.pidfd_send_signal(handle, signal.SIGKILL)
        os.close(handle)


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
    deadline = time.monotonic() + 30
    while Path(f"/proc/{domain.pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


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
