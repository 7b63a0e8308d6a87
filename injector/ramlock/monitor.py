"""The shim's commands in QEMU's own monitor: have them offered there, and tell whether they are."""
# SPDX-License-Identifier: GPL-2.0-or-later

import time

from ramlock import vms
from ramlock.deadline import Deadline
from ramlock.errors import CommandError, NoMonitor

BUSY_TIME = 2.0
"""Seconds that QEMU's main loop, where it happens, has for it."""
_POLL = 0.01


def offer(vm: vms.Vm, timeout: float = BUSY_TIME) -> bool:
    """Have QEMU's monitor offer the commands, also where the shim came without.

    Returns False when QEMU's main loop has not done it yet after `timeout` seconds; it will, as soon as the VM has been
    set up. Raises NoMonitor when that cannot be in this QEMU or with this shim; it works all the same, over its own
    socket.
    """
    try:
        vm.client.execute("ramlock-monitor", deadline=Deadline(vms.ANSWER_TIME))
    except CommandError as error:
        raise _reason(error) from None
    deadline = Deadline(timeout)
    while (state := _state(vm)) == "waiting" and not deadline.expired:
        time.sleep(_POLL)
    return state == "on"


def is_wanted(vm: vms.Vm) -> bool:
    """Tell whether the shim offers the commands there, or will."""
    return _state(vm) in ("on", "waiting")


def _state(vm: vms.Vm) -> str:
    try:
        answer = vm.client.execute("query-ramlock", deadline=Deadline(vms.ANSWER_TIME))
    except CommandError:  # an older shim
        return "off"
    return str(answer.get("monitor", "off")) if isinstance(answer, dict) else "off"


def _reason(error: CommandError) -> NoMonitor:
    if error.error_class == "CommandNotFound":
        return NoMonitor(
            "the shim in this VM is an older one, that knows nothing of QEMU's monitor",
            "the rest is done; replace the shim with ramlock inject --upgrade --monitor",
        )
    return NoMonitor(error.desc, "the rest is done; set and query the guarantee with ramlock, or over its socket")
