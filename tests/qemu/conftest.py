"""Fixtures for tests with a real QEMU: the command, host settings that are put back, judgement by the kernel."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramlock import elf, memory
from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.guest import GIB, INITRAMFS, RAMLOCK, SHIM, SLACK, Guest

Setting = Callable[[str, str], None]
CAP_IPC_LOCK = 14


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """Says what to do when the tests are run without make."""
    for path in (RAMLOCK, SHIM, INITRAMFS):
        if not path.exists():
            pytest.exit(f"{path} is not there: run `make test`, or `make guest` and `make` before", returncode=2)


@pytest.fixture
def lockable() -> None:
    """Skips where this user may not lock some GiB."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capabilities = int(truth.status(os.getpid(), "CapEff"), 16)
    if hard != resource.RLIM_INFINITY and hard < 4 * GIB and not capabilities >> CAP_IPC_LOCK & 1:
        absent("this user may not lock memory: run as root, or raise the hard limit (prlimit --memlock)")


@pytest.fixture
def root() -> None:
    """Skips unless run as root."""
    if os.geteuid() != 0:
        absent("only root can do this")


@pytest.fixture
def setting() -> Iterator[Setting]:
    """A function that writes a host setting such as a file of /proc/sys; the former values are put back afterwards."""
    former: list[tuple[Path, str]] = []

    def write(path: str, value: str) -> None:
        file = Path(path)
        text = file.read_text().strip()
        # "always [madvise] never": the one in brackets is set.
        former.append((file, text.split("[")[1].split("]")[0] if "[" in text else text))
        file.write_text(value)

    try:
        yield write
    finally:
        for file, value in reversed(former):
            file.write_text(value)


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A shim of another build."""
    data = bytearray(SHIM.read_bytes())
    build = bytes.fromhex(memory.find_build_id(elf.sections(SHIM, (".note.gnu.build-id",))[0]))
    data[data.index(build)] ^= 0xFF
    path = tmp_path / "ramlock.so"
    path.write_bytes(data)
    tmp_path.chmod(0o755)
    return path


def ramlock(*args: object, timeout: float = 120, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """Runs the ramlock command; its exit code is for the test to judge."""
    return subprocess.run(
        [str(RAMLOCK), *map(str, args)],
        capture_output=True,
        text=True,
        timeout=timeout,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
        check=False,
    )


def assert_refused(result: subprocess.CompletedProcess[str], *codes: int) -> None:
    """One line of what, one of what to do, on stderr; one of these exit codes; no traceback."""
    assert result.returncode in codes, (result.returncode, result.stdout, result.stderr)
    assert "Traceback" not in result.stderr
    assert len(result.stderr.strip().splitlines()) >= 2, result.stderr
    assert result.stdout == ""


def assert_holds(guest: Guest, asked: int) -> truth.Locked:
    """The kernel holds what was asked locked and resident, hardly more, in guest RAM only; the shim says the same."""
    ram = guest.ram()
    reply = guest.query()
    held = truth.locked(guest.pid)
    limit = min(asked + SLACK, ram.size) if asked else 0
    assert asked <= held.resident <= limit, (held, reply)
    assert asked <= held.span <= limit, (held, reply)
    assert asked <= held.vm_lck <= limit, (held, reply)
    assert held.swap == 0
    assert all(ram.contains(part) for part in held.ranges), (ram, held)
    assert reply["requested"] == asked
    assert reply["state"] == "idle", reply
    assert asked <= reply["locked"] <= held.resident, (held, reply)
    assert reply["locked"] <= reply["armed"] <= held.vm_lck, (held, reply)
    assert sum(block["locked"] for block in reply["blocks"]) == reply["locked"]
    return held
