"""The guarantee in QEMU's own monitor, as the clients of QEMU see it."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from ramlock import __version__
from tests.qemu import truth
from tests.qemu.conftest import assert_holds, ramlock
from tests.qemu.guest import MIB, Guest
from tests.qemu.monitor import Monitor, MonitorError, connect
from tests.qemu.nosymbols import HIDDEN, renamed
from tests.qemu.silence import Background

pytestmark = pytest.mark.usefixtures("lockable", "root")

SET, QUERY = "set_ram_minguarantee", "query-ram-minguarantee"
SIZE = 64 * MIB


def commands(monitor: Monitor) -> set[str]:
    """Ours, of those that QEMU's monitor lists."""
    return {SET, QUERY} & {entry["name"] for entry in monitor.execute("query-commands")}


def complaint(monitor: Monitor, command: str, arguments: dict[str, Any] | None = None) -> tuple[str, str]:
    """The class and the words of an error."""
    with pytest.raises(MonitorError) as error:
        monitor.execute(command, arguments)
    return error.value.kind, error.value.desc


def check_there(guest: Guest, size: int = SIZE) -> None:
    assert commands(guest.monitor) == {SET, QUERY}
    assert guest.monitor.execute(SET, {"size": size}) == {}
    guest.settle()
    assert guest.monitor.execute(QUERY) == guest.query()
    assert_holds(guest, size)


def check_absent(guest: Guest) -> None:
    assert not commands(guest.monitor)
    assert complaint(guest.monitor, QUERY)[0] == "CommandNotFound"


def inject(guest: Guest, *args: object, env: dict[str, str] | None = None) -> dict[str, Any]:
    result = ramlock("inject", "--pid", guest.pid, "--json", *args, env=env)
    assert result.returncode == 0, result.stderr
    reply: dict[str, Any] = json.loads(result.stdout)
    return reply


def state(guest: Guest) -> str:
    """Whether the shim says that QEMU has the commands."""
    with guest.shim() as shim:
        return str(shim.execute("query-ramlock")["monitor"])


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    """With several monitors, one of which speaks to people."""
    args = ["-qmp", "unix:{directory}/second,server=on,wait=off", "-monitor", "unix:{directory}/hmp,server=on,wait=off"]
    with Guest(ramlock=["--monitor"], args=args) as running:
        running.settle()
        yield running


def test_run(guest: Guest) -> None:
    check_there(guest)
    assert state(guest) == "on"
    assert guest.monitor.human("info status").startswith("VM status: running")
    with Monitor(guest.directory / "second") as second:
        assert commands(second) == {SET, QUERY}
        assert second.execute(SET, {"all": True}) == {}
        guest.settle()
        assert second.execute(QUERY) == guest.query() == guest.monitor.execute(QUERY)
    check_there(guest)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ((SET, {}), ("balloon", {})),
        ((SET, None), ("balloon", None)),
        ((SET, {"size": "1"}), ("balloon", {"value": "1"})),
        ((SET, {"size": 1e30}), ("balloon", {"value": 1e30})),
        ((SET, {"size": None}), ("balloon", {"value": None})),
        ((SET, {"size": {"deep": [[[1]]]}}), ("balloon", {"value": {"deep": [[[1]]]}})),
        ((SET, {"size": 1, "more": 2}), ("balloon", {"value": 1, "more": 2})),
        ((SET, {"size": 1, "m\u00f6re": "\ud83d\ude00"}), ("balloon", {"value": 1, "m\u00f6re": "\ud83d\ude00"})),
        ((SET, {"all": 1}), ("set_link", {"name": "x", "up": 1})),
        ((SET, {"size": 0, "order": 1}), ("human-monitor-command", {"command-line": 1})),
        ((QUERY, {"more": 1}), ("query-status", {"more": 1})),
    ],
)
def test_errors_are_worded_as_qemus(
    guest: Guest, ours: tuple[str, dict[str, Any] | None], theirs: tuple[str, dict[str, Any] | None]
) -> None:
    kind, words = complaint(guest.monitor, *theirs)
    for word, own in (("value", "size"), ("up", "all"), ("command-line", "order")):
        words = words.replace(f"'{word}'", f"'{own}'")
    assert complaint(guest.monitor, *ours) == (kind, words)


def test_the_same_errors_as_by_the_socket(guest: Guest) -> None:
    """What QEMU has no like of; the guarantee stays."""
    generation = guest.query()["generation"]
    refused: Sequence[dict[str, Any]] = (
        {"size": -1},
        {"size": 1 << 63},
        {"size": 1, "all": True},
        {"size": 1, "order": "x"},
        {"size": 1, "threads": 99},
    )
    with guest.shim() as shim:
        for arguments in refused:
            assert complaint(guest.monitor, SET, arguments) == complaint(shim, SET, arguments)
    assert guest.query()["generation"] == generation


def test_not_out_of_band(guest: Guest) -> None:
    """It would run on another thread, while QEMU's main thread goes on."""
    with connect(guest.directory / "second", 30) as client, client.makefile("rwb") as lines:

        def ask(request: dict[str, Any]) -> dict[str, Any]:
            lines.write(json.dumps(request).encode() + b"\n")
            lines.flush()
            while "event" in (reply := json.loads(lines.readline())):
                pass
            assert isinstance(reply, dict)
            return reply

        client.settimeout(30)
        assert "oob" in json.loads(lines.readline())["QMP"]["capabilities"]
        assert "return" in ask({"execute": "qmp_capabilities", "arguments": {"enable": ["oob"]}})
        assert "does not support OOB" in ask({"exec-oob": QUERY})["error"]["desc"]
        assert ask({"execute": QUERY, "id": 7})["id"] == 7
        # Later, since libvirt's and others' sessions are served one after another.
        assert "return" in ask({"execute": "query-status"})


def test_answered_while_memory_is_locked() -> None:
    """As soon as a command of QEMU's own that does nothing."""
    waits: dict[str, list[float]] = {"query-status": [], QUERY: [], SET: []}
    with Guest(ramlock=["--monitor"]) as guest:
        guest.settle()
        guest.monitor.execute(SET, {"size": guest.memory})
        locked = 0
        while locked < guest.memory - MIB and len(waits[QUERY]) < 200:
            for command, took in waits.items():
                arguments = {"size": guest.memory - len(took) % 2 * MIB} if command == SET else None
                begin = time.monotonic()
                reply = guest.monitor.execute(command, arguments)
                took.append(time.monotonic() - begin)
                if command == QUERY:
                    locked = reply["locked"]
            time.sleep(0.002)
        guest.settle()
        guest.check_unharmed()
    assert len(waits[QUERY]) > 20, "it was locked before anything could be asked"
    usual = statistics.median(waits["query-status"])
    ratios = {command: statistics.median(took) / usual for command, took in waits.items()}
    print(f"median of {len(waits[QUERY])}: query-status {usual * 1e6:.0f} us, ratios {ratios}")
    assert max(ratios.values()) < 10, (ratios, usual)


def test_on_fault_locks_are_counted_by_and_by(guest: Guest) -> None:
    """QEMU's main thread counts no pages; nothing is said to be resident that was not seen so."""
    guest.monitor.execute(SET, {"size": 0})
    guest.settle()
    guest.monitor.execute(SET, {"size": guest.memory, "prefault": False, "order": "address"})
    deadline = time.monotonic() + 60
    while (reply := guest.monitor.execute(QUERY))["state"] != "idle":
        assert reply["locked"] <= reply["armed"]
        assert time.monotonic() < deadline
    resident = truth.locked(guest.pid).resident
    while not 0 < guest.monitor.execute(QUERY)["locked"] <= resident:
        assert time.monotonic() < deadline, resident
    assert guest.query()["locked"] == guest.monitor.execute(QUERY)["locked"]
    guest.monitor.execute(SET, {"size": 0, "prefault": True, "order": "resident"})
    guest.settle()


def test_the_vm_is_not_set_up_yet() -> None:
    """By environment alone; with -preconfig, and then with -S."""
    env = {"RAMLOCK_MONITOR": "1"}
    with Guest(how="env", env=env, args=["-preconfig", "-S"], memory=256 * MIB) as guest:
        check_absent(guest)
        assert state(guest) == "waiting"
        guest.monitor.execute("x-exit-preconfig")
        guest.settle()
        check_there(guest)
        assert guest.monitor.execute("query-status")["running"] is False
        guest.monitor.execute("cont")
        guest.check_unharmed()


class Asks(Background):
    """A client of QEMU's that asks while the shim comes and goes."""

    def __init__(self, monitor: Monitor) -> None:
        super().__init__(0)
        self.answers: set[str] = set()
        self._monitor = monitor

    def once(self) -> None:
        try:
            self._monitor.execute(SET, {"size": 8 * MIB})
            self.answers.add("ok")
        except MonitorError as error:
            self.answers.add(f"{error.kind}: {error.desc.partition(' has ')[0]}")


def test_it_comes_and_goes(other: Path) -> None:
    """Injected, upgraded, ejected, and injected once more: by this shim and by one of another version."""
    another = {"RAMLOCK_SHIM": str(other)}
    with Guest(how="plain", memory=256 * MIB) as guest:
        inject(guest)
        check_absent(guest)
        assert state(guest) == "off"
        # The shim that is there already takes it up.
        assert inject(guest, "--monitor")["monitor"] is True
        check_there(guest)
        assert inject(guest, "--monitor", "--guarantee", SIZE // 2)["already"]
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        check_absent(guest)
        # Another version finds what this one has left in QEMU's list, and this one what that made of it.
        inject(guest, "--monitor", env=another)
        check_there(guest)
        assert inject(guest, "--upgrade")["replaced"] == __version__
        check_there(guest, SIZE // 2)
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        inject(guest, env=another)
        check_absent(guest)
        assert inject(guest, "--upgrade", "--monitor")["monitor"] is True
        with Asks(guest.monitor) as asks:
            for _ in range(2):
                assert ramlock("eject", "--pid", guest.pid).returncode == 0
                inject(guest, "--monitor")
        assert "ok" in asks.answers
        gone = {"GenericError: the shim is leaving", f"CommandNotFound: Command {SET}"}
        assert asks.answers <= {"ok", *gone}, asks.answers
        check_there(guest)
        guest.check_unharmed()


@pytest.mark.parametrize("hidden", [HIDDEN, ("qmp_register_command",)], ids=["nothing", "only-its-monitor"])
def test_a_qemu_that_does_not_export_its_monitor(hidden: Sequence[str], tmp_path: Path) -> None:
    """It is said, and all else works; it is no question of whether the shim was there already."""
    qemu = str(renamed(tmp_path, hidden))
    args = ["-L", "/usr/share/qemu", "-L", "/usr/share/seabios"]
    env = {"QEMU_MODULE_DIR": str(tmp_path)}
    with Guest(how="plain", qemu=qemu, args=args, env=env, memory=256 * MIB) as guest:
        for _ in range(2):
            result = ramlock("inject", "--pid", guest.pid, "--guarantee", SIZE, "--monitor", "--json")
            assert result.returncode == 1
            assert "this QEMU does not export its monitor" in result.stderr
            assert len(result.stderr.strip().splitlines()) == 2
            assert json.loads(result.stdout)["monitor"] is False
            assert_holds(guest, SIZE)
            assert state(guest) == "not-exported"
        check_absent(guest)
        result = ramlock("inject", "--pid", guest.pid, "--monitor")
        assert result.returncode == 1
        assert "is in it already" in result.stdout
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        guest.check_unharmed()
    if hidden != HIDDEN:
        options = ["--monitor", "--guarantee", "64M"]
        with Guest(ramlock=options, qemu=qemu, args=args, env=env, memory=256 * MIB) as guest:
            guest.settle()
            assert_holds(guest, SIZE)
            assert "this QEMU does not export its monitor" in guest.said()
            check_absent(guest)
