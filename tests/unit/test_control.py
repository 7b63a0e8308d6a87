"""The QMP client against good servers, strange servers and hostile servers, over real sockets."""
# SPDX-License-Identifier: GPL-2.0-or-later

import asyncio
import json
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ramlock.control import MAX_EVENTS, MAX_LINE, Client, State
from ramlock.deadline import Deadline
from ramlock.errors import CommandError, ControlError, Disconnected, NoAnswer, NotOurs, ProtocolError, TurnedAway
from tests.unit.conftest import GREETING, Behaviour, Serve, Shim, requests, send

SOON = 0.3


@contextmanager
def client(path: Path) -> Iterator[Client]:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    session = Client(sock, str(path))
    try:
        yield session
    finally:
        session.close()


def after_greeting(data: bytes) -> Behaviour:
    """Negotiate, then answer any command with `data` and wait."""

    def behave(sock: socket.socket) -> None:
        send(sock, GREETING)
        asked = requests(sock)
        send(sock, {"return": {}, "id": next(asked)["id"]})
        next(asked)
        sock.sendall(data)
        next(asked, None)

    return behave


def test_a_whole_session(serve: Serve) -> None:
    with client(serve(Shim())) as session:
        session.greet(Deadline(5))
        assert session.package == "ramlock 0.1.0"
        assert session.execute("query-ram-minguarantee", deadline=Deadline(5))["ram"] == 2 << 30


def test_the_library_qemu_qmp_agrees_with_the_same_server(serve: Serve) -> None:
    """The server that this client is tested with is one that QEMU's own client accepts."""
    qmp = pytest.importorskip("qemu.qmp", reason="install the test extra")

    def lines(sock: socket.socket) -> None:
        send(sock, GREETING)
        buffer = ""
        while data := sock.recv(65536):
            buffer += data.decode()
            while buffer.strip():
                request, end = json.JSONDecoder().raw_decode(buffer.lstrip())
                buffer = buffer.lstrip()[end:]
                send(sock, {"return": {}} | ({"id": request["id"]} if "id" in request else {}))

    async def talk(path: Path) -> object:
        session = qmp.QMPClient("test")
        await session.connect(str(path))
        try:
            return await session.execute("query-version")
        finally:
            await session.disconnect()

    assert asyncio.run(talk(serve(lines))) == {}


def test_calls_in_the_wrong_state_are_refused(serve: Serve) -> None:
    with client(serve(Shim())) as session:
        with pytest.raises(RuntimeError):
            session.execute("query-version", deadline=Deadline(1))
        session.greet(Deadline(5))
        with pytest.raises(RuntimeError):
            session.greet(Deadline(5))


@pytest.mark.parametrize(
    "greeting",
    [
        b'{"QMP": {"version": {"qemu": {"major": 7}, "package": "Debian 1:7.2"}, "capabilities": ["oob"]}}\r\n',
        b'{"QMP": {"version": {"qemu": {}, "package": "ramlocksmith 1"}, "capabilities": []}}\r\n',
        b'{"QMP": {"version": "1", "capabilities": []}}\r\n',
        b'{"QMP": []}\r\n',
        b"{}\r\n",
        b'{"error": "unauthorized"}\r\n',
        b'{"error": {"code": 401}}\r\n',
        b"[]\r\n",
        b"null\r\n",
        b"SSH-2.0-OpenSSH_9.2\r\n",
        b"HTTP/1.1 400 Bad Request\r\n",
        b"QEMU 7.2 monitor - type 'help' for more information\r\n(qemu) ",
        b"\xff\xfe\x00\r\n",
        '{"QMP": "ü"}\n'.encode("utf-16"),
        b"[" * 100_000 + b"\n",
        b'{"QMP": ' * 50_000 + b"\n",
        b"9" * 100_000 + b"\n",
        b'{"QMP": NaN}\n',
        b"x" * (MAX_LINE + 70_000),
    ],
    ids=range(19),
)
def test_a_stranger_is_told_nothing(serve: Serve, greeting: bytes) -> None:
    heard: list[bytes] = []

    def behave(sock: socket.socket) -> None:
        sock.sendall(greeting)
        heard.append(sock.recv(100))

    with client(serve(behave)) as session:
        with pytest.raises(NotOurs) as error:
            session.greet(Deadline(10))
        assert session.state is State.BROKEN
        assert error.value.exit_code == 6
        with pytest.raises(ControlError):
            session.execute("query-version", deadline=Deadline(1))
    assert heard in ([], [b""])


def test_a_silent_server_is_not_waited_for(serve: Serve) -> None:
    def behave(sock: socket.socket) -> None:
        sock.recv(1)

    with client(serve(behave)) as session:
        start = time.monotonic()
        with pytest.raises(NoAnswer):
            session.greet(Deadline(SOON))
        assert SOON <= time.monotonic() - start < SOON + 10


def test_a_dribbling_server_does_not_win_time(serve: Serve) -> None:
    def behave(sock: socket.socket) -> None:
        for byte in json.dumps(GREETING) + " " * 100_000:
            sock.sendall(byte.encode())
            time.sleep(0.02)

    with client(serve(behave)) as session, pytest.raises(NoAnswer):
        session.greet(Deadline(SOON))


def test_a_server_that_never_reads_does_not_block(serve: Serve) -> None:
    def behave(sock: socket.socket) -> None:
        send(sock, GREETING)
        send(sock, {"return": {}, "id": 1})
        time.sleep(SOON * 4)

    with client(serve(behave)) as session:
        session.greet(Deadline(5))
        with pytest.raises(NoAnswer):
            session.execute("x", {"filler": "x" * (8 << 20)}, deadline=Deadline(SOON))


def test_no_place_left(serve: Serve) -> None:
    def behave(sock: socket.socket) -> None:
        send(sock, {"error": {"class": "GenericError", "desc": "too many\x1b clients"}})

    with client(serve(behave)) as session:
        with pytest.raises(TurnedAway, match=r"too many\\x1b clients") as error:
            session.greet(Deadline(5))
        assert error.value.exit_code == 1
        assert "close idle clients" in error.value.hint


def test_hanging_up_before_the_greeting(serve: Serve) -> None:
    with client(serve(lambda sock: None)) as session, pytest.raises(Disconnected):
        session.greet(Deadline(5))


@pytest.mark.parametrize(
    "answer",
    [
        b"nonsense\r\n",
        b"[]\r\n",
        b'{"id": 2}\r\n',
        b'{"return": {}, "id": 77}\r\n',
        b'{"return": {}}\r\n',
        b'{"error": {"class": "GenericError", "desc": "parse"}}\r\n',
        b'{"event": "X", "data": []}\r\n',
        b'{"return": ' + b"[" * 100_000 + b"\r\n",
        b'{"return": ' + b"1" * 100_000 + b', "id": 2}\r\n',
        b" " * (MAX_LINE + 70_000),
        b'{"return": Infinity, "id": 2}\r\n',
    ],
    ids=range(11),
)
def test_what_the_protocol_does_not_promise_ends_the_session(serve: Serve, answer: bytes) -> None:
    with client(serve(after_greeting(answer))) as session:
        session.greet(Deadline(5))
        with pytest.raises(ProtocolError) as first:
            session.execute("query-version", deadline=Deadline(10))
        assert session.state is State.BROKEN
        with pytest.raises(ProtocolError) as second:
            session.event(Deadline(1))
        assert second.value is first.value


def test_an_error_reply_does_not_end_the_session(serve: Serve) -> None:
    def behave(sock: socket.socket) -> None:
        send(sock, GREETING)
        asked = requests(sock)
        send(sock, {"return": {}, "id": next(asked)["id"]})
        desc = "[range] more than\x1b[2J guest RAM"
        send(sock, {"error": {"class": "GenericError", "desc": desc}, "id": next(asked)["id"]})
        send(sock, {"return": 5, "id": next(asked)["id"]})

    with client(serve(behave)) as session:
        session.greet(Deadline(5))
        with pytest.raises(CommandError) as error:
            session.execute("set_ram_minguarantee", deadline=Deadline(5))
        assert error.value.reason == "range"
        assert error.value.desc == "more than\\x1b[2J guest RAM"
        assert session.execute("x", deadline=Deadline(5)) == 5


def test_events_are_kept_while_a_reply_is_awaited(serve: Serve) -> None:
    event = b'{"event": "E", "data": {"n": %d}, "timestamp": {"seconds": 1, "microseconds": 0}}\r\n'
    with client(serve(after_greeting(event % 1 + event % 2 + b'{"return": {}, "id": 2}\r\n' + event % 3))) as session:
        session.greet(Deadline(5))
        session.execute("x", deadline=Deadline(5))
        events = [session.event(Deadline(5)) for _ in range(3)]
        assert [event and event.data["n"] for event in events] == [1, 2, 3]
        assert session.event(Deadline(0.05)) is None
        assert session.state is State.READY


def test_a_flood_of_events_fills_no_memory_and_stops_at_the_deadline(serve: Serve) -> None:
    def behave(sock: socket.socket) -> None:
        send(sock, GREETING)
        asked = requests(sock)
        send(sock, {"return": {}, "id": next(asked)["id"]})
        line = b'{"event": "E", "data": {}}\r\n' * 1000
        while True:
            sock.sendall(line)

    with client(serve(behave)) as session:
        session.greet(Deadline(5))
        with pytest.raises(NoAnswer):
            session.execute("x", deadline=Deadline(SOON))
        assert len(session._events) <= MAX_EVENTS


def test_a_message_may_come_in_pieces(serve: Serve) -> None:
    def behave(sock: socket.socket) -> None:
        for piece in (
            b'\r\n\r\n{"QMP": {"version": {"qemu": {}, "pack',
            b'age": "ramlock 9"}, "capabilities": []}}\r',
            b"\n",
        ):
            sock.sendall(piece)
            time.sleep(0.05)
        send(sock, {"return": {}, "id": next(requests(sock))["id"]})

    with client(serve(behave)) as session:
        session.greet(Deadline(5))
        assert session.package == "ramlock 9"
