"""Servers on real sockets that behave as a shim does, or as badly as a test wants."""
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

GREETING = {
    "QMP": {
        "version": {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "ramlock 0.1.0"},
        "capabilities": [],
    }
}
GIB = 1 << 30

Behaviour = Callable[[socket.socket], None]
Serve = Callable[[Behaviour], Path]


def reply(**changes: Any) -> dict[str, Any]:
    """A reply to query-ram-minguarantee of a VM with 2 GiB and nothing guaranteed, with changes."""
    block = {
        "id": "pc.ram",
        "host": 140000000000000,
        "size": 2 * GIB,
        "locked": 0,
        "page-size": 4096,
        "backing": "anonymous",
    }
    base = {
        "requested": 0,
        "all": False,
        "locked": 0,
        "armed": 0,
        "foreign": 0,
        "state": "idle",
        "ram": 2 * GIB,
        "order": "resident",
        "prefault": True,
        "generation": 0,
        "blocks": [block],
        "step-max-us": 0,
        "step-p99-us": 0,
        "rate": 0,
        "extents": 0,
    }
    return {**base, **{name.replace("_", "-"): value for name, value in changes.items()}}


def send(sock: socket.socket, message: object) -> None:
    sock.sendall(json.dumps(message).encode() + b"\r\n")


def requests(sock: socket.socket) -> Iterator[dict[str, Any]]:
    """What the client asks; the controller ends its lines, though it would not have to."""
    for line in sock.makefile("rb"):
        yield json.loads(line)


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """A function that serves every client with a behaviour, in threads of this process, and returns the path."""
    listeners: list[socket.socket] = []
    clients: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(behaviour: Behaviour) -> Path:
        path = tmp_path / f"s{len(listeners)}"
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(path))
        listener.listen()
        listeners.append(listener)

        def one(client: socket.socket) -> None:
            with client, suppress(OSError):
                behaviour(client)

        def accept() -> None:
            with suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    clients.append(client)
                    thread = threading.Thread(target=one, args=(client,), daemon=True)
                    threads.append(thread)
                    thread.start()

        thread = threading.Thread(target=accept, daemon=True)
        threads.append(thread)
        thread.start()
        return path

    yield start
    for listener in listeners:
        with suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
    for client in clients:
        with suppress(OSError):
            client.shutdown(socket.SHUT_RDWR)
    for thread in threads:
        thread.join(10)
        assert not thread.is_alive()


class Shim:
    """A behaviour that answers as docs/protocol.md says; `script` holds the replies to come, the last one stays.

    With `silent_from` it falls silent: 0 is the greeting, 1 the first reply.
    """

    def __init__(
        self,
        *script: dict[str, Any],
        refuse: str | None = None,
        events: tuple[str, ...] = (),
        silent_from: int | None = None,
    ) -> None:
        self.script = list(script) or [reply()]
        self.refuse = refuse
        self.events = events
        self.silent_from = silent_from
        self.seen: list[dict[str, Any]] = []

    def __call__(self, sock: socket.socket) -> None:
        if self.silent_from != 0:
            send(sock, GREETING)
        for request in requests(sock):
            self.seen.append(request)
            if self.silent_from is not None and len(self.seen) >= self.silent_from:
                continue
            answer: dict[str, Any] = {"return": {}}
            if request["execute"] == "query-ram-minguarantee":
                answer = {"return": self.script[0]}
                if len(self.script) > 1:
                    self.script.pop(0)
            elif request["execute"] == "set_ram_minguarantee" and self.refuse:
                answer = {"error": {"class": "GenericError", "desc": self.refuse}}
            send(sock, {**answer, "id": request["id"]})
            if request["execute"] == "set_ram_minguarantee":
                for name in self.events:
                    stamp = {"seconds": 1, "microseconds": 2}
                    send(sock, {"event": name, "data": {"requested": 1, "locked": 1}, "timestamp": stamp})

    def arguments(self) -> dict[str, Any]:
        """Of the last set_ram_minguarantee."""
        return [seen for seen in self.seen if seen["execute"] == "set_ram_minguarantee"][-1]["arguments"]  # type: ignore[no-any-return]
