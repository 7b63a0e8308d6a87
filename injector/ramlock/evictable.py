"""What must not be locked, so that those who share a limit still make progress; as in the shim's shim/cgroup.c."""
# SPDX-License-Identifier: GPL-2.0-or-later

from typing import NamedTuple

_CUSHION_PART = 2


class Evictable(NamedTuple):
    """What can be given up of an amount of memory, in bytes; the shim's shim/cgroup.c says the same."""

    room: int
    """What is free, page cache, and anonymous memory that is not locked."""
    wanted: int
    """Anonymous memory that is not locked, here or in swap."""
    swaps: bool

    def beyond_cushion(self, own: int = 0) -> int:
        """Return the bytes that may be locked so that what is left is at least half of what else is wanted.

        `own` of these are part of `wanted` now. With much less the kernel kills although swap is free.
        """
        return max(self.room - max(self.wanted - own, 0) // _CUSHION_PART, 0)
