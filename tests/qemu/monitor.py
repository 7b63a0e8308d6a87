"""A small synchronous QMP client, for QEMU's own monitor and for the shim: independent of ramlock's."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

Json = dict[str, Any]


class MonitorError(Exception):
    """The server answered with an error."""

    def __init__(self, error: Json) -> None:
        super().__init__(f"{error.get('class')}: {error.get('desc')}")
        self.kind: str = error.get("class", "")
        self.desc: str = error.get("desc", "")


class Monitor:
    """One negotiated QMP session; `greeting` and `events` are what the server said of itself."""

    def __init__(self, path: Path | str, timeout: float = 30) -> None:
        self.timeout = timeout
        self.events: list[Json] = []
        self._pending = b""
        self._socket = connect(path, timeout)
        try:
            self.greeting: Json = self._read(time.monotonic() + timeout)["QMP"]
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Monitor:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._socket.close()

    def execute(self, command: str, arguments: Mapping[str, Any] | None = None, timeout: float | None = None) -> Any:
        """Runs one command and returns what it returns. Raises MonitorError, TimeoutError and ConnectionError."""
        request: Json = {"execute": command}
        if arguments is not None:
            request["arguments"] = dict(arguments)
        deadline = time.monotonic() + (timeout or self.timeout)
        self._socket.settimeout(timeout or self.timeout)
        self._socket.sendall(json.dumps(request).encode())
        while True:
            reply = self._read(deadline)
            if "event" in reply:
                self.events.append(reply)
            elif "error" in reply:
                raise MonitorError(reply["error"])
            elif "return" in reply:
                return reply["return"]

    def wait_event(self, *names: str, timeout: float | None = None) -> Json:
        """The next event of one of these names, from those already seen on."""
        deadline = time.monotonic() + (timeout or self.timeout)
        while True:
            while self.events:
                event = self.events.pop(0)
                if event["event"] in names:
                    return event
            reply = self._read(deadline)
            if "event" in reply:
                self.events.append(reply)

    def human(self, line: str) -> str:
        """A command of QEMU's human monitor."""
        text: str = self.execute("human-monitor-command", {"command-line": line})
        return text

    def _read(self, deadline: float) -> Json:
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError("no reply from the monitor in time")
            self._socket.settimeout(left)
            data = self._socket.recv(65536)
            if not data:
                raise ConnectionError("the monitor closed the connection")
            self._pending += data
        line, self._pending = self._pending.split(b"\n", 1)
        message: Json = json.loads(line)
        return message


def connect(path: Path | str, timeout: float) -> socket.socket:
    """A connection to a UNIX socket that may not be there yet. Raises the last error when the time is over."""
    deadline = time.monotonic() + timeout
    while True:
        client = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        client.settimeout(timeout)
        try:
            client.connect(os.fspath(path))
        except (FileNotFoundError, ConnectionRefusedError):
            client.close()
            if time.monotonic() >= deadline:
                raise
            time.sleep(0.02)
        except BaseException:
            client.close()
            raise
        else:
            return client
