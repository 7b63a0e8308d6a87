"""What is done around setting a guarantee: does it fit, and what must the shim be told that it cannot see?"""
# SPDX-License-Identifier: GPL-2.0-or-later

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ramlock import cgroups, host, procfs, room
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import CommandError
from ramlock.guarantee import ANSWER_TIME, Wish
from ramlock.reply import Guarantee

FOLLOWED, LEFT_ALONE = 10, 30
"""Seconds for which the shim may believe what it is told: as long as we go on telling, and when we do not."""
_EVERY = 3.0


class Gate:
    """Decides on one guarantee of one VM, and keeps its shim informed while it is worked for."""

    def __init__(
        self,
        pid: int | None,
        wish: Wish,
        *,
        force: bool = False,
        patient: bool = False,
        followed: bool = True,
        warn: Callable[[str], None] = lambda text: None,
        proc: Path = procfs.PROC,
        root: Path = Path("/"),
    ) -> None:
        """`pid` is QEMU's, None when it is out of our sight.

        With `patient` what does not fit now, but could, is only warned about; with `force` nothing is refused.
        """
        self._pid, self._wish, self._force, self._patient, self._warn = pid, wish, force, patient, warn
        self._valid = FOLLOWED if followed else LEFT_ALONE
        self._proc, self._root = proc, root
        self._blind = self._hidden = False
        self._told = float("-inf")

    def check(self, now: Guarantee) -> None:
        """Say before anything is changed whether the wish fits beside what is held `now`. Raises TooMuch."""
        if self._pid is not None:
            self._blind, self._hidden = not now.cgroups_seen, procfs.hides_cgroups(self._pid, self._proc)
        want = self._wish.size.resolve(now.ram)
        if self._force or self._pid is None or want <= now.held or want > now.ram:
            return  # a size above guest RAM is the shim's to refuse
        reserve = now.host_reserve if self._wish.host_reserve is None else self._wish.host_reserve
        ask = room.Ask(
            want,
            reserve,
            held=now.held,
            hugetlb=sum(block.size for block in now.blocks if block.backing == "hugetlb"),
            file_backed=sum(block.size for block in now.blocks if block.backing == "file"),
        )
        if error := room.check_sum(self._pid, ask, self._proc):
            raise error
        if error := room.check(self._pid, ask, self._proc, self._root):
            if error.never or not self._patient:
                raise error
            self._warn(f"{error.message}; waiting for room")

    def inform(self, client: Client) -> None:
        """Tell the shim what its cgroups leave, if it cannot see all of them; now and then.

        Raises ControlError when the session breaks.
        """
        if self._pid is None or not (self._blind or self._hidden) or time.monotonic() < self._told + _EVERY:
            return
        self._told = time.monotonic()
        facts = host.memory(self._proc)
        known = cgroups.levels(self._pid, facts.swap_free if facts else 0, self._proc, self._root)
        if known is None or not (known or self._blind):
            return  # a shim that was told once has to be told always; where there is no limit it need not be
        level = cgroups.tightest(known)
        left = cgroups.NO_LIMIT if level is None else level.allowed
        with suppress(CommandError):  # a shim that does not know this does without
            client.execute(
                "set-headroom-limits", {"cgroup-left": left, "valid-s": self._valid}, deadline=Deadline(ANSWER_TIME)
            )
