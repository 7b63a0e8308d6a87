"""Put the shim into a QEMU that runs already: a detour of its main thread (detour.py) that loads and starts it."""
# SPDX-License-Identifier: GPL-2.0-or-later

from collections.abc import Callable
from pathlib import Path

from ramlock import detour, loaded, procfs, x86_64
from ramlock.memory import Memory, Object
from ramlock.teststeps import step
from ramlock.tracee import Registers

Injection = detour.Detour
"""What it took."""


def inject(
    pid: int,
    shim: Path,
    path: bytes,
    config: bytes,
    timeout: float,
    pin: procfs.Pin | None = None,
    committed: Callable[[], None] = lambda: None,
) -> Injection:
    """Load the shim from `path` (as the target sees it) into `pid` and start it with `config`.

    Waits until the main thread is parked, at most `timeout` seconds. When this returns, the thread is on its way
    through the trampoline. Raises NeverParked, CannotInject, AlreadyTraced, NoPermission, NotFound or VmGone; then
    nothing was altered. `pin` is the process that is meant; `committed` is called when the thread is on its way.
    """
    code = detour.load_code(shim)

    def build(target: detour.Target, regs: Registers, xstate_size: int) -> x86_64.Frame:
        return x86_64.bootstrap(regs, target.entries, path, config, xstate_size)

    step("begin")
    with Memory(pid, write=True) as memory:
        if pin is not None:
            pin.check()
        program = Object(memory, loaded.executable(memory, memory.maps()).start)
        return detour.send(memory, program, code, code.trampoline, build, timeout, committed)
