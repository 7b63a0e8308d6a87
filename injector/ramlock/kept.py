"""What a shim has handed over, kept in a file until another one has adopted it.

An upgrade is two steps: the former shim leaves with everything locked, the new one takes over its books. If we die in
between, the next one who comes finds the books here.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from ramlock import procfs
from ramlock.place import RUN

_MOST = 1 << 20


def write(process: procfs.Process, handed: dict[str, Any], run: Path = RUN) -> None:
    """Keep it. Where there is no such folder, or it is not ours, nothing is kept."""
    data = json.dumps({"start-time": process.start_time, "handed": handed}).encode("ascii")
    with suppress(OSError):
        fd = os.open(_path(process, run), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with open(fd, "wb") as file:
            file.write(data)


def read(process: procfs.Process, run: Path = RUN) -> dict[str, Any] | None:
    """Return what was kept of this very process, not of one that had its pid before; None when there is nothing."""
    try:
        fd = os.open(_path(process, run), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        with open(fd, "rb") as file:
            if os.fstat(fd).st_uid != os.geteuid():
                return None
            kept = json.loads(file.read(_MOST))
        handed = kept["handed"] if kept["start-time"] == process.start_time else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
    return handed if isinstance(handed, dict) else None


def remove(process: procfs.Process, run: Path = RUN) -> None:
    """Forget it."""
    with suppress(OSError):
        os.unlink(_path(process, run))


def _path(process: procfs.Process, run: Path) -> Path:
    return run / f"{process.pid}.books"
