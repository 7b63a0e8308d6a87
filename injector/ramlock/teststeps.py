"""The places of an injection where a test may kill or stop the controller, to prove that the VM survives it there."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import signal

STEPS = (
    "hand-over",
    "begin",
    "ptrace-seize",
    "ptrace-interrupt",
    "ptrace-getregs",
    "ptrace-getregset",
    "write-code",
    "write-code-done",
    "write-frame",
    "write-frame-done",
    "ptrace-setregs",
    "ptrace-setregs-done",
    "ptrace-detach",
    "ptrace-detach-done",
    "fill-memfd",
    "fill-memfd-done",
    "wait-socket",
    "compare",
    "adopt",
    "set-limit",
    "set-guarantee",
    "end",
)
"""In the order in which an injection passes them."""

_KILL_AT = os.environ.get("RAMLOCK_TEST_KILL_AT")
_STOP_AT = os.environ.get("RAMLOCK_TEST_STOP_AT")
_CTRL_Z_AT = os.environ.get("RAMLOCK_TEST_CTRL_Z_AT")


def step(name: str) -> None:
    """Pass the place `name`: where RAMLOCK_TEST_KILL_AT says so, die as by kill -9; where ..._STOP_AT does, stop.

    At ..._CTRL_Z_AT a terminal asks for a stop.
    """
    if name == _KILL_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    if name == _STOP_AT:
        os.kill(os.getpid(), signal.SIGSTOP)
    if name == _CTRL_Z_AT:
        os.kill(os.getpid(), signal.SIGTSTP)
