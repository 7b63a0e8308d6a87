"""Where the shim's file is."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from collections.abc import Mapping
from pathlib import Path

from ramlock.errors import CannotPreload

PLACES = (
    Path(__file__).parent / "ramlock.so",
    Path("/usr/lib/ramlock/ramlock.so"),
    Path("/usr/local/lib/ramlock/ramlock.so"),
)
"""Where it is looked for: next to this file (a checkout after make, or a wheel), then where it is installed."""


def find(environ: Mapping[str, str], places: tuple[Path, ...] = PLACES) -> Path:
    """Return the shim's absolute path: RAMLOCK_SHIM, else the first of `places` that exists.

    Raises CannotPreload when there is none, or the loader could not be told its path.
    """
    if named := environ.get("RAMLOCK_SHIM"):
        path = Path(os.path.abspath(named))
        if not path.is_file():
            raise CannotPreload(f"RAMLOCK_SHIM names {path}, which is no file", "correct it, or unset RAMLOCK_SHIM")
    else:
        found = next((place for place in places if place.is_file()), None)
        if found is None:
            raise CannotPreload("the shim ramlock.so is not installed", "build it with make, or set RAMLOCK_SHIM")
        path = found
    # ld.so splits LD_PRELOAD at spaces and colons and expands $ORIGIN and the like; it knows no way to quote them.
    if bad := set(str(path)) & set(" :$\t\n"):
        shown = " and ".join(sorted(repr(char) for char in bad))
        raise CannotPreload(
            f"the shim's path {str(path)!r} contains {shown}, which LD_PRELOAD cannot hold",
            "put a copy of ramlock.so elsewhere and name it in RAMLOCK_SHIM",
        )
    if os.statvfs(path).f_flag & os.ST_NOEXEC:
        raise CannotPreload(
            f"the shim {path} is on a file system mounted noexec, from where no program loads it",
            "put a copy of ramlock.so elsewhere and name it in RAMLOCK_SHIM",
        )
    return path
