"""What whoever finds a shim in a VM asks of it, against servers that answer as a shim may."""
# SPDX-License-Identifier: GPL-2.0-or-later

import socket
from collections.abc import Callable
from contextlib import closing
from typing import Any

import pytest

from ramlock import install, vms
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import ControlError, Refused
from tests.unit.conftest import GREETING, Serve, reply, requests, send

Answer = Callable[[str], dict[str, Any]]
WANTED = install.Options(follow_discards=True)


def follow(serve: Serve, answer: Answer, options: install.Options = WANTED) -> tuple[bool, list[str]]:
    """What install makes of a shim that answers so, and what it was asked."""
    seen: list[str] = []

    def shim(sock: socket.socket) -> None:
        send(sock, GREETING)
        for request in requests(sock):
            name = request["execute"]
            if name != "qmp_capabilities":
                seen.append(name)
            send(sock, {**({"return": {}} if name == "qmp_capabilities" else answer(name)), "id": request["id"]})

    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(serve(shim)))
    with closing(Client(sock, "shim")) as client:
        client.greet(Deadline(5))
        return install._follow(vms.Vm(client, None, "vm", None), options), seen


def test_discards_are_followed_only_if_asked_for(serve: Serve) -> None:
    assert follow(serve, lambda name: {"return": {}}, install.Options()) == (False, [])


def test_a_shim_that_follows_already_is_left_alone(serve: Serve) -> None:
    done, seen = follow(serve, lambda name: {"return": reply(follow_discards=True)})
    assert (done, seen) == (True, ["query-ram-minguarantee"])


def test_a_shim_that_is_there_is_told_and_waited_for(serve: Serve) -> None:
    asked = iter([False, False, True])

    def answer(name: str) -> dict[str, Any]:
        return {"return": reply(follow_discards=next(asked)) if name.startswith("query") else {}}

    done, seen = follow(serve, answer)
    assert done
    assert seen == ["query-ram-minguarantee", "ramlock-follow-discards", *["query-ram-minguarantee"] * 2]


def test_one_that_does_not_know_guest_ram_is_not_waited_for(serve: Serve) -> None:
    why = {"reason": "starting", "desc": ""}
    done, _ = follow(serve, lambda name: {"return": reply(state="waiting", waiting=why, follow_discards=False)})
    assert done


def test_one_that_cannot_is_told_of(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(install, "FOLLOW_TIME", 0.1)
    with pytest.raises(ControlError, match="cannot be followed"):
        follow(serve, lambda name: {"return": reply(follow_discards=False)})


def test_an_older_one_is_to_be_replaced(serve: Serve) -> None:
    def answer(name: str) -> dict[str, Any]:
        if name.startswith("query"):
            return {"return": reply()}
        return {"error": {"class": "CommandNotFound", "desc": f"The command {name} has not been found"}}

    with pytest.raises(Refused, match="already") as refused:
        follow(serve, answer)
    assert "--upgrade" in refused.value.hint
