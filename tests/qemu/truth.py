"""The kernel's own figures about a process: what is locked, where, and whether it is resident."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

KIB = 1024
_HEAD = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ \S+ \d+ *(.*)$")
_FIELD = re.compile(r"^(\w+): +(\d+) kB$")


@dataclass(frozen=True)
class Range:
    """Addresses of a process: `start` belongs to it, `end` does not."""

    start: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.start

    def contains(self, other: Range) -> bool:
        return self.start <= other.start and other.end <= self.end


@dataclass(frozen=True)
class Mapping:
    """One entry of smaps; sizes in bytes."""

    range: Range
    permissions: str
    path: str
    rss: int
    swap: int
    locked: int
    huge: int
    flags: frozenset[str]


@dataclass(frozen=True)
class Locked:
    """What the kernel holds locked in a process, in bytes."""

    vm_lck: int  # of /proc/PID/status: the length of all locked mappings
    span: int  # the same by adding up smaps entries with the flag `lo`
    resident: int  # of these, what is in memory
    swap: int  # of these, what is in swap
    ranges: tuple[Range, ...]  # neighbours joined


def mappings(pid: int) -> Iterator[Mapping]:
    """The entries of /proc/PID/smaps."""
    head: re.Match[str] | None = None
    fields: dict[str, int] = {}
    for line in Path(f"/proc/{pid}/smaps").read_text(errors="replace").splitlines():
        if match := _FIELD.match(line):
            fields[match[1]] = int(match[2]) * KIB
        elif line.startswith("VmFlags:"):
            assert head is not None
            yield Mapping(
                range=Range(int(head[1], 16), int(head[2], 16)),
                permissions=head[3],
                path=head[4],
                rss=fields.get("Rss", 0),
                swap=fields.get("Swap", 0),
                locked=fields.get("Locked", 0),
                huge=fields.get("AnonHugePages", 0),
                flags=frozenset(line.split()[1:]),
            )
        elif match := _HEAD.match(line):
            head, fields = match, {}


def status(pid: int, field: str, task: int | None = None) -> str:
    """One field of /proc/PID/status, or of one thread's."""
    place = f"/proc/{pid}/task/{task}/status" if task else f"/proc/{pid}/status"
    for line in Path(place).read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return value.strip()
    raise KeyError(field)


def vm_lck(pid: int) -> int:
    return int(status(pid, "VmLck").removesuffix(" kB")) * KIB


def memlock_limit(pid: int) -> float:
    """RLIMIT_MEMLOCK of a process, in bytes; infinite when there is none."""
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines():
        if line.startswith("Max locked memory"):
            soft = line.split()[3]
            return float("inf") if soft == "unlimited" else int(soft)
    raise KeyError("Max locked memory")


def join(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same addresses in as few ranges as possible: locking splits mappings."""
    joined: list[Range] = []
    for item in sorted(ranges, key=lambda r: r.start):
        if joined and joined[-1].end == item.start:
            joined[-1] = Range(joined[-1].start, item.end)
        else:
            joined.append(item)
    return tuple(joined)


def locked(pid: int) -> Locked:
    """What the kernel holds locked now."""
    entries = [entry for entry in mappings(pid) if "lo" in entry.flags]
    return Locked(
        vm_lck=vm_lck(pid),
        span=sum(entry.range.size for entry in entries),
        resident=sum(entry.rss for entry in entries),
        swap=sum(entry.swap for entry in entries),
        ranges=join(entry.range for entry in entries),
    )


def threads(pid: int) -> dict[str, int]:
    """Names of a process's threads, each with one thread's id."""
    found = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        found[(task / "comm").read_text().strip()] = int(task.name)
    return found


def switches(pid: int, task: int) -> int:
    """How often a thread went to sleep and was woken."""
    return int(status(pid, "voluntary_ctxt_switches", task))


def environment(pid: int) -> dict[str, str]:
    """The environment that a process was started with."""
    data = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    return dict(item.split("=", 1) for item in data.split("\0") if "=" in item)
