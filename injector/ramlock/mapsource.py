"""Guest RAM by its mappings alone: what the command line asks for, found again in /proc/PID/maps.

Theory of operation: QEMU maps each RAM block at a multiple of 2 MiB, exactly as long as the block, with a page that
nobody may touch after it (util/mmap-alloc.c). Memory files are known by their names. That a mapping looks so is
evidence and no proof, so the answer is certain only when each wanted block has exactly one mapping and no other looks
like guest RAM. Where several fit one block, none is taken.

What else the process maps may lie directly before a block, such as a thread's stack, and mlock() and madvise() split a
block: neighbours of one kind are joined, and a block begins at one of the seams or the first multiple of 2 MiB. That
a part of a larger block is taken for a wanted one cannot be: the wanted one is there as well, so two would fit.

Pure: mappings and the parsed command line in, blocks out.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ramlock.guestram import Block, Found, Malformed
from ramlock.memory import Mapping
from ramlock.qemuargs import Want, Wanted

ALIGN = 2 << 20
_GUARD_MOST = ALIGN
_PAGE = 4096
_ARENA = 64 << 20
_WORK_MOST = 500_000
"""Wanted blocks times mappings; a guest has some ten times some hundred."""
_SHARED_ANONYMOUS = "/dev/zero (deleted)"
_MEMFD = "/memfd:memory-backend-memfd (deleted)"

Sized = Callable[[Mapping], tuple[str, int]]
"""Tells backing and page size of a mapping."""


class Run(NamedTuple):
    """Neighbouring mappings of one kind."""

    first: Mapping
    starts: tuple[int, ...]
    """Where its mappings begin."""
    end: int
    guard: int
    """Bytes after it that nobody may touch; 0 where the next is something else."""

    @property
    def guarded(self) -> bool:
        """Whether it ends as a RAM block does: with a page that nobody may touch.

        What malloc() keeps for a thread begins at a multiple of 64 MiB, and the rest up to the next is untouchable.
        """
        arena = self.starts[0] % _ARENA == 0 and (self.end + self.guard) % _ARENA == 0 and self.guard > _PAGE
        return 0 < self.guard < _GUARD_MOST and not arena

    stack: bool
    """Whether such a page comes before it, as before a thread's stack."""

    def may_begin(self, start: int) -> bool:
        """Whether a RAM block could begin there: QEMU's part of the run has no address before the first multiple."""
        return start in self.starts or start == self.first_multiple

    @property
    def first_multiple(self) -> int:
        """The first multiple of 2 MiB in it."""
        return -(-self.starts[0] // ALIGN) * ALIGN

    @property
    def longest(self) -> int:
        """How long an anonymous RAM block in it can be, in bytes; 0 when there is none."""
        starts = self.starts[1:] if self.stack else (self.first_multiple, *self.starts)
        return max((self.end - start for start in starts if start % ALIGN == 0), default=0)


def runs(maps: Sequence[Mapping]) -> list[Run]:
    """Join neighbours that can be written, and not executed, and are of one file at following places in it."""
    result: list[Run] = []
    last: Mapping | None = None
    starts: list[int] = []
    first: Mapping | None = None
    before: Mapping | None = None
    stack = False

    def close(following: Mapping | None) -> None:
        if first is None or last is None:
            return
        guard = 0
        if following is not None and following.start == last.end and _untouchable(following):
            guard = following.end - following.start
        result.append(Run(first, tuple(starts), last.end, guard, stack))

    for mapping in maps:
        if last is not None and first is not None and _continues(last, mapping):
            starts.append(mapping.start)
            last = before = mapping
            continue
        close(mapping)
        if mapping.writable and mapping.readable and not mapping.executable:
            first, last, starts = mapping, mapping, [mapping.start]
            stack = before is not None and before.end == mapping.start and _untouchable(before)
        else:
            first = last = None
        before = mapping
    close(None)
    return result


def locate(wanted: Wanted, maps: Sequence[Mapping], sized: Sized, huge_page: int) -> Found:
    """Find the wanted blocks; `huge_page` is the host's usual one. Raises Malformed when not one is found."""
    doubts = list(wanted.doubts)
    found: list[Block] = []
    taken: set[int] = set()
    all_runs = runs(maps)
    if (len(wanted.blocks) + len(wanted.spare)) * len(all_runs) > _WORK_MOST:
        raise Malformed("too much is asked for and mapped")
    wants: dict[Want, list[str]] = {}
    for want in wanted.blocks:
        wants.setdefault(_alike(want), []).append(want.id)
    for want, ids in wants.items():
        count = len(ids)
        fitting = _fitting(want, ids, all_runs)
        if len(fitting) != count:
            how = f"{len(fitting)} mappings look like it" if fitting else "no mapping looks like it"
            doubts.append(f"{', '.join(ids[:4])} ({want.size >> 20} MiB): {how}")
            if len(fitting) > count:
                taken.update(run.end for run, _ in fitting)
                continue
        # Which of equal blocks is which cannot be told; mmap() mostly goes downwards.
        for name, (run, start) in zip(ids, reversed(fitting), strict=False):
            taken.add(run.end)
            backing, page_size = ("hugetlb", want.huge or huge_page) if want.huge is not None else sized(run.first)
            found.append(Block(name, start, want.size, page_size, backing, want.virtio_mem))
    found.sort(key=lambda block: block.host)
    if any(one.end > other.host for one, other in itertools.pairwise(found)):
        raise Malformed("its blocks overlap")
    left = [run for run in all_runs if run.end not in taken and _left_over(run, wanted)]
    if left:
        doubts.append(f"{len(left)} more mappings look like guest RAM, the first before {left[0].end:#x}")
    if not found:
        raise Malformed(doubts[0] if doubts else "the command line asks for no memory")
    doubts = list(dict.fromkeys(doubts))
    return Found("maps", not doubts, found, tuple(doubts[:4]))


def _alike(want: Want) -> Want:
    """What a block is found by: files have the block's name, other memory has none."""
    return want if want.kind == "file" else want._replace(id="")


def _continues(last: Mapping, mapping: Mapping) -> bool:
    if last.end != mapping.start or not mapping.writable or not mapping.readable or mapping.executable:
        return False
    if (last.shared, last.device, last.inode, last.path) != (
        mapping.shared,
        mapping.device,
        mapping.inode,
        mapping.path,
    ):
        return False
    return _anonymous(last) or last.offset + (last.end - last.start) == mapping.offset


def _untouchable(mapping: Mapping) -> bool:
    return not (mapping.readable or mapping.writable or mapping.executable)


def _anonymous(mapping: Mapping) -> bool:
    return not mapping.shared and mapping.inode == 0 and (not mapping.path or mapping.path.startswith("[anon"))


def _fitting(want: Want, ids: Sequence[str], all_runs: list[Run]) -> list[tuple[Run, int]]:
    """The runs that this block could be, each with where it would begin, in order of address."""
    result = []
    for run in all_runs:
        start = run.end - want.size
        if not run.may_begin(start) or run.first.shared != want.shared:
            continue
        mapping = run.first
        if want.kind == "anonymous" and not want.shared:
            fits = _anonymous(mapping) and run.guarded and start % ALIGN == 0
        elif want.kind == "anonymous":
            # Since 10.0 shared memory is a memory file too.
            named = mapping.path == _SHARED_ANONYMOUS or mapping.path.startswith("/memfd:")
            fits = named and mapping.path != _MEMFD and run.guarded and start % ALIGN == 0
        elif want.kind == "memfd":
            fits = mapping.path == _MEMFD and start == mapping.start
        else:
            fits = start == mapping.start and _is_file(want, ids, mapping.path)
        if fits:
            result.append((run, start))
    return result


def _is_file(want: Want, ids: Sequence[str], path: str) -> bool:
    path = path.removesuffix(" (deleted)")
    if path == want.path:
        return True
    # In a folder QEMU makes a file of its own, named after the block.
    made = [f"{want.path.rstrip('/')}/qemu_back_mem.{name.replace('/', '_')}." for name in ids]
    made += [f"{want.path.rstrip('/')}/qemu_back_mem._objects_{name}." for name in ids]
    return path.startswith(tuple(made))


def _left_over(run: Run, wanted: Wanted) -> bool:
    """Whether a run looks like guest RAM, and is not of a size that devices' own memory has, or a spare backend."""
    return run.guarded and run.longest > wanted.video and not _fits_spare(run, wanted)


def _fits_spare(run: Run, wanted: Wanted) -> bool:
    return any(_fitting(want, [want.id], [run]) for want in wanted.spare)
