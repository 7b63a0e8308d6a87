"""Take the shim out of a VM that runs."""
# SPDX-License-Identifier: GPL-2.0-or-later

import time
from pathlib import Path

from ramlock import place, procfs, vms
from ramlock.deadline import Deadline
from ramlock.errors import NoAnswer

GOING_TIME = 30.0
"""Seconds that a shim may take to unlock everything and leave."""
_THREADS = ("ramlock-ctl", "ramlock-lock")
_POLL = 0.005


def serves(pid: int, proc: Path = procfs.PROC) -> bool:
    """Tell whether a shim has threads in `pid`."""
    return any(name in _THREADS for name in procfs.threads(pid, proc))


def eject(vm: vms.Vm, timeout: float = GOING_TIME) -> None:
    """Have the shim unlock everything and leave, and wait until it has. The object stays mapped.

    Raises NoAnswer when it is still there after `timeout` seconds.
    """
    vm.client.execute("ramlock-eject", deadline=Deadline(vms.ANSWER_TIME))
    if vm.pid is not None:
        process = procfs.read(vm.pid)
        wait_gone(vm.pid, timeout)
        place.remove(process)


def wait_gone(pid: int, timeout: float) -> None:
    """Wait until no thread of a shim is left. Raises NoAnswer."""
    deadline = Deadline(timeout)
    while serves(pid):
        if deadline.expired:
            raise NoAnswer(
                f"the shim in process {pid} is still there after {timeout:g} s", "see what it does with ramlock status"
            )
        time.sleep(_POLL)
