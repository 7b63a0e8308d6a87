"""libvirt for tests: its daemons, its domains, virsh."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import fcntl
import grp
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import ramlock
from tests.qemu.guest import MIB, QEMU, SLACK
from tests.qemu.monitor import connect

PACKAGES = "libvirt-daemon-system libvirt-daemon-driver-qemu libvirt-clients"
MEMORY = 256 * MIB
SIZE = 6 * MIB
"""A guarantee within the 8 MiB that libvirt's user may lock, should nobody here be allowed to raise that."""
REAPER = """
import ctypes, os, signal, sys
prctl = ctypes.CDLL(None).prctl
prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
child = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
signal.signal(signal.SIGTERM, lambda *_: os.kill(child, signal.SIGTERM))
prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
while os.wait()[0] != child:
    pass
"""
"""Runs a command and buries its orphans at once: libvirt waits for each QEMU until it is gone, and init may be slow.
It ends when the tests do, be they killed."""
DOMAIN = f"""
<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'>
  <name>{{name}}</name>
  <metadata>{{metadata}}</metadata>
  <memory unit='b'>{MEMORY}</memory>
  <vcpu>2</vcpu>
  <os><type arch='x86_64' machine='{{machine}}'>hvm</type>{{boot}}</os>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>destroy</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    <emulator>{{emulator}}</emulator>
    <controller type='usb' model='none'/>
    {{devices}}
  </devices>
  {{more}}
</domain>
"""


class Daemon:
    """One of libvirt's daemons. One that runs already is used, and left alone."""

    def __init__(self, name: str, socket: str, directory: Path, env: Mapping[str, str] | None = None) -> None:
        self._name, self._socket, self._env = name, socket, {**os.environ, **(env or {})}
        self._process: subprocess.Popen[bytes] | None = None
        self._pid = directory / f"{name}.pid"
        self._log = directory / f"{name}.log"
        self.ours = False
        with suppress(OSError):
            connect(socket, 0).close()
            return
        self.ours = True
        self.start()

    def start(self) -> None:
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-c", REAPER, self._name, "-p", str(self._pid)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env=self._env,
                start_new_session=True,
            )
        try:
            connect(self._socket, 30).close()
        except OSError as error:
            self.stop()
            raise RuntimeError(f"{self._name}: {error}: {self._log.read_text()}") from error

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
            self._process = None


def virsh(*args: str, check: bool = True) -> str:
    """Runs a command of virsh and returns what it prints."""
    result = subprocess.run(
        ["virsh", "-q", "-c", "qemu:///system", *args], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0 or not check, (args, result.stdout, result.stderr)
    return result.stdout.strip()


@contextmanager
def kvm_for_its_group() -> Iterator[None]:
    """/dev/kvm as distributions have it, for the time being.

    libvirt finds KVM with root's rights. Where its user may not use it, libvirt takes that for a change, and learns
    anew what QEMU can do, for seconds, at every start of a VM.
    """
    kvm = "/dev/kvm"
    try:
        former, group = os.stat(kvm), grp.getgrnam("kvm").gr_gid
    except (OSError, KeyError):
        yield
        return
    try:
        os.chown(kvm, -1, group)
        os.chmod(kvm, 0o660)
        yield
    finally:
        os.chown(kvm, -1, former.st_gid)
        os.chmod(kvm, stat.S_IMODE(former.st_mode))


@contextmanager
def daemons(directory: Path, env: Mapping[str, str] | None = None) -> Iterator[Daemon]:
    """A libvirtd that answers; `env` is for one that is not there yet."""
    for command in ("libvirtd", "virtlogd", "virsh"):
        if not shutil.which(command):
            absent(f"{command} is not here", PACKAGES)
    with ExitStack() as stack:
        # Another run of these tests must not come to use daemons that this one will stop.
        lock = stack.enter_context(Path("/run/lock/ramlock-test-libvirt").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)
        stack.enter_context(kvm_for_its_group())
        logs = Daemon("virtlogd", "/run/libvirt/virtlogd-sock", directory)
        stack.callback(logs.stop)
        daemon = Daemon("libvirtd", "/run/libvirt/libvirt-sock", directory, env)
        stack.callback(daemon.stop)
        yield daemon


class Domain:
    """A VM of libvirt's that runs."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.pid = 0
        self.look()

    def look(self) -> None:
        """Learns its process, which may be another one by now."""
        self.pid = int(Path(f"/run/libvirt/qemu/{self.name}.pid").read_text())

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
        result = ramlock("status", "--vm", self.name, "--json")
        assert result.returncode == 0, result.stderr
        held = truth.locked(self.pid)
        limit = min(size + SLACK, truth.memlock_limit(self.pid)) if size else 0
        for figure in (held.resident, held.span, held.vm_lck):
            assert size <= figure <= limit, held
        ram = self.ram()
        assert all(ram.contains(part) for part in held.ranges), (ram, held)
        reply = json.loads(result.stdout)
        assert (reply["requested"], reply["state"]) == (size, "idle")
        assert size <= reply["locked"] <= held.resident


@contextmanager
def running(
    machine: str = "pc",
    *,
    emulator: str | None = None,
    metadata: str = "",
    boot: str = "",
    devices: str = "",
    more: str = "",
    transient: bool = True,
) -> Iterator[Domain]:
    """A domain that runs, and is destroyed and forgotten afterwards."""
    name = f"ramlock-test-{os.getpid()}"
    text = DOMAIN.format(
        name=name,
        machine=machine,
        emulator=emulator or shutil.which(QEMU),
        metadata=metadata,
        boot=boot,
        devices=devices,
        more=more,
    )
    domain = None
    with tempfile.NamedTemporaryFile("w", suffix=".xml") as file:
        file.write(text)
        file.flush()
        try:
            virsh("create" if transient else "define", file.name)
            if not transient:
                virsh("start", name)
            domain = Domain(name)
            handle = os.pidfd_open(domain.pid)
            yield domain
        finally:
            virsh("destroy", name, check=False)
            if not transient:
                virsh("undefine", name, "--managed-save", "--snapshots-metadata", check=False)
            if domain is not None:
                with suppress(ProcessLookupError):  # it is still there only if libvirt failed
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                os.close(handle)


def wait_gone(pid: int) -> None:
    """Waits until a process has been buried."""
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
