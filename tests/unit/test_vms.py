"""Which VM is meant, and what a session does when the VM is late, gone or not willing."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramlock import guarantee, vms
from ramlock.deadline import Deadline
from ramlock.errors import (
    ControlError,
    Disconnected,
    NoAnswer,
    NoPermission,
    NotFound,
    Refused,
    TurnedAway,
    UsageError,
    VmGone,
)
from ramlock.vms import Selector
from tests.unit.conftest import Serve, Shim, send
from tests.unit.test_procfs import make

# A process with the shim's socket, after a while; it ends when it is asked for the state of the guarantee.
VM = """
import json, os, socket, sys, time
from tests.unit.conftest import GREETING, requests, send
time.sleep(float(sys.argv[1]))
server = socket.socket(socket.AF_UNIX)
server.bind(os.environ["RAMLOCK_SOCKET"])
server.listen()
client, _ = server.accept()
send(client, GREETING)
for request in requests(client):
    if request["execute"] != "qmp_capabilities":
        os._exit(1)
    send(client, {"return": {}, "id": request["id"]})
"""

Start = Callable[[float], int]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def run(delay: float) -> int:
        environ = {**os.environ, "RAMLOCK_SOCKET": str(tmp_path / "vm"), "PYTHONPATH": os.pathsep.join(sys.path)}
        command = [sys.executable, "-c", VM, str(delay)]
        started.append(subprocess.Popen(command, env=environ, cwd=Path(__file__).parents[2]))
        return started[-1].pid

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.parametrize(
    "words", [{}, {"pid": 1, "name": "x"}, {"name": "x", "socket": Path("x")}, {"pid": 1, "socket": Path("x")}]
)
def test_exactly_one(words: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        Selector(**words)  # type: ignore[arg-type]


def test_by_name(tmp_path: Path) -> None:
    make(tmp_path, 5, "qemu", "-name", "guest=web,debug-threads=on")
    make(tmp_path, 6, "qemu", "-name", "db")
    make(tmp_path, 7, "qemu", "-name", "db")
    make(tmp_path, 8, "bash", "-name", "sh", exe="/bin/bash")
    assert vms.find("web", tmp_path).pid == 5
    assert vms.find(7, tmp_path).name == "db"
    with pytest.raises(Refused, match="6, 7"):
        vms.find("db", tmp_path)
    for name in ("sh", "we", "web,debug-threads=on", ""):
        with pytest.raises(NotFound):
            vms.find(name, tmp_path)


def test_by_uuid(tmp_path: Path) -> None:
    one, two = "5d744f21-ba4a-4d6e-bdb2-30a35ff3207d", "afca425a-2c3a-420c-b2fb-dd7b4950d722"
    make(tmp_path, 5, "qemu", "-name", "guest=web", "-uuid", one)
    make(tmp_path, 6, "qemu", "-name", "db", "-uuid", two.upper())
    assert vms.find(one.upper(), tmp_path).pid == 5
    assert vms.find(two, tmp_path).pid == 6
    make(tmp_path, 7, "qemu", "-name", two)  # a name comes first
    assert vms.find(two, tmp_path).pid == 7
    make(tmp_path, 8, "qemu", "-uuid", "web")  # no UUID, and so no QEMU's
    assert vms.find("web", tmp_path).pid == 5
    make(tmp_path, 9, "qemu", "-uuid", one)
    with pytest.raises(Refused, match="5, 9"):
        vms.find(one, tmp_path)


def test_a_late_socket_is_waited_for(start: Start) -> None:
    with vms.session(Selector(pid=start(0.5)), patience=30) as vm:
        assert vm.client.package == "ramlock 0.1.0"
        assert vm.label == f"VM (pid {vm.pid})"


def test_without_patience_it_is_not(start: Start) -> None:
    with pytest.raises(NotFound), vms.session(Selector(pid=start(60))):
        pass


def test_patience_is_only_for_what_has_the_shim() -> None:
    process = subprocess.Popen(["sleep", "60"], env={})
    before = Deadline(20)
    try:
        with pytest.raises(NotFound), vms.session(Selector(pid=process.pid), patience=20):
            pass
        assert not before.expired
    finally:
        process.kill()
        process.wait()


def test_a_vm_that_ends_in_the_middle(start: Start) -> None:
    with (
        pytest.raises(VmGone) as error,
        vms.session(Selector(pid=start(0)), patience=30) as vm,
    ):
        guarantee.query(vm.client)
    assert error.value.exit_code == 6


def test_a_stopped_vm_is_named_so(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(NoAnswer, match="is stopped") as error,
        vms.session(Selector(pid=start(0)), patience=30) as vm,
    ):
        assert vm.pid is not None
        os.kill(vm.pid, signal.SIGSTOP)
        monkeypatch.setattr(guarantee, "ANSWER_TIME", 0.2)
        guarantee.query(vm.client)
    assert "kill -CONT" in error.value.hint


def test_by_socket(serve: Serve) -> None:
    path = serve(Shim())
    with vms.session(Selector(socket=path)) as vm:
        assert vm.pid == os.getpid()
        assert guarantee.query(vm.client).ram == 2 << 30


def test_no_socket(tmp_path: Path) -> None:
    for name in ("nothing", "nothing/at/all"):
        with pytest.raises(NotFound), vms.session(Selector(socket=tmp_path / name)):
            pass


def test_turned_away_without_a_greeting(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serve(lambda sock: None)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoPermission) as error, vms.session(Selector(socket=path)):
        pass
    assert error.value.exit_code == 7
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    with pytest.raises(Disconnected), vms.session(Selector(socket=path)):
        pass


def test_no_place_left_is_no_matter_of_rights(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    path = serve(lambda sock: send(sock, {"error": {"class": "GenericError", "desc": "too many clients"}}))
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(TurnedAway, match="too many clients"), vms.session(Selector(socket=path)):
        pass


def test_a_silent_socket(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vms, "ANSWER_TIME", 0.2)
    path = serve(lambda sock: print(end="", file=sock.makefile()) if sock.recv(1) else None)
    with pytest.raises(ControlError), vms.session(Selector(socket=path)):
        pass
