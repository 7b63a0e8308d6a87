"""docs/library.md, run word for word against a real VM, and what it promises beyond."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import asyncio
import doctest
import os
from contextlib import suppress

import pytest

import ramlock
from tests.qemu.guest import MIB, ROOT, Guest
from tests.qemu.monitor import MonitorError

pytestmark = pytest.mark.usefixtures("lockable", "root")

PAGE = ROOT / "docs" / "library.md"


def test_the_page() -> None:
    name = f"web-{os.getpid()}"  # other VMs of this machine may be called web
    text = PAGE.read_text().replace('"web"', f'"{name}"').replace("'web'", f"'{name}'").replace("```", "")
    examples = doctest.DocTestParser().get_doctest(text, {}, "library.md", str(PAGE), 0)
    assert len(examples.examples) > 15
    with Guest(memory=128 * MIB, args=["-name", name]) as guest:
        guest.settle()
        said: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        assert runner.run(examples, out=said.append).failed == 0, "".join(said)
        guest.check_unharmed()


def test_a_pid_that_means_another_process_is_not_the_vm() -> None:
    with Guest(memory=64 * MIB) as guest:
        guest.settle()
        vm = ramlock.VM.find(guest.pid)
        assert vm._process is not None
        vm._process = vm._process._replace(start_time=vm._process.start_time + 1)
        for call in (lambda: vm.guarantee, lambda: vm.set(MIB * 4), vm.inject, vm.eject):
            with pytest.raises(ramlock.errors.VmGone):
                call()
        assert guest.query()["requested"] == 0


def test_events_end_with_the_vm() -> None:
    async def listen(guest: Guest) -> list[str]:
        vm = ramlock.VM.find(guest.pid)
        names = []
        with pytest.raises(ramlock.errors.VmGone):
            async for event in vm.events():
                names.append(event.name)
                guest.kill()
        return names

    async def both(guest: Guest) -> list[str]:
        listening = asyncio.create_task(listen(guest))
        while not listening.done():
            with suppress(OSError, MonitorError):  # it is killed meanwhile
                await asyncio.to_thread(guest.guarantee, 16 * MIB)
                await asyncio.to_thread(guest.guarantee, 0)
        return await asyncio.wait_for(listening, 60)

    with Guest(memory=64 * MIB) as guest:
        guest.settle()
        assert asyncio.run(both(guest))
