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

ORDER = Path("/sys/module/page_reporting/parameters/page_reporting_order")
MAX_ORDER = 10
PAGE, HUGE_PAGE = 4096, 2 << 20
MADV_POPULATE_WRITE = 23  # Linux 5.14
SPARED = 1 << 30  # bytes that others may need while nearly all is taken
FRAME = (1 << 55) - 1  # of an entry of /proc/PID/pagemap: where the page is


def _lowest_of_each_block(memory: mmap.mmap) -> list[int]:
    """Of the pages that are mapped there: the lowest in each block of physical memory."""
    window = ctypes.c_char.from_buffer(memory)
    entries = array("Q")
    with Path("/proc/self/pagemap").open("rb") as file:
        file.seek(ctypes.addressof(window) // PAGE * entries.itemsize)
        entries.frombytes(file.read(len(memory) // PAGE * entries.itemsize))
    del window
    lowest: dict[int, tuple[int, int]] = {}  # of a block: frame and page
    for page, entry in enumerate(entries):
        frame = entry & FRAME
        if frame < lowest.get(frame >> MAX_ORDER, (FRAME + 1, 0))[0]:
            lowest[frame >> MAX_ORDER] = frame, page
    return sorted(page for _, page in lowest.values())


def _available() -> int:
    """Bytes that can be had."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024


@contextmanager
def kept() -> Iterator[None]:
    """Nothing that lies free is given to the hypervisor meanwhile; the setting is put back afterwards."""
    if not ORDER.exists():
        yield
        return
    former = ORDER.read_text()
    with mmap.mmap(-1, (_available() - SPARED) // PAGE * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for at in range(0, len(memory), HUGE_PAGE):
            memory[at]  # its page table, which is allocated first lest it lie between the pages and keep some, too
        memory.madvise(MADV_POPULATE_WRITE)
        ORDER.write_text(str(MAX_ORDER))
        try:
            begin = 0
            for page in [*_lowest_of_each_block(memory), len(memory) // PAGE]:
                if page > begin:
                    memory.madvise(mmap.MADV_DONTNEED, begin * PAGE, (page - begin) * PAGE)
                begin = page + 1
            yield
        finally:
            ORDER.write_text(former)
