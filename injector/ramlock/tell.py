"""What the shim knows of guest RAM is held against what is seen from outside; a shim that cannot see it is told.

A shim in a QEMU that exports its symbols asks QEMU itself. In any other it waits until the controller, which may read
the process's memory and command line, says where guest RAM is; and is told again when that has changed.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import time
from typing import Any, NamedTuple

from ramlock import guestram, locate, procfs, reply, vms
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import CommandError, GuestRamMismatch, NotFound
from ramlock.guestram import Block, Found
from ramlock.memory import Memory
from ramlock.teststeps import step

LOOK_TIME = 10.0
"""Seconds that the shim has to look at guest RAM itself; QEMU's main loop may be busy."""
_POLL = 0.02
CONTROLLER = "controller"


class Said(NamedTuple):
    """What the shim says about guest RAM."""

    blocks: list[Block]
    source: str
    """ "qemu", or "controller" where it has been told; "" where it knows nothing."""
    blind: bool
    """Whether it has to be told."""


def ask(client: Client, deadline: Deadline) -> Said:
    """Ask the shim. Raises GuestRamMismatch when its reply is none, ControlError and CommandError."""
    answer = client.execute("query-ram-blocks", deadline=deadline.within(vms.ANSWER_TIME))
    blocks = guestram.parse_reply(answer)
    source = _source(answer)
    if blocks:
        return Said(blocks, source, source == CONTROLLER)
    state = reply.parse(client.execute("query-ram-minguarantee", deadline=deadline.within(vms.ANSWER_TIME)))
    return Said(blocks, source, state.told)


def check(vm: vms.Vm, process: procfs.Process, outside: Found | None, *, allow_probable: bool = False) -> str:
    """Hold the shim's guest RAM against ours, or tell it. `outside` is what has been seen before.

    A VM may plug memory in between the two: then both are looked at again. Returns whose word guest RAM is: "qemu",
    "controller", or "none" when there is no RAM yet. Raises GuestRamMismatch, NotLocated and what a session can raise.
    """
    step("compare")
    deadline = Deadline(LOOK_TIME)
    tries = 3
    found = outside or locate.outside(process)
    while True:
        said = ask(vm.client, deadline)
        if said.blind:
            return _tell(vm.client, process.pid, said, found, deadline, allow_probable=allow_probable)
        # The shim looks on QEMU's main loop, which may not have come to it yet.
        if not said.blocks and found.blocks and not deadline.expired:
            time.sleep(_POLL)
            continue
        with Memory(process.pid) as memory:
            maps = memory.maps()
        try:
            guestram.compare(said.blocks, found, maps)
            return "qemu" if said.blocks else "none"
        except GuestRamMismatch:
            tries -= 1
            if not tries:
                raise
        found = locate.outside(process)


def refresh(vm: vms.Vm, deadline: Deadline | None = None) -> None:
    """Tell a shim that cannot see guest RAM where it is, if that is not what it knows; others are left alone.

    Raises NotLocated when that is only a guess and it knows nothing yet, GuestRamMismatch when it does not take it,
    NoPermission when we may not look, ControlError and CommandError.
    """
    deadline = deadline or Deadline(None)
    if vm.pid is None:
        return
    said = ask(vm.client, deadline)
    if not said.blind:
        return
    try:
        process = procfs.read(vm.pid)
    except NotFound:
        return
    found = locate.outside(process)
    if said.blocks and not found.certain:
        return  # it was told so by someone who answered for it
    _tell(vm.client, process.pid, said, found, deadline, allow_probable=False)


def everywhere(vm: vms.Vm | None, process: procfs.Process, source: str) -> Found:
    """Find guest RAM by the shim's word ("qemu"), from outside, or with "auto" by all that there is, which must agree.

    `vm` is a session with the shim, where there is one. Raises as locate.outside() and ask() do.
    """
    deadline = Deadline(LOOK_TIME)
    tries = 3
    while True:
        inside = None
        if vm is not None and source in ("auto", "qemu"):
            said = ask(vm.client, deadline)
            if said.source == "qemu":  # what it was told itself is no source of its own
                inside = Found("qemu", True, said.blocks)
        if source == "qemu":
            if inside is None:
                raise locate.not_said(process.pid, shim=vm is not None)
            return inside
        found = locate.outside(process, source)
        if inside is None:
            return found
        with Memory(process.pid) as memory:
            maps = memory.maps()
        try:
            guestram.compare(inside.blocks, found, maps)
            return inside
        except GuestRamMismatch as error:
            tries -= 1
            if not tries:
                raise GuestRamMismatch(error.message, "lock nothing in this VM; please report this QEMU") from None


def _tell(client: Client, pid: int, said: Said, found: Found, deadline: Deadline, *, allow_probable: bool) -> str:
    blocks = [block for block in found.blocks if not block.virtio_mem]
    if not blocks:
        return "none"
    if {block.where for block in blocks} == {block.where for block in said.blocks}:
        return CONTROLLER
    if not found.certain and not allow_probable:
        raise locate.only_probable(pid, found)
    arguments = {"blocks": [_as_told(block) for block in blocks]}
    try:
        client.execute("set-ram-blocks", arguments, deadline=deadline.within(vms.ANSWER_TIME))
    except CommandError as error:
        if error.reason == "symbols":
            return "qemu"
        if error.reason != "maps":
            raise
        raise GuestRamMismatch(
            f"the shim does not take what was found by {found.source} for guest RAM: {error.desc}",
            "nothing was locked; please report this QEMU",
        ) from error
    return CONTROLLER


def _as_told(block: Block) -> dict[str, Any]:
    return {
        "id": block.id,
        "host": block.host,
        "size": block.size,
        "page-size": block.page_size,
        "backing": block.backing,
    }


def _source(answer: object) -> str:
    first = answer[0] if isinstance(answer, list) and answer else None
    source = first.get("source") if isinstance(first, dict) else None
    return source if isinstance(source, str) else ""
