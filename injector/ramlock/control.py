"""A small, strict, synchronous QMP client for an already connected socket.

Why not the qemu.qmp library: it stands on asyncio, and importing both costs about as much CPU as the whole of
`ramlock status` may; and a VM may be hostile to a root controller, so every line is bounded, every wait has a deadline,
and whatever does not look like docs/protocol.md ends the session. The tests hold this client and qemu.qmp
against the same servers.

States: NEW, then after `greet` READY. Any failure but an error reply makes it BROKEN, since what the peer sends next
could belong to anything; a broken client answers every call with the error that broke it.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import enum
import json
import socket
from collections import deque
from typing import Any, NamedTuple, NoReturn

from ramlock.deadline import Deadline
from ramlock.errors import CommandError, ControlError, Disconnected, NoAnswer, NotOurs, ProtocolError, TurnedAway
from ramlock.text import printable

MAX_LINE = 1 << 20
"""Bytes of the longest line that is taken; a reply with hundreds of RAM blocks is a tenth of that."""
MAX_EVENTS = 64
"""Events kept while nobody asks for them; older ones are dropped, for they say nothing that a query does not."""

_RESTART = "ask again with ramlock status; QEMU's own log may say more"


class State(enum.Enum):
    """How far the session is."""

    NEW = enum.auto()
    READY = enum.auto()
    BROKEN = enum.auto()


class Event(NamedTuple):
    """Something that the shim told without being asked."""

    name: str
    data: dict[str, Any]


class Client:
    """One QMP session with a shim. It owns the socket."""

    def __init__(self, sock: socket.socket, where: str) -> None:
        """Take over a connected `sock`; `where` is what messages call it."""
        self.where = where
        self.package = ""
        self._socket = sock
        self._state = State.NEW
        self._broken: ControlError | None = None
        self._buffer = bytearray()
        self._searched = 0
        self._events: deque[Event] = deque(maxlen=MAX_EVENTS)
        self._last_id = 0

    @property
    def state(self) -> State:
        """How far the session is."""
        return self._state

    def greet(self, deadline: Deadline) -> None:
        """Read the greeting, make sure that it is a shim's, and negotiate. Nothing is sent to a stranger.

        Raises NotOurs when something else serves the socket, TurnedAway when the shim has no place left, Disconnected
        when it closes without a word (a shim does that to users whom it does not serve), NoAnswer when it stays silent.
        """
        self._need(State.NEW)
        try:
            greeting = self._receive(deadline)
        except ProtocolError:
            self._not_ours("does not speak QMP")
        if "QMP" not in greeting and (desc := _member(greeting, "error").get("desc")):
            self._break(
                TurnedAway(
                    f"{self.where} takes no further client now: {printable(str(desc))}",
                    "close idle clients of that socket, then try again; it has places for 16",
                )
            )
        version = _member(_member(greeting, "QMP"), "version")
        package = version.get("package")
        if not isinstance(package, str) or not package.startswith("ramlock "):
            self._not_ours("is a QMP socket of QEMU's own" if "QMP" in greeting else "does not speak QMP")
        self.package = printable(package, 100)
        self._state = State.READY
        self.execute("qmp_capabilities", deadline=deadline)

    def execute(self, command: str, arguments: dict[str, Any] | None = None, *, deadline: Deadline) -> Any:
        """Run `command` and return what it returned; events that come meanwhile are kept.

        Raises CommandError when the shim answers with an error: the session goes on then. Raises NoAnswer,
        Disconnected or ProtocolError when the session is over.
        """
        self._need(State.READY)
        self._last_id += 1
        request: dict[str, Any] = {"execute": command, "id": self._last_id}
        if arguments is not None:
            request["arguments"] = arguments
        self._send(json.dumps(request).encode("ascii") + b"\r\n", deadline)
        while True:
            message = self._receive(deadline)
            if self._keep_event(message):
                continue
            error = message.get("error")
            if message.get("id") != self._last_id:
                self._break(ProtocolError(f"{self.where} answered something that was not asked", _RESTART))
            if isinstance(error, dict):
                raise _command_error(error)
            if "return" not in message:
                self._break(ProtocolError(f"{self.where} sent neither a reply nor an error", _RESTART))
            return message["return"]

    def event(self, deadline: Deadline) -> Event | None:
        """Return the next event; None when none came before the deadline.

        Raises Disconnected or ProtocolError when the session is over.
        """
        self._need(State.READY)
        while not self._events:
            line = self._line(deadline)
            if line is None:
                return None
            if not self._keep_event(self._parse(line)):
                self._break(ProtocolError(f"{self.where} answered something that was not asked", _RESTART))
        return self._events.popleft()

    def fileno(self) -> int:
        """The socket's descriptor, for whoever waits for several sessions at once."""
        return self._socket.fileno()

    def close(self) -> None:
        """Hang up."""
        self._socket.close()

    def _need(self, state: State) -> None:
        if self._broken is not None:
            raise self._broken
        if self._state is not state:
            raise RuntimeError(f"the session is {self._state.name}, this call needs {state.name}")

    def _break(self, error: ControlError) -> NoReturn:
        self._state, self._broken = State.BROKEN, error
        raise error

    def _not_ours(self, why: str) -> NoReturn:
        self._state = State.BROKEN
        self._broken = ProtocolError(f"{self.where} is not a shim's socket", _RESTART)
        raise NotOurs(
            f"{self.where} {why}, not the ramlock shim", "give the VM by --pid or --vm, or the shim's own socket"
        ) from None

    def _keep_event(self, message: dict[str, Any]) -> bool:
        name, data = message.get("event"), message.get("data", {})
        if not isinstance(name, str):
            return False
        if not isinstance(data, dict):
            self._break(ProtocolError(f"{self.where} sent an event that is none", _RESTART))
        self._events.append(Event(name, data))
        return True

    def _send(self, data: bytes, deadline: Deadline) -> None:
        try:
            self._socket.settimeout(_timeout(deadline))
            self._socket.sendall(data)
        except TimeoutError:
            self._break(self._silence())
        except OSError:
            self._break(self._hung_up())

    def _receive(self, deadline: Deadline) -> dict[str, Any]:
        line = self._line(deadline)
        if line is None:
            self._break(self._silence())
        return self._parse(line)

    def _line(self, deadline: Deadline) -> bytes | None:
        """Return the next line that is not empty; None when the deadline came first."""
        while True:
            end = self._buffer.find(b"\n", self._searched)
            if end >= 0:
                line = bytes(self._buffer[:end]).strip()
                del self._buffer[: end + 1]
                self._searched = 0
                if line:
                    return line
                continue
            self._searched = len(self._buffer)
            if self._searched > MAX_LINE:
                self._break(ProtocolError(f"{self.where} sent a line without end", _RESTART))
            if deadline.expired:
                return None
            try:
                self._socket.settimeout(_timeout(deadline))
                data = self._socket.recv(65536)
            except TimeoutError:
                continue  # the deadline decides, at the top
            except OSError:
                self._break(self._hung_up())
            if not data:
                self._break(self._hung_up())
            self._buffer += data

    def _parse(self, line: bytes) -> dict[str, Any]:
        try:
            message = json.loads(line.decode("ascii"), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            self._break(ProtocolError(f"{self.where} sent something that is not JSON", _RESTART))
        if not isinstance(message, dict):
            self._break(ProtocolError(f"{self.where} sent something that is not a QMP message", _RESTART))
        return message

    def _silence(self) -> NoAnswer:
        return NoAnswer(
            f"{self.where} does not answer", "is the host overloaded, or the process stopped? look at it with ps"
        )

    def _hung_up(self) -> Disconnected:
        return Disconnected(f"{self.where} closed the connection", _RESTART)


def _timeout(deadline: Deadline) -> float:
    """What settimeout takes: 0 would mean non-blocking, and there is an upper limit."""
    return min(max(deadline.remaining, 0.001), 3600.0)


def _member(message: dict[str, Any], name: str) -> dict[str, Any]:
    value = message.get(name)
    return value if isinstance(value, dict) else {}


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def _command_error(error: dict[str, Any]) -> CommandError:
    desc = printable(str(error.get("desc", "no reason given")))
    reason = ""
    if desc.startswith("[") and "]" in desc:
        reason, _, desc = desc[1:].partition("]")
    return CommandError(desc.strip(), reason=reason, error_class=printable(str(error.get("class", "")), 100))
