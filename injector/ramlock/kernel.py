"""What this kernel can do, found out by asking it: a distribution's version number says little of what is in it.

Nothing is changed: every question is about nothing at all, or about ourselves.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import errno
import fcntl
import os
from pathlib import Path
from typing import NamedTuple

from ramlock import inside
from ramlock.errors import RamlockError

_SYS_MLOCK2 = 325  # on x86_64, the only architecture that the shim works on
_MADV_POPULATE_WRITE = 23
_PAGEMAP_SCAN = 0xC0606610
_PM_SCAN_ARG = bytes(96)  # of size 0, which the kernel refuses, if it knows what is asked


class Features(NamedTuple):
    """What ramlock uses where it is there."""

    mlock2: bool
    """Linux 4.4. Nothing is locked without."""
    pidfd: bool
    """Linux 5.3. The controller needs it, to be sure whom it talks to."""
    openat2: bool
    """Linux 5.6. The controller needs it for VMs that see other files than we do."""
    populate_write: bool
    """MADV_POPULATE_WRITE, Linux 5.14."""
    pagemap_scan: bool
    """Linux 6.7."""


def features() -> Features:
    """Ask the kernel that we run on."""
    return Features(_mlock2(), _pidfd(), _openat2(), _populate_write(), _pagemap_scan())


def _mlock2() -> bool:
    return _libc_error("syscall", _SYS_MLOCK2, 0, 0, 0) != errno.ENOSYS


def _populate_write() -> bool:
    return _libc_error("madvise", 0, 0, _MADV_POPULATE_WRITE) == 0


def _libc_error(name: str, *numbers: int) -> int:
    """Call a function of libc and return its errno, 0 when it succeeded."""
    import ctypes  # costs milliseconds

    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(number) for number in numbers]
    return ctypes.get_errno() if getattr(libc, name)(*words) < 0 else 0


def _pidfd() -> bool:
    try:
        os.close(os.pidfd_open(os.getpid()))
    except OSError:
        return False
    return True


def _openat2() -> bool:
    try:
        root = inside.open_root(os.getpid())
        try:
            os.close(inside.open_path(root, "."))
        finally:
            os.close(root)
    except (OSError, RamlockError):
        return False
    return True


def _pagemap_scan() -> bool:
    try:
        with Path("/proc/self/pagemap").open("rb") as file:
            fcntl.ioctl(file, _PAGEMAP_SCAN, _PM_SCAN_ARG)
    except OSError as error:
        return error.errno not in (errno.ENOTTY, errno.EACCES, errno.EPERM, errno.ENOENT)
    return True
