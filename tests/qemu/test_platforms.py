"""The examples for Proxmox and systemd, as far as they can be run without either: argv, files, order of events."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Need
from tests.qemu import nosymbols, truth
from tests.qemu.conftest import assert_holds, ramlock
from tests.qemu.guest import MIB, RAMLOCK, ROOT, Guest
from tests.qemu.libvirt import wait_gone
from tests.qemu.monitor import Monitor

pytestmark = pytest.mark.usefixtures("lockable", "root")

HOOKSCRIPT = ROOT / "examples/proxmox/hookscript"
UNIT = ROOT / "examples/systemd/ramlock-vm@.service"
PATH = f"{RAMLOCK.parent}:{os.environ['PATH']}"
NOBODY = 65534
VM = f"web-{os.getpid()}"
FIRMWARE = ["-L", "/usr/share/seabios", "-L", "/usr/share/qemu"]
"""Where a QEMU that is elsewhere than usual finds its own files."""
NOTES = "#Our shop%3A do not stop\n#ramlock={}\nmemory: 1024\nname: web\n\n[before]\n#ramlock=1M\nmemory: 512\n"


class Proxmox:
    """The folders that Proxmox has its VMs' settings and pids in."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, size: str, pid: int | None) -> None:
        (self.folder / "100.conf").write_text(NOTES.format(size))
        pidfile = self.folder / "100.pid"
        pidfile.unlink(missing_ok=True)
        if pid is not None:
            pidfile.write_text(f"{pid}\n")

    def call(self, phase: str, path: str = PATH) -> str:
        """Calls the hookscript as Proxmox does and returns what is in the task's log then. It must not fail."""
        result = subprocess.run(
            [str(HOOKSCRIPT), "100", phase],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60,
            env={**os.environ, "PATH": path, "PVE_CONFIG": str(self.folder), "PVE_RUN": str(self.folder)},
            check=True,
        )
        assert "Traceback" not in result.stdout
        return result.stdout


@pytest.fixture
def proxmox(tmp_path: Path) -> Proxmox:
    return Proxmox(tmp_path)


def test_a_hookscript_of_proxmox(proxmox: Proxmox, tmp_path: Path) -> None:
    """Its QEMU exports no symbols; notes are written with some characters as %xx; snapshots have notes, too."""
    proxmox.write("50%25", None)
    assert proxmox.call("pre-start") == ""
    env = {"QEMU_MODULE_DIR": str(tmp_path)}
    with Guest(how="plain", qemu=str(nosymbols.renamed(tmp_path)), memory=512 * MIB, args=FIRMWARE, env=env) as guest:
        proxmox.write("50%25", guest.pid)
        said = proxmox.call("post-start")
        assert "is in it now" in said, said
        guest.settle()
        assert_holds(guest, 256 * MIB)
        proxmox.write("128M", guest.pid)
        proxmox.call("post-start")
        guest.settle()
        assert_holds(guest, 128 * MIB)
        assert proxmox.call("pre-stop") == ""
        guest.check_unharmed()
    assert proxmox.call("post-stop") == ""


def test_a_hookscript_in_trouble(proxmox: Proxmox) -> None:
    """It never fails, says what is wrong, and does nothing where nothing is asked for."""
    proxmox.write("1G", None)
    assert "without a guarantee of 1G" in proxmox.call("post-start")
    proxmox.write("1G", os.getpid())
    assert "without a guarantee of 1G" in proxmox.call("post-start", "/usr/bin:/bin")
    assert "without a guarantee of 1G" in proxmox.call("post-start")  # no QEMU
    proxmox.write("1GB", os.getpid())
    assert "use 1GiB" in proxmox.call("post-start")
    for nothing in ("", "$(touch here)", "1G; touch here", "--upgrade"):
        proxmox.write(nothing, os.getpid())
        assert proxmox.call("post-start") == ""
    (proxmox.folder / "100.conf").unlink()
    assert proxmox.call("post-start") == ""


class Unit:
    """The example as systemd would read it."""

    def __init__(self, runtime: Path, settings: dict[str, str]) -> None:
        text = UNIT.read_text().replace("/usr/local/bin/ramlock", str(RAMLOCK))
        self.text = text.replace("/etc/ramlock/vm/%i.conf", str(runtime / f"{VM}.conf"))
        self._known = {"%t": str(runtime), "%i": VM, "%%": "%"}
        self._settings = settings

    def value(self, key: str) -> str:
        found = re.search(rf"^{key}=(.*)$", self.text.replace("\\\n", " "), re.MULTILINE)
        assert found, key
        return found[1]

    def command(self, key: str, settings: dict[str, str] | None = None) -> list[str]:
        """The words of a command: %x is replaced, ${NAME} is one word or a part of one, $NAME is several."""
        words = []
        values = {**self._settings, **(settings or {})}
        for word in shlex.split(re.sub("%[ti%]", lambda match: self._known[match[0]], self.value(key))):
            if word[:1] == "$" and word[1:] in values:
                words += values[word[1:]].split()
            else:
                words.append(re.sub(r"\$\{?(\w+)\}?", lambda match: values.get(match[1], match[0]), word))
        return words


@pytest.fixture
def runtime() -> Iterator[Path]:
    """What systemd makes for RuntimeDirectory=."""
    with tempfile.TemporaryDirectory(prefix="ramlock-systemd-") as name:
        Path(name).chmod(0o755)
        folder = Path(name) / "ramlock-vm" / VM
        folder.mkdir(parents=True)
        os.chown(folder, NOBODY, NOBODY)
        yield Path(name)


def test_a_unit_of_systemd(runtime: Path, need: Need) -> None:
    """As another user without rights: started, given its guarantee, asked to shut down."""
    need("setpriv", "util-linux")
    need("socat", "socat")
    folder = runtime / "ramlock-vm" / VM
    options = f"-accel tcg -m 512M -qmp unix:{folder}/qmp,server=on,wait=off"
    unit = Unit(runtime, {"GUARANTEE": "4M", "QEMU_OPTIONS": options})
    assert unit.value("RuntimeDirectory") == "ramlock-vm/%i"
    assert unit.value("LimitMEMLOCK") == "infinity"
    # DynamicUser=, CapabilityBoundingSet= and NoNewPrivileges=; the limit stays what it is here, 8 MiB perhaps.
    rights = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", "--no-new-privs"]
    rights += ["--bounding-set=-all", "--inh-caps=-all"]
    start = [*rights, *unit.command("ExecStart")]
    with (runtime / "log").open("wb") as log:
        service = subprocess.Popen(start, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env={"PATH": PATH})
    try:
        with Monitor(folder / "qmp") as monitor:
            assert os.readlink(f"/proc/{service.pid}/exe").endswith("qemu-system-x86_64")
            assert ramlock("set", "6M", "--vm", VM).returncode == 0
            reply = json.loads(ramlock("status", "--socket", folder / "ramlock.sock", "--json").stdout)
            assert (reply["requested"], reply["state"]) == (6 * MIB, "idle")
            assert truth.vm_lck(service.pid) >= 6 * MIB
            # The shell reads $MAINPID, which systemd sets; a guest without an operating system does not shut down.
            stop = unit.command("ExecStop", {"MAINPID": str(service.pid)})
            with subprocess.Popen(stop, stdin=subprocess.DEVNULL) as stopping:
                deadline = time.monotonic() + 30
                while not any(event["event"] == "POWERDOWN" for event in monitor.events):
                    assert time.monotonic() < deadline
                    monitor.execute("query-status")
                    time.sleep(0.05)
                assert stopping.poll() is None
                service.send_signal(signal.SIGTERM)
                assert service.wait(30) == 0
                assert stopping.wait(30) == 0
    finally:
        service.kill()
        service.wait()
    wait_gone(service.pid)
    assert not (folder / "ramlock.sock").exists()


def test_systemd_understands_the_unit(runtime: Path, need: Need) -> None:
    need("systemd-analyze", "systemd")
    unit = runtime / UNIT.name
    unit.write_text(UNIT.read_text().replace("/usr/local/bin/ramlock", str(RAMLOCK)))
    result = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
