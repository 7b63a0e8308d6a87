"""Make stdin, stdout and stderr usable, whatever the caller has made of them."""
# SPDX-License-Identifier: GPL-2.0-or-later

import io
import os
import sys


def settle() -> None:
    """Give closed standard streams a place to go, and let no character that stdout cannot say stop a command."""
    _plug()
    if sys.stdout is None:
        sys.stdout = _nowhere()
    if sys.stderr is None:
        sys.stderr = _nowhere()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


def _plug() -> None:
    """Open /dev/null on those of the descriptors 0 to 2 that are closed, and leave it there for QEMU.

    Otherwise the next file that is opened, our socket or QEMU's disk image, would get such a number, and be written to
    by whoever prints a message. So QEMU is better off with /dev/null than with the closed descriptor that we got.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            # The lowest free number is this one, as those below it are taken by now.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def _nowhere() -> io.TextIOWrapper:
    # A descriptor of its own, closed on exec: 1 or 2 may have become another file's before we came to plug them.
    return open(os.devnull, "w", encoding="utf-8")
