"""docs/protocol.md and the shim say the same."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from tests.pages import table
from tests.qemu.guest import MIB, ROOT, Guest
from tests.qemu.monitor import Monitor, MonitorError

PAGE = (ROOT / "docs/protocol.md").read_text()
# A member that is there only at times.
SOMETIMES = {"left-out", "eta-s", "memlock-limit", "short", "launch-error", "waiting", "started-ns"}


COMMANDS = table(PAGE, "## Commands")
MEMBERS = table(PAGE, "### `query-ram-minguarantee`")
EVENTS = table(PAGE, "## Events")


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest(memory=256 * MIB) as running:
        running.settle()
        yield running


@pytest.fixture
def shim(guest: Guest) -> Iterator[Monitor]:
    with guest.shim() as session:
        yield session


def test_commands(shim: Monitor) -> None:
    assert {entry["name"] for entry in shim.execute("query-commands")} == set(COMMANDS)


GOOD: dict[str, Any] = {"size": 1, "cgroup-left": 1, "valid-s": 1, "blocks": [], "books": {}, "wish": {}}
"""A value of the right type for each argument that something cannot be asked without."""


def arguments(command: str) -> tuple[set[str], set[str]]:
    """The arguments that the page names for a command: all of them, and those that are said to be optional."""
    text = COMMANDS[command][0]
    names = r"`([a-z-]+)(?:: true)?`(?=[ ,:;]|$)"
    must, _, may = text.partition("optional")
    return set(re.findall(names, must + may)), set(re.findall(names, may))


@pytest.mark.parametrize("command", [name for name in COMMANDS if name != "qmp_capabilities"])
def test_arguments(shim: Monitor, command: str) -> None:
    """Each argument that the page names is known to the command, by its complaint about the type; no other is."""
    named, optional = arguments(command)
    needed = {name: GOOD[name] for name in named - optional if name != "all"}
    for name in named:
        with pytest.raises(MonitorError, match=f"Invalid parameter type for '{name}'"):
            shim.execute(command, {**needed, name: None})
    for name in needed:
        with pytest.raises(MonitorError, match=f"Parameter '{name}' is missing"):
            shim.execute(command, {other: value for other, value in needed.items() if other != name})
    with pytest.raises(MonitorError, match="Parameter 'nonsense' is unexpected"):
        shim.execute(command, {**needed, "nonsense": 1})


def test_the_shims_code_knows_no_other_argument() -> None:
    rows = re.findall(r'\{ "([a-z_-]+)",\s+\w+,\s+\{ (.*?) \} \}', (ROOT / "shim/commands.c").read_text(), re.DOTALL)
    assert {name for name, _ in rows} == set(COMMANDS) - {"qmp_capabilities"}
    for name, text in rows:
        assert set(re.findall(r'\{ "([a-z-]+)"', text)) == arguments(name)[0], name


@pytest.mark.parametrize("command", ["query-version", "query-commands", "set_ram_minguarantee"])
def test_returned_members(shim: Monitor, command: str) -> None:
    """What the page says that a command returns, in the forms {}, {"a", "b"} and [{"a"}]."""
    reply = shim.execute(command, {"size": 0} if command == "set_ram_minguarantee" else None)
    text = COMMANDS[command][1]
    if command == "query-version":
        assert text == "as `version` in the greeting"
        assert reply == shim.greeting["version"]
    elif command == "query-commands":
        assert text == '`[{"name"}]`'
        assert {member for entry in reply for member in entry} == {"name"}
    else:
        assert text == "`{}`"
        assert reply == {}


def test_members(shim: Monitor) -> None:
    reply = set(shim.execute("query-ram-minguarantee"))
    assert reply <= set(MEMBERS), reply - set(MEMBERS)
    assert set(MEMBERS) - SOMETIMES <= reply, set(MEMBERS) - reply


@pytest.mark.parametrize("command", ["query-ram-blocks", "query-ramlock"])
def test_members_in_the_commands_table(shim: Monitor, command: str) -> None:
    reply = shim.execute(command)
    named = set(re.findall(r'"([a-z-]+)"', COMMANDS[command][1]))
    assert set(reply[0] if isinstance(reply, list) else reply) | (named & SOMETIMES) == named


def test_events(shim: Monitor) -> None:
    for name, size in (("RAM_MINGUARANTEE_REACHED", 64 * MIB), ("RAM_MINGUARANTEE_REACHED", 0)):
        shim.execute("set_ram_minguarantee", {"size": size})
        data = shim.wait_event(name, timeout=60)["data"]
        assert set(data) == set(re.findall(r"`([a-z-]+)`", EVENTS[name][0]))


def test_the_shims_code_knows_no_other_event_nor_reason() -> None:
    """What cannot be brought about here at will: names in the source, against the page."""
    source = "".join(path.read_text() for path in (ROOT / "shim").glob("*.c"))
    assert set(re.findall(r'"(RAM_MINGUARANTEE_[A-Z]+)"', source)) == set(EVENTS)
    shortages = re.findall(r'\[SHORTAGE_[A-Z_]+\] = "([a-z-]+)"', source)
    assert set(shortages) - {"none"} == set(re.findall(r"`([a-z-]+)`", MEMBERS["short"][0].split("reasons:")[1]))
    states = re.findall(r'\[LOCKER_[A-Z]+\] = "([a-z]+)"', source)
    assert set(states) == set(re.findall(r"`([a-z]+)`", MEMBERS["state"][0]))
