"""What gives a VM of libvirt's its guarantee when it starts: the hook, an emulator, the environment alone."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import ramlock
from tests.qemu.guest import INITRAMFS, KERNEL, RAMLOCK, ROOT, SHIM
from tests.qemu.libvirt import MEMORY, SIZE, Daemon, Domain, daemons, running, virsh, wait_gone

pytestmark = pytest.mark.usefixtures("lockable", "root")

EXAMPLES = ROOT / "examples/libvirt"
PAGE = ROOT / "docs/libvirt.md"
HOOKS = Path("/etc/libvirt/hooks/qemu.d")
GUARANTEE = f"""<ramlock:guarantee xmlns:ramlock="urn:ramlock:libvirt" unit="bytes">{SIZE}</ramlock:guarantee>"""


class Hook:
    """The hook, installed for libvirtd; `path` is where it looks for ramlock."""

    def __init__(self, directory: Path) -> None:
        self.log = directory / "hook.log"
        self._calls = directory / "hook.calls"
        self._file = HOOKS / "ramlock-test"
        self._made = not HOOKS.exists()
        HOOKS.mkdir(exist_ok=True)
        self.install(f"{RAMLOCK.parent}:{os.environ['PATH']}")

    def install(self, path: str) -> None:
        script = self._file.with_suffix(".new")
        settings = f"PATH={path} RAMLOCK_HOOK_LOG={self.log} RAMLOCK_HOOK_WAIT=30"
        # Tests that are killed leave it behind: even then it fails nobody.
        script.write_text(
            f'#!/bin/sh\n{settings} {EXAMPLES}/hook "$@"\ncode=$?\n'
            f'[ ! -d {self._calls.parent} ] || echo "$2/$3/$code" >>{self._calls}\nexit 0\n'
        )
        script.chmod(0o755)
        script.rename(self._file)
        self.log.write_text("")
        self._calls.write_text("")

    def calls(self) -> list[str]:
        """What libvirt has called it for, and what it ended with."""
        return self._calls.read_text().split()

    def run(self, name: str, operation: str, xml: str) -> str:
        """Calls it as libvirt would, and returns what it printed."""
        command = [str(self._file), name, operation, "begin", "-"]
        return subprocess.run(command, input=xml, capture_output=True, text=True, timeout=60, check=True).stdout

    def remove(self) -> None:
        self._file.unlink()
        if self._made:
            HOOKS.rmdir()


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """A directory that QEMU's user can look into."""
    with tempfile.TemporaryDirectory(prefix="ramlock-libvirt-") as name:
        Path(name).chmod(0o711)
        shutil.copy(SHIM, name)
        yield Path(name)


@pytest.fixture(scope="module")
def hook(place: Path) -> Iterator[Hook]:
    found = Hook(place)
    yield found
    found.remove()


@pytest.fixture(scope="module")
def libvirtd(place: Path, hook: Hook) -> Iterator[Daemon]:
    with daemons(place) as daemon:
        if not daemon.ours:
            absent("a libvirtd runs already, and looks for hooks only when it starts: stop it")
        yield daemon


def tainted(name: str) -> bool:
    text = Path(f"/var/log/libvirt/qemu/{name}.log").read_text(errors="replace")
    return "is tainted: custom-argv" in text[text.rindex("starting up") :]


def test_the_environment_alone(libvirtd: Daemon, place: Path) -> None:
    """The XML of the page, and again after a QEMU that was killed and has left its socket behind."""
    page = re.search(r"<qemu:commandline>.*</qemu:commandline>", PAGE.read_text(), re.DOTALL)
    assert page is not None
    more = page.group().replace("/usr/local/lib/ramlock", str(place)).replace("'2G'", f"'{SIZE}B'")
    socket = Path("/var/lib/libvirt/qemu/ramlock-web.sock")
    for _ in range(2):
        with running(more=more) as domain:
            domain.check_unharmed()
            assert ramlock("set", SIZE, "--vm", domain.name).returncode == 0  # waits
            domain.check_holds(SIZE)
            assert socket.is_socket()
            assert not Path(f"/run/ramlock/{domain.pid}.sock").exists()
            assert tainted(domain.name)
            uuid = virsh("domuuid", domain.name)
            result = ramlock("status", "--vm", uuid.upper())
            assert result.stdout.startswith(f"{domain.name} (pid {domain.pid})\n"), result.stderr
            assert uuid in result.stdout.splitlines()[1]
            assert b"ramlock.so" not in Path(f"/proc/{domain.pid}/environ").read_bytes().split(b"LD_PRELOAD", 1)[0]
            os.kill(domain.pid, signal.SIGKILL)
            wait_gone(domain.pid)
    socket.unlink()


def test_an_emulator(libvirtd: Daemon, place: Path) -> None:
    """libvirt asks it what it can do, as it asks QEMU, and gets the same answer; then it is QEMU with the shim."""
    wrapper = place / "qemu-system-x86_64-ramlock"
    script = (EXAMPLES / wrapper.name).read_text()
    wrapper.write_text(script.replace("/usr/local/lib/ramlock/ramlock.so", f"{place}/ramlock.so"))
    wrapper.chmod(0o755)
    learnt = virsh("domcapabilities", "--virttype", "qemu", "--emulatorbin", str(wrapper))
    assert learnt.replace(str(wrapper), "QEMU") == virsh("domcapabilities", "--virttype", "qemu").replace(
        shutil.which("qemu-system-x86_64") or "", "QEMU"
    )
    with running(emulator=str(wrapper)) as domain:
        domain.check_unharmed()
        domain.check_holds(0)
        assert ramlock("set", SIZE, "--vm", domain.name).returncode == 0
        domain.check_holds(SIZE)
        (folder,) = Path("/var/lib/libvirt/qemu").glob(f"domain-*-{domain.name[:20]}*")
        assert (folder / "ramlock.sock").is_socket()
        assert not tainted(domain.name)
    assert not folder.exists()
    (place / "ramlock.so").rename(place / "gone.so")
    try:
        with running(emulator=str(wrapper)) as domain:
            domain.check_unharmed()
    finally:
        (place / "gone.so").rename(place / "ramlock.so")


def test_the_hook(libvirtd: Daemon, hook: Hook) -> None:
    """A start, a libvirtd that comes back, one that comes back to a VM without the shim, a VM that was saved."""
    with running("q35", metadata=GUARANTEE, transient=False) as domain:
        settle(domain)
        domain.check_unharmed()
        assert f"{SIZE}B guaranteed" in hook.log.read_text()
        assert not tainted(domain.name)

        assert ramlock("set", SIZE // 2, "--vm", domain.name).returncode == 0
        restart(libvirtd, hook, domain)
        domain.check_unharmed()
        domain.check_holds(SIZE // 2)

        assert ramlock("eject", "--vm", domain.name).returncode == 0
        restart(libvirtd, hook, domain)
        settle(domain)
        domain.check_unharmed()

        too_much = virsh("dumpxml", domain.name).replace(str(SIZE), str(2 * MEMORY))
        assert too_much.count(str(2 * MEMORY)) == 1
        assert hook.run(domain.name, "started", too_much) == ""
        assert "the VM runs as it was" in hook.log.read_text()
        domain.check_holds(SIZE)

        element = f"<guarantee unit='KiB'>{SIZE // 2 // 1024}</guarantee>"
        virsh(
            "metadata", domain.name, "urn:ramlock:libvirt", "--key", "ramlock", "--set", element, "--live", "--config"
        )
        virsh("managedsave", domain.name)
        former = domain.pid
        virsh("start", domain.name)
        domain.look()
        assert domain.pid != former
        settle(domain, SIZE // 2)
        domain.check_unharmed()
    ends = {call.rsplit("/", 1)[1] for call in hook.calls()}
    assert {"prepare", "started", "reconnect", "restore", "release"} <= {call.split("/")[0] for call in hook.calls()}
    assert ends == {"0"}


def settle(domain: Domain, size: int = SIZE) -> None:
    """Waits until what the hook has set is reached, and checks it."""
    deadline = time.monotonic() + 60
    while True:
        result = ramlock("status", "--vm", domain.name, "--json")
        if result.returncode == 0 and json.loads(result.stdout)["requested"]:
            break
        assert time.monotonic() < deadline, result.stderr
        time.sleep(0.1)
    assert ramlock("set", size, "--vm", domain.name).returncode == 0
    assert json.loads(result.stdout)["requested"] == size
    domain.check_holds(size)


def restart(libvirtd: Daemon, hook: Hook, domain: Domain) -> None:
    """Restarts libvirtd and waits until it has come back to the VM."""
    called = hook.calls().count("reconnect/begin/0")
    libvirtd.stop()
    libvirtd.start()
    deadline = time.monotonic() + 60
    while hook.calls().count("reconnect/begin/0") == called:
        assert time.monotonic() < deadline, hook.calls()
        time.sleep(0.1)


@pytest.mark.parametrize("trouble", ["not understood", "no ramlock"])
def test_a_hook_in_trouble(libvirtd: Daemon, hook: Hook, trouble: str) -> None:
    """The VM runs, without a guarantee, and the log says why."""
    metadata = GUARANTEE
    if trouble == "not understood":
        metadata = metadata.replace("bytes", "furlongs")
    else:
        hook.install("/usr/bin:/bin")
    try:
        with running(metadata=metadata) as domain:
            domain.check_unharmed()
            assert truth.vm_lck(domain.pid) == 0
            said = hook.log.read_text()
            assert "the VM runs as it was" in said, said
            assert "Traceback" not in said
    finally:
        hook.install(f"{RAMLOCK.parent}:{os.environ['PATH']}")


def test_a_hard_limit_of_libvirts(libvirtd: Daemon) -> None:
    """virsh memtune leaves too little: it is refused and the VM lives; it leaves more: it is held."""
    with running(metadata="") as domain:
        used = memory_used(domain.pid)
        virsh("memtune", domain.name, "--hard-limit", str(used // 1024 + 32 * 1024), "--live")
        assert ramlock("inject", "--vm", domain.name).returncode == 0
        result = ramlock("set", SIZE, "--order", "address", "--vm", domain.name)
        assert result.returncode in (4, 5), result
        assert "cgroup" in result.stderr, result.stderr
        domain.check_unharmed()
        virsh("memtune", domain.name, "--hard-limit", str(used // 1024 + 512 * 1024), "--live")
        assert ramlock("set", SIZE, "--order", "address", "--vm", domain.name, "--timeout", 60).returncode == 0
        domain.check_holds(SIZE)
        domain.check_unharmed()


def memory_used(pid: int) -> int:
    """Bytes that the memory cgroup of libvirt's for this process counts."""
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return int(Path(f"/sys/fs/cgroup/memory{path}/memory.usage_in_bytes").read_text())
        for folder in (path, os.path.dirname(path)):
            file = Path(f"/sys/fs/cgroup{folder}/memory.current")
            if not controllers and file.exists():
                return int(file.read_text())
    return absent("libvirt has no memory cgroup here")


def test_what_virsh_does(libvirtd: Daemon, place: Path) -> None:
    """A booted guest with a balloon: every verb of virsh's works with the shim in, and the guarantee holds."""
    for file in (KERNEL, INITRAMFS):
        shutil.copy(file, place)
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", place / "disk", "8M"], check=True)
    boot = f"""<kernel>{place}/{KERNEL.name}</kernel><initrd>{place}/{INITRAMFS.name}</initrd>
        <cmdline>console=ttyS0 quiet panic=-1 modules=virtio_pci,virtio_balloon port=ttyS1</cmdline>"""
    devices = f"""<memballoon model='virtio'/>
        <serial type='pty'/><serial type='pty'/>
        <disk type='file'><driver name='qemu' type='qcow2'/><source file='{place}/disk'/><target dev='vda'/></disk>"""
    with running(boot=boot, devices=devices, metadata=GUARANTEE, transient=False) as domain:
        name = domain.name
        settle(domain)
        balloon(domain, MEMORY // 1024 - 64 * 1024)
        domain.check_holds(SIZE)

        stats = virsh("domstats", name)
        assert "balloon.current" in stats
        assert "vcpu.1.state" in stats
        assert "hard_limit" in virsh("memtune", name)

        virsh("suspend", name)
        domain.check_unharmed("paused")
        domain.check_holds(SIZE)
        virsh("resume", name)

        virsh("snapshot-create-as", name, "one")
        domain.check_unharmed()
        domain.check_holds(SIZE)
        virsh("snapshot-revert", name, "one")
        domain.look()
        domain.check_unharmed()
        settle(domain)

        virsh("save", name, str(place / "saved"))
        virsh("restore", str(place / "saved"))
        domain.look()
        settle(domain)
        domain.check_unharmed()
        balloon(domain, MEMORY // 1024 - 32 * 1024)

        virsh("destroy", name)
        wait_gone(domain.pid)


def balloon(domain: Domain, kib: int) -> None:
    """Asks for so much memory, and again until the guest's driver has given it."""
    deadline = time.monotonic() + 120
    while f"balloon.current={kib}" not in virsh("domstats", domain.name, "--balloon"):
        assert time.monotonic() < deadline
        virsh("setmem", domain.name, str(kib), "--live")
        time.sleep(0.3)
