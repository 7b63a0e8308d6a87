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


def hierarchy() -> Path | None:
    """Where memory cgroups can be made, of version 1 or 2; None where they cannot."""
    if can_confine():
        return MEMORY
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, place, kind, *_ = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            controllers = Path(place) / "cgroup.subtree_control"
            if "memory" in controllers.read_text().split():
                return Path(place)
    return None


class Confined:
    """A memory cgroup of `limit` bytes for a test's processes, removed when these have ended or moved away."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._root = hierarchy() or MEMORY
        self._v1 = self._root == MEMORY
        self.path = self._root / f"ramlock-test-{os.getpid()}-{time.monotonic_ns()}"

    def __enter__(self) -> Confined:
        self.path.mkdir()
        try:
            self.squeeze(self.limit)
        except BaseException:
            self.path.rmdir()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pid in (self.path / "cgroup.procs").read_text().split():
            (self._root / "cgroup.procs").write_text(pid)
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

    @property
    def prepare(self) -> list[str]:
        """Words that start a command in it."""
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.path / "cgroup.procs")]

    def add(self, pid: int) -> None:
        """Moves a process in; in version 1 with what it has charged so far."""
        if self._v1:
            (self.path / "memory.move_charge_at_immigrate").write_text("3")
        (self.path / "cgroup.procs").write_text(str(pid))

    def squeeze(self, limit: int) -> None:
        """Another limit; a smaller one reclaims at once what is too much. Raises OSError when that cannot be had."""
        (self.path / ("memory.limit_in_bytes" if self._v1 else "memory.max")).write_text(str(limit))
        self.limit = limit

    def swapped(self) -> int:
        """Bytes of the group that are in swap."""
        if not self._v1:
            return int((self.path / "memory.swap.current").read_text())
        swapped = self._counter("memory.stat", "swap")
        if swapped is not None:
            return swapped
        return int((self.path / "memory.memsw.usage_in_bytes").read_text()) - int(
            (self.path / "memory.usage_in_bytes").read_text()
        )

    def kills(self) -> int:
        """Processes of the group that the kernel has killed for want of memory."""
        killed = self._counter("memory.oom_control" if self._v1 else "memory.events", "oom_kill")
        assert killed is not None, "this kernel does not count what it kills"
        return killed

    def _counter(self, file: str, name: str) -> int | None:
        for line in (self.path / file).read_text().splitlines():
            key, _, value = line.partition(" ")
            if key == name:
                return int(value)
        return None
