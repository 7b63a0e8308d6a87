"""Which VM is meant (--pid, --vm or --socket), and a session with the shim in it."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ramlock import endpoint, procfs
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import Disconnected, NoAnswer, NoPermission, NotFound, Refused, UsageError, VmGone
from ramlock.text import printable

ANSWER_TIME = 10.0
"""Seconds that a shim has to answer; its control thread does nothing that takes long."""
_RETRY = 0.05
_EXIT_TIME = 2.0
_SILENT_MOST = 5


@dataclass(frozen=True, slots=True)
class Selector:
    """The user's word for one VM: exactly one of the three."""

    pid: int | None = None
    name: str | None = None
    socket: Path | None = None

    def __post_init__(self) -> None:
        """Raise UsageError unless exactly one is given."""
        if [self.pid, self.name, self.socket].count(None) != 2:
            raise UsageError("which VM is meant?", "give exactly one of --pid PID, --vm NAME and --socket PATH")


class Vm(NamedTuple):
    """A VM and a session with its shim."""

    client: Client
    pid: int | None
    """None when its process is out of our sight (another pid namespace)."""
    name: str | None
    pin: procfs.Pin | None
    uuid: str | None = None

    @property
    def label(self) -> str:
        """What messages call it."""
        where = f"pid {self.pid}" if self.pid else self.client.where
        return f"{printable(self.name, 80)} ({where})" if self.name else f"VM ({where})"

    def close(self) -> None:
        """End the session."""
        self.client.close()
        if self.pin is not None:
            self.pin.close()


def find(which: int | str, proc: Path = procfs.PROC) -> procfs.Process:
    """Return the process of this pid, or the only QEMU whose -name, or else -uuid, is this.

    Raises NotFound when there is none, Refused when there are several.
    """
    return procfs.read(which, proc) if isinstance(which, int) else _by_name(which, proc)


def _by_name(name: str, proc: Path) -> procfs.Process:
    everyone = procfs.qemus(proc)
    found = [process for process in everyone if process.name == name]
    found = found or [process for process in everyone if process.uuid == name.lower()]
    if not found:
        silent = [process.pid for process in everyone if not process.cmdline]
        but = f"; of {', '.join(map(str, silent[:_SILENT_MOST]))} the name cannot be read" if silent else ""
        raise NotFound(f"no running VM is named '{printable(name)}'{but}", "see the running VMs with: ramlock list")
    if len(found) > 1:
        pids = ", ".join(str(process.pid) for process in found)
        raise Refused(f"{len(found)} VMs are named '{printable(name)}': pids {pids}", "choose one of them with --pid")
    return found[0]


@contextmanager
def session(
    selector: Selector, *, patience: float = 0.0, deadline: Deadline | None = None, proc: Path = procfs.PROC
) -> Iterator[Vm]:
    """Find the VM, connect to its shim and make sure of both; wait up to `patience` seconds for one that is starting.

    With `deadline` all of that ends by then. What is done inside the block is the caller's to bound.
    Inside the block a broken connection becomes VmGone when it broke because the VM ended.
    Raises NotFound, NoPermission, Refused, and ControlError when the shim does not behave.
    """
    whole = deadline or Deadline(None)
    with talk(_connect(selector, whole.within(patience), whole, proc), proc, whole) as vm:
        yield vm


@contextmanager
def talk(vm: Vm, proc: Path = procfs.PROC, whole: Deadline | None = None) -> Iterator[Vm]:
    """Begin the session with the shim of `vm`, by `whole`, and end it. Raises as session() does."""
    whole = whole or Deadline(None)
    try:
        vm.client.greet(whole.within(ANSWER_TIME))
        yield vm
    except Disconnected as error:
        _raise_if_gone(vm)
        if not vm.client.package and os.geteuid() != 0:
            raise NoPermission(
                f"{vm.client.where} closed the connection without a greeting: it does not serve this user",
                "run ramlock as root or as the user who started the VM, or start the VM with --allow-uid",
            ) from error
        raise
    except NoAnswer as error:
        if vm.pid is not None and procfs.read(vm.pid, proc).stopped:
            raise NoAnswer(f"{vm.label} is stopped and cannot answer", f"continue it: kill -CONT {vm.pid}") from error
        raise
    finally:
        vm.close()


def _connect(selector: Selector, patience: Deadline, whole: Deadline, proc: Path) -> Vm:
    if selector.socket is not None:
        return _by_socket(selector.socket, whole, proc)
    pid = selector.pid if selector.pid is not None else find(selector.name or "", proc).pid
    pin = procfs.Pin(pid)
    try:
        while True:
            process = procfs.read(pid, proc)
            pin.check()
            environ = procfs.environ(pid, proc)
            try:
                sock, path = endpoint.connect_process(process, environ, whole.within(ANSWER_TIME), proc)
                break
            except NotFound:
                if patience.expired or not _expects_shim(process, environ):
                    raise
                time.sleep(_RETRY)
        pin.check()
        return Vm(Client(sock, printable(path)), pid, process.name, pin, process.uuid)
    except BaseException:
        pin.close()
        raise


def _by_socket(path: Path, whole: Deadline, proc: Path) -> Vm:
    shown = printable(str(path))
    try:
        sock = endpoint.connect(str(path), whole.within(ANSWER_TIME))
    except FileNotFoundError:
        raise NotFound(f"there is no socket {shown}", "is the VM running? give its --pid to have it found") from None
    except ConnectionRefusedError:
        raise NotFound(f"nobody listens on {shown}", "the VM that made it has ended; remove the file") from None
    client = Client(sock, shown)
    pid = endpoint.peer(sock).pid
    try:
        process = procfs.read(pid, proc)
        return Vm(client, pid, process.name, procfs.Pin(pid), process.uuid)
    except (NotFound, NoPermission):
        return Vm(client, None, None, None)  # out of our sight; the socket is all that was asked for


def _expects_shim(process: procfs.Process, environ: dict[str, str] | None) -> bool:
    """Tell whether a process was started with the shim, or is about to be: then its socket may only be late."""
    if not process.cmdline and process.exe is not None:
        return True  # in the middle of exec
    if "run" in process.cmdline and any(word.rsplit("/", 1)[-1] == "ramlock" for word in process.cmdline[:3]):
        return True
    environ = environ or {}
    return "ramlock" in environ.get("LD_PRELOAD", "") or any(name.startswith("RAMLOCK_") for name in environ)


def _raise_if_gone(vm: Vm) -> None:
    """Raise VmGone when the VM's process ends: its connections close a moment before.

    A shim that hangs up before its greeting has most likely turned us away, unless we are root, whom all serve; then
    nothing is waited for.
    """
    deadline = Deadline(_EXIT_TIME if vm.client.package or os.geteuid() == 0 else 0)
    while vm.pin is not None:
        if not vm.pin.alive:
            raise VmGone(f"{vm.label} has ended", "look into QEMU's own log for why")
        if deadline.expired:
            return
        time.sleep(_RETRY)
