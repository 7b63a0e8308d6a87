"""What a shim has handed over, kept in a file until another one has adopted it.

An upgrade is two steps: the former shim leaves with everything locked, the new one takes over its books. If we die in
between, the next one who comes finds the books here.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from ramlock import procfs
from ramlock.errors import Refused
from ramlock.place import RUN

_MOST = 1 << 20


class Room:
    """Room for a file, taken before there is anything to keep: then keeping it cannot fail any more."""

    def __init__(self, process: procfs.Process, run: Path = RUN) -> None:
        """Take it. Raises Refused when that cannot be."""
        self._process = process
        self._path = _path(process, run)
        self._draft = run / f".{process.pid}.books"
        try:
            run.mkdir(mode=0o755, exist_ok=True)
            self._draft.unlink(missing_ok=True)
            self._fd = os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _no_room(run, error) from None
        try:
            os.posix_fallocate(self._fd, 0, _MOST)
        except OSError as error:
            self.close()
            raise _no_room(run, error) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fill(self, handed: dict[str, Any]) -> None:
        """Keep it, in place of what was kept before. Raises OSError."""
        data = json.dumps({"start-time": self._process.start_time, "handed": handed}).encode("ascii")
        if os.pwrite(self._fd, data, 0) != len(data):
            raise OSError(errno.EIO, "a short write")
        os.ftruncate(self._fd, len(data))
        os.rename(self._draft, self._path)

    def close(self) -> None:
        """Give the room back, unless it was filled."""
        os.close(self._fd)
        with suppress(OSError):
            self._draft.unlink(missing_ok=True)


def _no_room(run: Path, error: OSError) -> Refused:
    return Refused(
        f"what is locked cannot be written down in {run} for the time of the upgrade: {error.strerror}",
        "nothing was changed; run ramlock as root, or take the shim out with ramlock eject and inject again",
    )


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
