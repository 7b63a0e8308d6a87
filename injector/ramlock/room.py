"""Does a guarantee fit? Decided before it is set, from the kernel's figures alone: replies of a VM may lie.

It never refuses what would fit: what is not known is left to the shim, which asks before every step, and the
reckoning of what is resident already errs on the large side.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import pwd
import re
from pathlib import Path
from typing import NamedTuple

from ramlock import cgroups, host, memory, procfs
from ramlock.errors import TooMuch
from ramlock.evictable import Evictable
from ramlock.sizes import MIB, format_apart, format_size
from ramlock.text import printable

_TABLE_MOST = 20
_MAPS_MOST, _FILES_MOST = 32 << 20, 1024
"""Bytes of mappings, and shared files, that a process may have before it is left to the shim."""
_FORCE = "or try anyway with --force: it stops short of the limit"


class Ask(NamedTuple):
    """What is asked for one VM; sizes in bytes."""

    want: int
    """The guarantee."""
    reserve: int | None
    """What the host keeps; None or 0: the default."""
    held: int = 0
    """What of it is locked already."""
    hugetlb: int = 0
    """Guest RAM on huge pages, which are set aside already."""
    file_backed: int = 0
    """Guest RAM in files on disks: how much of it is in memory is not known from outside."""


class Holder(NamedTuple):
    """A QEMU that has locked memory."""

    pid: int
    name: str
    uid: int
    locked: int
    """Bytes, as the kernel counts them (VmLck)."""


def holders(proc: Path = procfs.PROC) -> list[Holder]:
    """Return every QEMU on this host with the bytes that it has locked, as far as we may see it; the largest first."""
    found = [
        Holder(process.pid, printable(process.name or "-", 40), process.uids[1], process.locked)
        for process in procfs.qemus(proc)
    ]
    return sorted(found, key=lambda holder: (-holder.locked, holder.pid))


def check_sum(pid: int, ask: Ask, proc: Path = procfs.PROC) -> TooMuch | None:
    """Hold what all VMs of this host have locked, and what `pid` is to have, against its memory."""
    facts = host.memory(proc)
    if facts is None:
        return None
    limit = facts.total - facts.hugetlb - host.reserve(facts.total, ask.reserve)
    everyone = holders(proc)
    others = sum(holder.locked for holder in everyone if holder.pid != pid)
    want = max(ask.want - ask.hugetlb, 0)
    if others + want <= limit:
        return None
    if others:
        what = f"{format_size(want)} for this VM and {format_size(others)} that other VMs have locked are"
    else:
        what = f"{format_size(want)} is"
    return TooMuch(
        f"{what} more than the {format_size(max(limit, 0))} of this host that can be guaranteed "
        f"(memory {format_size(facts.total)}, less what is kept for the host)",
        f"lower another VM's guarantee, ask for less, {_FORCE}",
        never=True,
        details=_table(everyone, pid, want),
    )


def check(pid: int, ask: Ask, proc: Path = procfs.PROC, root: Path = Path("/")) -> TooMuch | None:
    """Hold what has to be allocated and locked for `ask` against what the host and the cgroups of `pid` leave.

    Returns what is in the way, or None when it fits or cannot be told.
    """
    facts = host.memory(proc)
    there = _resident(pid, proc)
    if facts is None or there is None:
        return None
    resident, swapped = there
    need = max(ask.want - ask.hugetlb - ask.file_backed - resident, 0)
    more = max(ask.want - ask.hugetlb - ask.file_backed - ask.held, 0)
    own = min(more, resident + swapped)
    reserve = host.reserve(facts.total, ask.reserve)
    asked = f"{format_size(need)} are asked beyond what is in memory already"
    for level in cgroups.levels(pid, facts.swap_free, proc, root) or []:
        size, limit = format_apart(ask.want, level.limit)
        where = f"the memory cgroup {level.path} with its limit of {limit}"
        hint = f"raise {level.file} of {level.path}, ask for less, {_FORCE}"
        if need > level.left:
            return TooMuch(
                f"{size} does not fit: {where} leaves {format_size(level.left)} beyond a reserve of "
                f"{format_size(level.reserve)}; {asked}",
                hint,
                never=need > level.limit - level.reserve,
            )
        if error := _check_cushion(size, level.evictable, level.reserve, more, own, where):
            return TooMuch(error, hint, never=False)
    free = max(facts.available - reserve, 0)
    hint = f"free memory on the host, ask for less, {_FORCE}"
    if need > free:
        return TooMuch(
            f"{format_size(ask.want)} does not fit: the host has {format_size(free)} available beyond a reserve of "
            f"{format_size(reserve)}; {asked}",
            hint,
            never=need > facts.total - facts.hugetlb - reserve,
        )
    if error := _check_cushion(format_size(ask.want), facts.evictable, reserve, more, own, "the host"):
        return TooMuch(error, hint, never=False)
    return None


def _check_cushion(size: str, evictable: Evictable, reserve: int, more: int, own: int, where: str) -> str | None:
    """Hold what would be locked besides (`more`, of which `own` is in memory or swap now) against what others need.

    Returns what is in the way. Where nothing can be swapped out, locked or not is the same to others.
    """
    if not evictable.swaps or more <= min(evictable.beyond_cushion(own), max(evictable.room - reserve, 0)):
        return None
    return (
        f"{size} does not fit: of {where}, {format_size(max(evictable.room - more, 0))} would be left unlocked for "
        f"{format_size(max(evictable.wanted - own, 0))} that are used besides, here or in swap; kept are at least half "
        f"of that, and {format_size(reserve)}"
    )


def _resident(pid: int, proc: Path) -> tuple[int, int] | None:
    """Return bytes of `pid` in memory, and in swap, that guest RAM may be part of, rather too many; None when unknown.

    Not from smaps, which walks all of its page tables under mmap_lock: that could stall the VM.
    """
    try:
        status = (proc / str(pid) / "status").read_text(errors="replace")
        rss = {
            name: int(kib) * 1024 for name, kib in re.findall(r"^(Rss\w+|VmSwap):\s*(\d+) kB$", status, re.MULTILINE)
        }
        with (proc / str(pid) / "maps").open("rb") as file:
            text = file.read(_MAPS_MOST + 1)
        maps = memory.parse_maps(text) if len(text) <= _MAPS_MOST else []
    except (OSError, ValueError):
        return None
    if "RssAnon" not in rss or not maps:
        return None
    # Pages of a shared file can be in memory without being mapped here.
    shared = {
        (mapping.device, mapping.inode): f"{mapping.start:x}-{mapping.end:x}"
        for mapping in maps
        if mapping.shared and mapping.inode and mapping.end - mapping.start >= MIB and mapping.path.startswith("/")
    }
    if len(shared) > _FILES_MOST:
        return None
    files: dict[tuple[int, int], int] = {}
    for name in shared.values():
        try:
            stat = os.stat(proc / str(pid) / "map_files" / name)
        except OSError:
            return None
        files[stat.st_dev, stat.st_ino] = stat.st_blocks * 512
    resident = rss["RssAnon"] + rss.get("RssFile", 0) + max(rss.get("RssShmem", 0), sum(files.values()))
    return resident, rss.get("VmSwap", 0)


def _table(everyone: list[Holder], pid: int, want: int) -> tuple[str, ...]:
    rows = [("pid", "VM", "user", "locked")]
    for holder in everyone[:_TABLE_MOST]:
        now = format_size(holder.locked) + (f", asked: {format_size(want)}" if holder.pid == pid else "")
        rows.append((str(holder.pid), holder.name, _user(holder.uid), now))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [f"  {row[0]:>{widths[0]}}  {row[1]:<{widths[1]}}  {row[2]:<{widths[2]}}  {row[3]}" for row in rows]
    more = len(everyone) - _TABLE_MOST
    return (*lines, f"  and {more} more") if more > 0 else tuple(lines)


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)
