"""Every example does what it says, with a real QEMU."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import Need
from tests.qemu import truth
from tests.qemu.conftest import assert_holds, ramlock
from tests.qemu.guest import GIB, MIB, RAMLOCK, ROOT, SHIM, Guest

pytestmark = pytest.mark.usefixtures("lockable")

EXAMPLES = ROOT / "examples"


def test_launch() -> None:
    path = f"{RAMLOCK.parent}:{os.environ['PATH']}"
    with Guest(how="plain", qemu=str(EXAMPLES / "launch.sh"), memory=512 * MIB, env={"PATH": path}) as guest:
        guest.settle()
        assert_holds(guest, 256 * MIB)
        assert ramlock("set", "300M", "--vm", "web-1").returncode == 0
        assert_holds(guest, 300 * MIB)


def test_launch_by_environment() -> None:
    script = str(EXAMPLES / "launch-env.sh")
    with Guest(how="plain", qemu=script, memory=512 * MIB, env={"RAMLOCK_SO": str(SHIM)}) as guest:
        guest.settle()
        assert_holds(guest, 256 * MIB)


@pytest.mark.usefixtures("root")
def test_set_over_socket_by_socat(need: Need) -> None:
    need("socat", "socat")
    with Guest() as guest:
        guest.settle()
        command = [str(EXAMPLES / "set-over-socket.sh"), str(guest.pid), str(192 * MIB)]
        result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        assert result.stdout.count('"return"') == 2
        guest.settle()
        assert_holds(guest, 192 * MIB)


def test_set_over_socket_by_library() -> None:
    def run(size: int) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(EXAMPLES / "set-over-socket.py"), str(guest.shim_socket), str(size)]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)

    with Guest() as guest:
        guest.settle()
        result = run(320 * MIB)
        assert result.returncode == 0, result.stderr
        assert re.search(r"RAM_MINGUARANTEE_REACHED: 32[0-4] of 320 MiB", result.stdout)
        assert_holds(guest, 320 * MIB)
        assert run(2 * GIB).returncode == 4
        assert_holds(guest, 320 * MIB)


@pytest.fixture
def place() -> Iterator[Path]:
    """A temporary directory for one demo alone: what is in it is the demo's."""
    with tempfile.TemporaryDirectory(prefix="demo-") as name:
        yield Path(name)


def start_demo(place: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(EXAMPLES / "demo.py")],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "TMPDIR": str(place)},
    )


@pytest.mark.deadline(400)
def test_demo_cleans_up(place: Path) -> None:
    with start_demo(place) as demo:
        said, _ = demo.communicate(timeout=300)
    assert demo.returncode == 0, said
    assert "✓" in said
    assert "✗" not in said
    assert "\x1b" not in said
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_interrupted_cleans_up(place: Path, number: signal.Signals) -> None:
    with start_demo(place) as demo:
        deadline = time.monotonic() + 60
        while not list(place.glob("*/pid")):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        (pidfile,) = place.glob("*/pid")
        time.sleep(1)
        pid = int(pidfile.read_text())
        demo.send_signal(number)
        said, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, said
    assert "nothing is left behind" in said
    assert not Path(f"/proc/{pid}").exists()
    assert list(place.iterdir()) == []


@pytest.mark.usefixtures("root")
@pytest.mark.parametrize("answer", ["", "\n"], ids=["stays", "goes"])
def test_inject_running(answer: str) -> None:
    path = f"{RAMLOCK.parent}:{os.environ['PATH']}"
    with Guest(how="plain") as guest:
        result = subprocess.run(
            [str(EXAMPLES / "inject-running.sh"), str(guest.pid), "192M"],
            input=answer,
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
            env={**os.environ, "PATH": path},
        )
        assert "main thread was away for" in result.stdout
        assert "192 MiB of 1 GiB guest RAM" in result.stdout
        if answer:
            assert "the shim has left" in result.stdout
            assert truth.vm_lck(guest.pid) == 0
        else:
            assert_holds(guest, 192 * MIB)
        guest.check_unharmed()
