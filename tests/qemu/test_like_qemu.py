"""The same is said to QEMU's own monitor and to the shim in the same process, and the answers are the same bytes.

What may differ: names and versions, the limits (the shim's are lower), and what docs/protocol.md lists.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu.conversations import ARGUMENTS, CONVERSATIONS, NEGOTIATE, WORDS, Conversation, invented
from tests.qemu.guest import MIB, Guest

INVENTED = int(os.environ.get("RAMLOCK_STRESS_CONVERSATIONS", "400"))
# Whatever the server was in the middle of, it answers this.
LAST = (b"\xff", b'{"execute": "query-version", "id": "the last"}', b'{"execute": "qmp_capabilities", "id": "the end"}')


@pytest.fixture(scope="module")
def sockets() -> Iterator[tuple[Path, Path]]:
    """QEMU's monitor and the shim's socket."""
    with Guest(memory=64 * MIB, args=("-qmp", "unix:{directory}/other,server=on,wait=off")) as guest:
        guest.settle()
        yield guest.directory / "other", guest.shim_socket
        guest.check_unharmed()


def talk(path: Path, conversation: Conversation) -> list[bytes]:
    """Says it all, and returns the lines of the server, its greeting first and without events."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(path))
        heard = b""
        while b"\n" not in heard:
            heard += client.recv(65536)
        for piece in (*conversation, *LAST):
            client.sendall(piece)
        while b'"the end"' not in heard[heard.rfind(b"\n", 0, -1) + 1 :] or not heard.endswith(b"\n"):
            data = client.recv(65536)
            assert data, heard
            heard += data
    # QEMU writes a number that is too large as it is for C, which is not JSON.
    lines = [re.sub(rb"(?<=[ \[-])inf(?=[],}])", b"1e999", line) for line in heard.split(b"\r\n")]
    assert lines.pop() == b""
    assert not any(re.search(rb"[^ -~]", line) for line in lines), "not one line of ASCII each"
    return [line for line in lines if not line.startswith(b'{"event": ')]


def words(conversation: Conversation, index: int) -> Conversation:
    """The conversation with the words that QEMU (0) or the shim (1) understands."""
    pieces = []
    for piece in conversation:
        for word, meanings in WORDS.items():
            piece = piece.replace(word, meanings[index])
        pieces.append(piece)
    return tuple(pieces)


def without_versions(line: bytes) -> object:
    """The line itself; where it has a version, a list of commands, or an id with members in no order, parsed."""
    reply: dict[str, Any] = json.loads(line)
    returned, identity = reply.get("return"), reply.get("id")
    version = returned if isinstance(returned, dict) else {}
    if "qemu" in version:
        assert set(version) == {"qemu", "package"}
        assert sorted(version["qemu"]) == ["major", "micro", "minor"]
        assert all(type(number) is int for number in version["qemu"].values())
        assert isinstance(version["package"], str)
        return {**reply, "return": "a version"}
    if isinstance(returned, list):
        assert all(set(command) == {"name"} for command in returned)
        return {**reply, "return": "commands"}
    return reply if isinstance(identity, dict | list) else line


def compare(sockets: tuple[Path, Path], conversation: Conversation) -> None:
    theirs = [without_versions(line) for line in talk(sockets[0], words(conversation, 0))[1:]]
    ours = [without_versions(line) for line in talk(sockets[1], words(conversation, 1))[1:]]
    for i, line in enumerate(theirs):
        if isinstance(line, bytes):
            for name, other in ARGUMENTS.items():
                line = line.replace(b"'%s'" % name, b"'%s'" % other)
            theirs[i] = line
    assert ours == theirs, conversation


def test_greeting(sockets: tuple[Path, Path]) -> None:
    theirs, ours = (json.loads(talk(path, (NEGOTIATE,))[0]) for path in sockets)
    for greeting in (theirs, ours):
        assert set(greeting) == {"QMP"}
        assert set(greeting["QMP"]) == {"version", "capabilities"}
        assert set(greeting["QMP"]["version"]) == {"qemu", "package"}
        assert set(greeting["QMP"]["version"]["qemu"]) == {"major", "minor", "micro"}
    assert ours["QMP"]["capabilities"] == []  # of out-of-band execution the shim has no need


@pytest.mark.parametrize("start", range(0, len(CONVERSATIONS), 100))
def test_conversations(sockets: tuple[Path, Path], start: int) -> None:
    for conversation in CONVERSATIONS[start : start + 100]:
        compare(sockets, conversation)


def test_invented_conversations(sockets: tuple[Path, Path]) -> None:
    for seed in range(INVENTED):
        compare(sockets, invented(seed))
