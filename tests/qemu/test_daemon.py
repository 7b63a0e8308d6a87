"""`ramlock daemon`: VMs come and go, the policy changes, the daemon is killed; no guarantee is ever lost."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests.conftest import Need
from tests.qemu import truth
from tests.qemu.guest import MIB, RAMLOCK, ROOT, Guest

pytestmark = pytest.mark.usefixtures("lockable", "root")

MEMORY = 64 * MIB
TAG = f"daemon-{os.getpid()}"
UNIT = ROOT / "examples" / "systemd" / "ramlock.service"


def eventually(what: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Service:
    """The daemon, as a service manager runs it: with a socket to be told over."""

    def __init__(self, directory: Path, prefix: list[str]) -> None:
        self.policy = directory / "policy.toml"
        self.log = directory / "log"
        self._prefix = prefix
        self._address = str(directory / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address)
        self._socket.settimeout(60)
        self._process: subprocess.Popen[bytes] | None = None

    def write(self, text: str) -> None:
        """Replaces the policy, as editors do."""
        new = self.policy.with_suffix(".new")
        new.write_text(text.replace("TAG", TAG))
        new.rename(self.policy)

    def start(self) -> None:
        environ = {**os.environ, "NOTIFY_SOCKET": self._address, "WATCHDOG_USEC": "60000000"}
        words = [*self._prefix, str(RAMLOCK), "daemon", "--policy", str(self.policy), "--interval", "1"]
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(words, env=environ, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        self.told("READY=1")

    def told(self, what: str) -> None:
        """Waits until the service manager is told so."""
        while not any(line.startswith(what) for line in self._socket.recv(4096).decode().splitlines()):
            pass

    def forget(self) -> None:
        """Drops what was told so far."""
        self._socket.setblocking(False)
        with suppress(BlockingIOError):
            while True:
                self._socket.recv(4096)
        self._socket.settimeout(60)

    def signal(self, number: int) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def end(self, number: int) -> int:
        """Ends it by a signal and returns the exit code."""
        self.signal(number)
        assert self._process is not None
        code = self._process.wait(60)
        self._process = None
        return code

    def said(self) -> str:
        return self.log.read_text()

    def close(self) -> None:
        if self._process is not None:
            self.end(signal.SIGKILL)
        self._socket.close()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    made = Service(tmp_path, [])
    try:
        yield made
    finally:
        made.close()


def holds(guest: Guest, size: int) -> bool:
    """Whether the kernel says that so much is locked; there may be no shim yet."""
    return size <= truth.vm_lck(guest.pid) <= size + 4 * MIB


def plain(name: str) -> Guest:
    return Guest(how="plain", memory=MEMORY, args=["-name", f"{TAG}-{name}"])


def test_a_life(service: Service) -> None:
    service.write('[vm."TAG-*"]\nguarantee = "8M"\n')
    with plain("one") as one:
        service.start()
        eventually(lambda: holds(one, 8 * MIB))
        with plain("two") as two:  # one that comes
            eventually(lambda: holds(two, 8 * MIB))
        with plain("two") as two:  # ... and comes again
            eventually(lambda: holds(two, 8 * MIB))
            service.write('[vm."TAG-*"]\nguarantee = "8M"\n[vm.TAG-one]\nguarantee = "16M"\n')
            eventually(lambda: holds(one, 16 * MIB))
            assert holds(two, 8 * MIB)
            one.guarantee(4 * MIB)  # somebody else's word does not last
            eventually(lambda: holds(one, 16 * MIB))

            # Killed at any instant: nothing changes, and the next one finds nothing to do.
            one.settle()
            generations = [guest.query()["generation"] for guest in (one, two)]
            assert service.end(signal.SIGKILL) == -signal.SIGKILL
            assert holds(one, 16 * MIB)
            assert holds(two, 8 * MIB)
            service.forget()
            service.start()
            service.told("STATUS=2 of 2")
            assert [guest.query()["generation"] for guest in (one, two)] == generations

            # A policy with a fault changes nothing.
            service.write('[vm."TAG-*"]\nguarantee = "8GB"\n')
            eventually(lambda: "the former policy stays in force" in service.said())
            assert "line 2" in service.said()
            service.policy.unlink()
            service.signal(signal.SIGHUP)
            eventually(lambda: service.said().count("the former policy stays in force") > 1)
            assert [guest.query()["generation"] for guest in (one, two)] == generations

            # One that is impossible raises nobody, and does not end the daemon.
            total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
            service.write(f'host-reserve = {total - MIB}\n[vm."TAG-*"]\nguarantee = "24M"\n')
            eventually(lambda: "nobody's guarantee is raised" in service.said())
            assert holds(one, 16 * MIB)

            service.forget()
            service.told("WATCHDOG=1")
            service.told("WATCHDOG=1")
            assert service.end(signal.SIGTERM) == 0
            service.told("STOPPING=1")
            assert [guest.query()["generation"] for guest in (one, two)] == generations
            for guest in (one, two):
                guest.check_unharmed()


def test_a_vm_that_cannot_have_it_does_not_keep_others_from_theirs(service: Service) -> None:
    service.write('[vm."TAG-*"]\nguarantee = "8M"\n[vm.TAG-small]\nguarantee = "1G"\n')
    with plain("small") as small, plain("stopped") as stopped:
        os.kill(stopped.pid, signal.SIGSTOP)
        try:
            service.start()
            with plain("well") as well:
                eventually(lambda: holds(well, 8 * MIB))
                eventually(lambda: "guest RAM" in service.said())
                assert truth.vm_lck(small.pid) == 0
                assert truth.vm_lck(stopped.pid) == 0
        finally:
            os.kill(stopped.pid, signal.SIGCONT)
        eventually(lambda: holds(stopped, 8 * MIB))
        # What cannot be helped is said once.
        assert service.said().count("guest RAM") == 1


def test_a_vm_that_is_starting_is_waited_for_elsewhere(service: Service) -> None:
    """It has a shim, and no guest RAM yet; others have theirs meanwhile, and it has its own when it has started."""
    service.write('[vm."TAG-*"]\nguarantee = "8M"\n')
    late = ["-name", f"{TAG}-late", "-preconfig"]
    with Guest(memory=MEMORY, args=late) as starting:
        service.start()
        with plain("well") as well:
            eventually(lambda: holds(well, 8 * MIB))
            assert truth.vm_lck(starting.pid) == 0
            starting.monitor.execute("x-exit-preconfig")
            eventually(lambda: holds(starting, 8 * MIB))


def test_it_ends_at_once_when_there_is_no_policy(service: Service) -> None:
    words = [str(RAMLOCK), "daemon", "--policy", str(service.policy)]
    result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert "cannot read the policy" in result.stderr


def test_the_unit_is_one(need: Need) -> None:
    need("systemd-analyze", "systemd")
    text = UNIT.read_text().replace("/usr/local/bin/ramlock", "/bin/true").replace("Documentation=", "# ")
    copy = Path("/run/ramlock-test-unit.service")
    copy.write_text(text)
    try:
        words = ["systemd-analyze", "verify", "--man=no", str(copy)]
        result = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False)
    finally:
        copy.unlink()
    assert (result.returncode, result.stderr.strip()) == (0, ""), result.stderr


def test_it_works_within_the_limits_of_the_unit(tmp_path: Path, need: Need) -> None:
    """The unit's capabilities, no new privileges, a mount namespace in which all but /run/ramlock is read-only."""
    for command in ("setpriv", "unshare"):
        need(command, "util-linux")
    unit = UNIT.read_text()
    (capabilities,) = re.findall(r"^CapabilityBoundingSet=(.*)$", unit, re.MULTILINE)
    assert "ProtectSystem=strict\nReadWritePaths=/run/ramlock\n" in unit
    keep = ",".join("+" + name.removeprefix("CAP_").lower() for name in capabilities.split())
    Path("/run/ramlock").mkdir(exist_ok=True)
    script = "mount --rbind /run/ramlock /run/ramlock && mount -o remount,bind,ro / && "
    script += 'exec setpriv --no-new-privs --bounding-set "-all,$0" --inh-caps=-all "$@"'
    prefix = [shutil.which("unshare") or "", "--mount", "--propagation", "slave", "sh", "-c", script, keep]
    service = Service(tmp_path, prefix)
    try:
        service.write('[vm."TAG-*"]\nguarantee = "8M"\n')
        with plain("inside") as guest, Guest(how="plain", memory=MEMORY, user=65534, args=["-name", f"{TAG}-u"]) as u:
            service.write('uids = [65534]\n[vm."TAG-*"]\nguarantee = "8M"\n')
            service.start()
            eventually(lambda: holds(guest, 8 * MIB) and holds(u, 8 * MIB))
            service.end(signal.SIGTERM)
            assert guest.query()["requested"] == 8 * MIB
            guest.check_unharmed()
    finally:
        service.close()
