"""What the memory cgroups of a process leave, v1 and v2 with all ancestors, as this host sees them.

The same reckoning as the shim's (shim/cgroup.c), from outside: a cgroup namespace or another root may hide from the
shim what binds it. See Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst of Linux.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import re
from pathlib import Path
from typing import NamedTuple

from ramlock import procfs
from ramlock.evictable import Evictable
from ramlock.text import printable

NO_LIMIT = 1 << 62
"""Bytes; v1 says "no limit" with a number above it."""
_RESERVE_LEAST = 64 << 20


class Level(NamedTuple):
    """One memory cgroup with a limit; sizes in bytes."""

    path: str
    """As the host sees it, below where the hierarchy is mounted."""
    file: str
    """The name of the file that has the limit."""
    limit: int
    left: int
    """What may still be allocated: less the reserve, with what the kernel gives up easily."""
    evictable: Evictable

    @property
    def reserve(self) -> int:
        """What QEMU itself needs; locked memory gives none back."""
        return max(self.limit // 16, _RESERVE_LEAST)

    @property
    def allowed(self) -> int:
        """What may be allocated and locked so that the rest keeps its cushion, too."""
        return min(self.left, self.evictable.beyond_cushion()) if self.evictable.swaps else self.left


def levels(pid: int, swap_free: int, proc: Path = procfs.PROC, root: Path = Path("/")) -> list[Level] | None:
    """Return the cgroups that bind `pid`, none without a limit; None when that cannot be known from here."""
    try:
        memberships = (proc / str(pid) / "cgroup").read_bytes().decode(errors="surrogateescape").rstrip("\n")
    except FileNotFoundError:
        return [] if (proc / str(pid)).exists() else None  # a kernel without cgroups
    except OSError:
        return None
    v2 = None
    for line in memberships.split("\n") if memberships else ():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return _chain(path, True, swap_free, proc, root)
        if controllers == "":
            v2 = path
    return [] if v2 is None else _chain(v2, False, swap_free, proc, root)


def tightest(known: list[Level]) -> Level | None:
    """Return the level that leaves least; None when there is no limit."""
    return min(known, key=lambda level: level.allowed, default=None)


def _chain(path: str, v1: bool, swap_free: int, proc: Path, root: Path) -> list[Level] | None:
    """Read the cgroup `path` and all its ancestors that are mounted here."""
    if ".." in path.split("/"):
        return None  # outside of our own namespace
    mount = _mount(path, v1, proc)
    if mount is None:
        return None if v1 or path != "/" else []
    point, below = mount
    folder = root / point.lstrip("/")
    parts = [part for part in below.split("/") if part]
    found = []
    for depth in range(len(parts), -1, -1):
        at = folder.joinpath(*parts[:depth])
        if not at.is_dir():
            return None
        try:
            level = _level(at, "/" + "/".join(parts[:depth]), v1, swap_free)
        except (OSError, ValueError):
            return None
        if level is not None:
            found.append(level)
    return found


def _mount(path: str, v1: bool, proc: Path) -> tuple[str, str] | None:
    """Return where the memory hierarchy is mounted, and `path` relative to it."""
    try:
        lines = (proc / "self/mountinfo").read_bytes().decode(errors="surrogateescape").split("\n")
    except OSError:
        return None
    for line in lines:
        before, dash, after = line.partition(" - ")
        fields, words = before.split(), after.split()
        if not dash or len(fields) < 5 or len(words) < 3 or words[0] != ("cgroup" if v1 else "cgroup2"):
            continue
        if v1 and "memory" not in words[2].split(","):
            continue
        top = fields[3].rstrip("/")
        if path == top or path.startswith(top + "/"):
            return fields[4], path[len(top) :] or "/"
    return None


def _level(folder: Path, path: str, v1: bool, swap_free: int) -> Level | None:
    """Read one cgroup; None when it has no limit. Raises OSError and ValueError."""
    file = "memory.limit_in_bytes" if v1 else "memory.max"
    if not v1 and not (folder / file).exists():
        return None  # the root, or one without the memory controller
    limit = _number(folder / file)
    if not v1 and (folder / "memory.high").exists() and (high := _number(folder / "memory.high")) < limit:
        limit, file = high, "memory.high"
    if limit >= NO_LIMIT:
        return None
    usage = _number(folder / ("memory.usage_in_bytes" if v1 else "memory.current"))
    free = max(limit - usage, 0)
    counters = dict(re.findall(r"^(\w+) (\d+)$", _text(folder / "memory.stat"), re.MULTILINE))
    prefix = "total_" if v1 else ""  # v1's plain counters leave out the children
    anonymous = int(counters.get(f"{prefix}inactive_anon", 0)) + int(counters.get(f"{prefix}active_anon", 0))
    inactive, active = (int(counters.get(f"{prefix}{name}_file", 0)) for name in ("inactive", "active"))
    swap = _swap(folder, v1, usage)
    room, swapped = (min(swap[0], swap_free), swap[1]) if swap else (0, 0)
    left = min(free + inactive + min(anonymous, room) // 2, limit)
    # Who does not tell what may be swapped can swap, but is not relied on to.
    swaps = bool(room or swapped or (swap is None and swap_free))
    evictable = Evictable(free + inactive + active + anonymous, anonymous + swapped, swaps)
    level = Level(printable(path), file, limit, 0, evictable)
    return level._replace(left=max(left - level.reserve, 0))


def _swap(folder: Path, v1: bool, usage: int) -> tuple[int, int] | None:
    """Return how much may still go to swap and how much is there, in bytes; None when that is not told."""
    names = (
        ("memory.memsw.limit_in_bytes", "memory.memsw.usage_in_bytes")
        if v1
        else ("memory.swap.max", "memory.swap.current")
    )
    try:
        limit, used = (_number(folder / name) for name in names)
    except (OSError, ValueError):
        return None
    return max(limit - used, 0), max(used - usage, 0) if v1 else used


def _number(path: Path) -> int:
    text = _text(path).strip()
    return NO_LIMIT if text == "max" else int(text)


def _text(path: Path) -> str:
    with path.open("rb") as file:
        return file.read(procfs.MAX_FILE).decode("ascii", "replace")
