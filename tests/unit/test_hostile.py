"""The commands against a VM whose process is hostile: it answers as badly as it can, and its name plays with terminals.

A real process that looks like QEMU, and the socket that it serves: whatever it does, a command ends in time, by one of
its exit codes, in two lines without a traceback, and nothing that it prints can move a cursor.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ramlock import commands, guarantee, vms
from tests.conftest import absent

Run = Callable[..., tuple[int, str, str]]

NAME = "web\x1b[2J\r\n\u202etxt"

SERVER = r"""
import itertools, json, os, socket, sys, threading, time
path, how = sys.argv[1:3]
GREETING = {"QMP": {"version": {"qemu": {"major": 0, "minor": 1, "micro": 0}, "package": "ramlock 9\x1b[31m"},
                    "capabilities": []}}
BLOCK = {"id": "pc.ram\x1b]0;x\x07", "host": 1 << 40, "size": 1 << 30, "locked": 0, "page-size": 4096,
         "backing": "anon\x1b[1m"}
REPLY = {"requested": 0, "all": False, "locked": 0, "armed": 0, "foreign": 0, "state": "idle", "ram": 1 << 30,
         "order": "resident", "prefault": True, "generation": 0, "blocks": [BLOCK], "rate": 0}
EVENT = {"event": "E\x1b[2J", "data": {"desc": "\x1b[2J"}, "timestamp": {"seconds": -1, "microseconds": "x"}}


def reply(**changes):
    return {**REPLY, **{name.replace("_", "-"): value for name, value in changes.items()}}


REPLIES = {
    "good": reply(),
    "negative": reply(locked=-5, requested=-1 << 70),
    "huge numbers": reply(locked=1 << 4000),
    "floats": reply(locked=1.5e308, requested=0.1),
    "strings": reply(locked="1", requested="\x1b[2J"),
    "state": reply(state="\x1b[2Jidle"),
    "nulls": dict.fromkeys(REPLY),
    "a list": [[]] * 1000,
    "many blocks": reply(blocks=[BLOCK] * 3000),
    "a block of nothing": reply(blocks=[{}]),
    "a long name": reply(blocks=[{**BLOCK, "id": "\x1b[2J" * 100000}]),
    "short": reply(state="short", short={"reason": "\x1b[2J", "desc": "\r\x1b[1A" * 10000}),
    "short of nothing": reply(state="short", short=[]),
    "waiting": reply(state="waiting", waiting={"reason": 5, "desc": {}}),
    "launch error": reply(launch_error="\x1b[2J\x1b[H\n\nramlock: all is well"),
    "more than all": reply(locked=1 << 62, armed=1, ram=0, foreign=(1 << 64) - 1),
    "all is set": reply(requested=1 << 30, locked=1 << 30, armed=1 << 30, all=True, generation=1 << 63),
}


def talk(client):
    send = lambda message: client.sendall(json.dumps(message).encode() + b"\r\n")
    if how == "silence":
        time.sleep(60)
    if how == "drip":
        for byte in itertools.cycle(json.dumps(GREETING).replace("}", " ").encode()):
            client.sendall(bytes([byte]))
            time.sleep(0.01)
    if how == "no end":
        while True:
            client.sendall(b"x" * 65536)
    if how == "depth":
        client.sendall(b"[" * 500000 + b"\n")
    if how == "greetings":
        while True:
            send(GREETING)
    send(GREETING)
    if how == "hang up":
        return
    for line in client.makefile("rb"):
        request = json.loads(line)
        if request["execute"] == "qmp_capabilities" and how != "no negotiation":
            send({"return": {}, "id": request["id"]})
        elif how == "events":
            while True:
                send(EVENT)
        elif how == "a bad id":
            send({"return": REPLY, "id": [request["id"]]})
        elif how == "an error":
            send({"error": {"class": "\x1b[2J", "desc": "[\x1b[2J] " + "\x1b[1A" * 5000}, "id": request["id"]})
        elif how == "an error of numbers":
            send({"error": {"class": 1, "desc": [2]}, "id": request["id"]})
        elif how == "bytes":
            client.sendall(bytes(range(256)) * 100 + b"\n")
        elif how == "a deep reply":
            client.sendall(b'{"return": ' + b'{"a": ' * 100000 + b"\n")
        elif how == "never ends":
            client.sendall(b'{"return": "')
            while True:
                client.sendall(b"x" * 65536)
        elif how == "slow":
            for byte in b'{"return": "' + b"x" * 100000:
                client.sendall(bytes([byte]))
                time.sleep(0.01)
        elif how in REPLIES and request["execute"].startswith("query-ram-mi"):
            send({"return": REPLIES[how], "id": request["id"]})
        else:
            send({"return": {}, "id": request["id"]})


def serve(client):
    try:
        talk(client)
    except OSError:
        pass
    client.close()


with socket.socket(socket.AF_UNIX) as listener:
    listener.bind(path)
    listener.listen()
    print(flush=True)
    while True:
        threading.Thread(target=serve, args=(listener.accept()[0],), daemon=True).start()
"""
TALKS = [
    *("silence", "drip", "no end", "depth", "greetings", "hang up", "no negotiation", "events", "a bad id", "an error"),
    *("an error of numbers", "bytes", "a deep reply", "never ends", "slow"),
]
REPLIES = [
    *(
        "good",
        "negative",
        "huge numbers",
        "floats",
        "strings",
        "state",
        "nulls",
        "a list",
        "many blocks",
        "launch error",
    ),
    *("a block of nothing", "a long name", "short", "short of nothing", "waiting", "more than all", "all is set"),
]
PRINTED = {
    "good",
    "short of nothing",
    "many blocks",
    "a long name",
    "short",
    "launch error",
    "more than all",
    "all is set",
}
"""What is a reply, if a strange one, is shown."""


@contextmanager
def hostile(folder: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose program is named as QEMU's, which runs SERVER."""
    program = folder / "qemu-system-x86_64"
    if not program.exists():
        shutil.copy(os.path.realpath(sys.executable), program)
    environ = {**os.environ, "PYTHONHOME": sys.base_prefix, "RAMLOCK_SOCKET": str(folder / "sock")}
    command = [str(program), "-I", "-c", SERVER, str(folder / "sock"), *words, "-name", NAME]
    with subprocess.Popen(
        command, env={**environ, "LD_LIBRARY_PATH": f"{sys.base_prefix}/lib"}, stdout=subprocess.PIPE
    ) as process:
        try:
            assert process.stdout is not None
            if not process.stdout.readline():
                absent("a copy of this Python does not run")
            yield process
        finally:
            process.kill()
            (folder / "sock").unlink(missing_ok=True)


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a command in this process, in little time and memory; returns its exit code and what it printed."""
    monkeypatch.setattr(commands, "give_way", lambda: None)
    monkeypatch.setattr(vms, "ANSWER_TIME", 0.3)
    monkeypatch.setattr(guarantee, "ANSWER_TIME", 0.3)
    monkeypatch.setattr(vms, "_EXIT_TIME", 0.2)

    def call(*words: object) -> tuple[int, str, str]:
        capfd.readouterr()
        begun, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        code = commands._run([str(word) for word in words])
        out, err = capfd.readouterr()
        assert time.monotonic() - begun < 30
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 256 << 10, "KiB more than before"
        for text in (out, err):
            assert all(char.isprintable() or char == "\n" for char in text), text
        assert "Traceback" not in err
        assert len(out) < 1 << 20
        if code not in (0, 5):
            assert len(err.splitlines()) >= 2, err
            assert len(err) < 4000
        return code, out, err

    return call


@pytest.mark.parametrize("how", TALKS)
def test_a_bad_talker(tmp_path: Path, run: Run, how: str) -> None:
    with hostile(tmp_path, how) as process:
        for words in (("status", "--pid", process.pid), ("status", "--socket", tmp_path / "sock")):
            code, _, err = run(*words)
            assert code in (1, 6), err


@pytest.mark.parametrize("how", REPLIES)
def test_a_bad_reply(tmp_path: Path, run: Run, how: str) -> None:
    with hostile(tmp_path, how) as process:
        for words in ((), ("--json",)):
            code, out, err = run("status", "--pid", process.pid, *words)
            assert (code in (0, 5)) == (how in PRINTED), (code, err)
            assert bool(out) == (how in PRINTED)
