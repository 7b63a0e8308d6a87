"""The control socket serves clients that know nothing of ramlock: socat, qmp-shell and the qemu.qmp library."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from qemu.qmp import ExecuteError, QMPClient
from qemu.qmp.legacy import QEMUMonitorProtocol

from tests.conftest import Need
from tests.qemu.conftest import assert_holds
from tests.qemu.guest import GIB, MIB, Guest

pytestmark = pytest.mark.usefixtures("lockable")


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest() as started:
        started.settle()
        yield started


def test_socat(guest: Guest, need: Need) -> None:
    """Exactly as the documentation says it: no newline, and the end of file right behind."""
    need("socat", "socat")
    words = f'{{"execute":"qmp_capabilities"}}{{"execute":"set_ram_minguarantee","arguments":{{"size":{512 * MIB}}}}}'
    command = f"printf '{words}' | socat - UNIX:{guest.shim_socket}"
    result = subprocess.run(["sh", "-c", command], capture_output=True, text=True, timeout=60, check=True)
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert lines[0]["QMP"]["version"]["package"].startswith("ramlock ")
    assert [line for line in lines[1:] if "event" not in line] == [{"return": {}}, {"return": {}}]
    guest.settle()
    assert_holds(guest, 512 * MIB)


def test_qmp_shell(guest: Guest) -> None:
    shell = Path(sys.executable).with_name("qmp-shell")
    lines = f"set_ram_minguarantee size={96 * MIB}\nquery-ram-minguarantee\n"
    result = subprocess.run(
        [str(shell), str(guest.shim_socket)], input=lines, capture_output=True, text=True, timeout=60, check=False
    )
    assert f'"requested": {96 * MIB}' in result.stdout, (result.stdout, result.stderr)
    guest.settle()
    assert_holds(guest, 96 * MIB)


def test_library(guest: Guest) -> None:
    async def talk() -> None:
        client = QMPClient("test")
        await client.connect(str(guest.shim_socket))
        try:
            with client.listener("RAM_MINGUARANTEE_REACHED") as reached:
                assert await client.execute("set_ram_minguarantee", {"size": 160 * MIB}) == {}
                event: Any = await asyncio.wait_for(reached.get(), 60)
                assert event["data"]["requested"] == 160 * MIB
            with pytest.raises(ExecuteError, match=r"\[range\]"):
                await client.execute("set_ram_minguarantee", {"size": 2 * GIB})
            with pytest.raises(ExecuteError):
                await client.execute("no-such-command")
            reply = await client.execute("query-ram-minguarantee")
            assert isinstance(reply, dict)
            assert reply["requested"] == 160 * MIB
        finally:
            await client.disconnect()

    asyncio.run(asyncio.wait_for(talk(), 120))
    assert_holds(guest, 160 * MIB)


def test_legacy_library(guest: Guest) -> None:
    client = QEMUMonitorProtocol(str(guest.shim_socket))
    try:
        greeting = client.connect()
        assert greeting and greeting["QMP"]["version"]["package"].startswith("ramlock ")
        client.settimeout(60)
        assert client.cmd("set_ram_minguarantee", size=80 * MIB) == {}
        commands: Any = client.cmd("query-commands")
    finally:
        client.close()
    assert {"set_ram_minguarantee", "query-ram-minguarantee", "query-ram-blocks", "query-version"} <= {
        entry["name"] for entry in commands
    }
    guest.settle()
    assert_holds(guest, 80 * MIB)


def test_many_clients_see_the_same(guest: Guest) -> None:
    sessions = [guest.shim() for _ in range(8)]
    try:
        for number, session in enumerate(sessions):
            session.execute("set_ram_minguarantee", {"size": (number + 1) * 16 * MIB})
        for session in sessions:
            while session.wait_event("RAM_MINGUARANTEE_REACHED", timeout=60)["data"]["requested"] != 128 * MIB:
                pass
            assert session.execute("query-ram-minguarantee")["requested"] == 128 * MIB
    finally:
        for session in sessions:
            session.close()
    assert_holds(guest, 128 * MIB)
