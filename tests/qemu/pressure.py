"""Memory pressure that is real and only for the test's own: swap in compressed RAM, and a small memory cgroup."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType

CONTROL = Path("/sys/class/zram-control")
MEMORY = Path("/sys/fs/cgroup/memory")


def can_swap() -> bool:
    """Whether this user and this machine can make swap in compressed RAM."""
    return os.geteuid() == 0 and CONTROL.exists() and shutil.which("mkswap") is not None


def can_confine() -> bool:
    """Whether memory cgroups of version 1 can be made here."""
    return (MEMORY / "memory.limit_in_bytes").exists() and os.access(MEMORY, os.W_OK)


class Zram:
    """Swap of `size` bytes in compressed RAM while it is entered; the device is removed afterwards."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._number = -1

    @property
    def device(self) -> Path:
        return Path(f"/dev/zram{self._number}")

    def __enter__(self) -> Zram:
        self._number = int((CONTROL / "hot_add").read_text())
        try:
            Path(f"/sys/block/zram{self._number}/disksize").write_text(str(self.size))
            deadline = time.monotonic() + 10
            while not self.device.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            subprocess.run(["mkswap", str(self.device)], check=True, capture_output=True, timeout=60)
            subprocess.run(["swapon", "--priority", "100", str(self.device)], check=True, timeout=60)
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        subprocess.run(["swapoff", str(self.device)], check=False, timeout=300)
        self._remove()

    def _remove(self) -> None:
        Path(f"/sys/block/zram{self._number}/reset").write_text("1")
        (CONTROL / "hot_remove").write_text(str(self._number))


class Confined:
    """A memory cgroup (version 1) of `limit` bytes for one process, removed when that has ended or moved away."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.path = MEMORY / f"ramlock-test-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> Confined:
        self.path.mkdir()
        (self.path / "memory.limit_in_bytes").write_text(str(self.limit))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            (MEMORY / "cgroup.procs").write_text(pid)
        deadline = time.monotonic() + 10
        while True:
            try:
                self.path.rmdir()
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.05)
            else:
                return

    def add(self, pid: int) -> None:
        """Moves a process in, with what it has charged so far."""
        (self.path / "memory.move_charge_at_immigrate").write_text("3")
        (self.path / "cgroup.procs").write_text(str(pid))

    def squeeze(self, limit: int) -> None:
        """Another limit; a smaller one reclaims at once what is too much. Raises OSError when that cannot be had."""
        (self.path / "memory.limit_in_bytes").write_text(str(limit))
        self.limit = limit

    def swapped(self) -> int:
        """Bytes of the group that are in swap."""
        for line in (self.path / "memory.stat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "swap":
                return int(value)
        return int((self.path / "memory.memsw.usage_in_bytes").read_text()) - int(
            (self.path / "memory.usage_in_bytes").read_text()
        )
