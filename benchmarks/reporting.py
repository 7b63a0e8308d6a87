"""Keeps the memory of this machine its own while something is measured.

A virtual machine's kernel may tell its hypervisor which memory lies free (free page reporting): that memory is taken
away, and comes back, a page fault of the hypervisor's for each page, when it is used again. Whatever allocates it then
takes several times as long, and all of the machine stands still for tens of milliseconds now and then, whichever way
memory is locked. Linux reports free blocks of one size and larger only (page_reporting.page_reporting_order, Linux
5.14). So that size is set to the largest there is, and a page of each such block is kept: half of a block, a huge page,
is never reported.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import ctypes
import mmap
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ramlock import host

ORDER = Path("/sys/module/page_reporting/parameters/page_reporting_order")
MAX_ORDER = 10
PAGE, HUGE_PAGE = 4096, 2 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14
SPARED = 1 << 30  # bytes that others may need while nearly all is taken
PRESENT, FRAME = 1 << 63, (1 << 55) - 1  # of an entry of /proc/PID/pagemap


def _lowest_of_each_block(memory: mmap.mmap) -> list[int]:
    """Of the pages that are mapped there: the lowest in each block of physical memory."""
    window = ctypes.c_char.from_buffer(memory)
    start = ctypes.addressof(window)
    del window  # or the memory could not be given back
    entries = array("Q")
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(start // PAGE * entries.itemsize)
        entries.frombytes(file.read(len(memory) // PAGE * entries.itemsize))
    lowest: dict[int, tuple[int, int]] = {}  # of a block: frame and page
    for page, entry in enumerate(entries):
        frame = entry & FRAME
        if entry & PRESENT and frame < lowest.get(frame >> MAX_ORDER, (FRAME + 1, 0))[0]:
            lowest[frame >> MAX_ORDER] = frame, page
    return sorted(page for _, page in lowest.values())


@contextmanager
def setting(path: Path, value: str) -> Iterator[None]:
    """A setting of the host's or of this process's, put back afterwards."""
    former = path.read_text().strip()
    # "always [madvise] never": the one in brackets is set.
    former = former.split("[")[1].split("]")[0] if "[" in former else former
    path.write_text(value)
    try:
        yield
    finally:
        path.write_text(former)


def _keep_one_of_each_block(memory: mmap.mmap) -> None:
    """Fills the memory and gives back all of it but a page of each block."""
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    with setting(Path("/proc/self/oom_score_adj"), "1000"):  # it is this process that is killed if memory runs out
        for at in range(0, len(memory), HUGE_PAGE):
            memory[at]  # its page table, which is allocated first lest it lie between the pages and keep some, too
        memory.madvise(MADV_POPULATE_WRITE)
        pages = [*_lowest_of_each_block(memory), len(memory) // PAGE]
        ORDER.write_text(str(MAX_ORDER))  # nothing was given back before, and this process may have been killed
        begin = 0
        for page in pages:
            if page > begin:
                memory.madvise(mmap.MADV_DONTNEED, begin * PAGE, (page - begin) * PAGE)
            begin = page + 1


@contextmanager
def kept() -> Iterator[None]:
    """Nothing that lies free is given to the hypervisor meanwhile; the setting is put back afterwards.

    Does nothing where nothing is reported: no such device, or the largest blocks only.
    """
    former = int(ORDER.read_text()) if ORDER.exists() else MAX_ORDER
    facts = host.memory()
    size = ((facts.available if facts else 0) - SPARED) // HUGE_PAGE * HUGE_PAGE
    if not 0 <= former < MAX_ORDER or size <= 0:
        yield
        return
    with mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        try:
            _keep_one_of_each_block(memory)
            yield
        finally:
            ORDER.write_text(str(former))
