"""What is asked of a shim that is to be in QEMU's own monitor, and what is made of its answers."""
# SPDX-License-Identifier: GPL-2.0-or-later

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from ramlock import monitor, vms
from ramlock.errors import NoMonitor
from tests.unit.conftest import GREETING, Serve, requests, send


class Shim:
    """Answers ramlock-monitor with an error, or well, and then tells these states, the last one for ever."""

    def __init__(self, *states: object, error: dict[str, str] | None = None) -> None:
        self.states = list(states)
        self.error = error

    def __call__(self, sock: socket.socket) -> None:
        send(sock, GREETING)
        for request in requests(sock):
            answer: dict[str, Any] = {"return": {}}
            if request["execute"] == "ramlock-monitor" and self.error:
                answer = {"error": self.error}
            elif request["execute"] == "query-ramlock":
                state = self.states.pop(0) if len(self.states) > 1 else self.states[0]
                answer = {"return": state if not isinstance(state, str) else {"monitor": state}}
            send(sock, {**answer, "id": request["id"]})


@contextmanager
def talk(serve: Serve, shim: Shim) -> Iterator[vms.Vm]:
    with vms.session(vms.Selector(socket=serve(shim))) as vm:
        yield vm


@pytest.mark.parametrize(
    ("states", "offered"),
    [(["on"], True), (["waiting", "waiting", "on"], True), (["waiting"], False), ([{}], False), ([["on"]], False)],
)
def test_offer(serve: Serve, states: list[object], offered: bool) -> None:
    with talk(serve, Shim(*states)) as vm:
        assert monitor.offer(vm, 0.05) is offered


@pytest.mark.parametrize(
    ("kind", "desc", "message", "hint"),
    [
        (
            "GenericError",
            "[monitor] this QEMU does not export its monitor",
            "this QEMU does not export",
            "over its socket",
        ),
        ("CommandNotFound", "The command ramlock-monitor has not been found", "is an older one", "--upgrade"),
    ],
)
def test_it_cannot_be(serve: Serve, kind: str, desc: str, message: str, hint: str) -> None:
    with talk(serve, Shim("off", error={"class": kind, "desc": desc})) as vm, pytest.raises(NoMonitor) as error:
        monitor.offer(vm)
    assert message in error.value.message
    assert hint in error.value.hint
    assert error.value.exit_code == 1


@pytest.mark.parametrize(
    ("state", "wanted"), [("on", True), ("waiting", True), ("off", False), ("not-exported", False), ({}, False)]
)
def test_is_wanted(serve: Serve, state: object, wanted: bool) -> None:
    with talk(serve, Shim(state)) as vm:
        assert monitor.is_wanted(vm) is wanted
