"""Builds the victims and runs them."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from ramlock import inject, memory
from tests.qemu.guest import SHIM

HERE = Path(__file__).parent
BUILD = HERE.parents[1] / "build/victim"
CONFIG = b"RAMLOCK_OWNER_UID=%d\n" % os.geteuid()


def compile_c(source: str, output: str, *flags: str) -> Path:
    """Compiles a C file of this folder, when it is newer than what was made of it."""
    BUILD.mkdir(parents=True, exist_ok=True)
    path = BUILD / output
    if not path.exists() or path.stat().st_mtime < (HERE / source).stat().st_mtime:
        made = path.with_suffix(f".{os.getpid()}")
        subprocess.run(
            [
                "cc",
                "-O2",
                "-g",
                "-Wall",
                "-Wextra",
                "-Werror",
                *flags,
                "-o",
                str(made),
                str(HERE / source),
                "-lpthread",
            ],
            check=True,
        )
        made.replace(path)
    return path


def thread_names(pid: int) -> list[str]:
    """The names of a process's threads, which may come and go meanwhile."""
    names = []
    for tid in os.listdir(f"/proc/{pid}/task"):
        try:
            names.append(Path(f"/proc/{pid}/task/{tid}/comm").read_text().strip())
        except OSError:
            continue
    return sorted(names)


def connect(path: Path, timeout: float) -> socket.socket:
    """Connects to a shim, which binds its socket a little before it listens."""
    end = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
            return sock
        except (FileNotFoundError, ConnectionRefusedError):
            sock.close()
            if time.monotonic() > end:
                raise
            time.sleep(0.002)


class Victim:
    """A running victim.c, asleep in ppoll() until it is asked."""

    def __init__(self, directory: Path, prepare: Sequence[str] = ()) -> None:
        self.socket = directory / "socket"
        self._process = subprocess.Popen(
            [*prepare, str(compile_c("victim.c", "qemu-system-victim"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
        )
        self.pid = self._process.pid
        self.ask("mask")  # it has begun

    def tell(self, line: str) -> None:
        assert self._process.stdin
        self._process.stdin.write(line.encode() + b"\n")

    def answer(self, timeout: float = 30) -> str:
        assert self._process.stdout
        text = b""
        end = time.monotonic() + timeout
        while not text.endswith(b"\n"):
            if not select.select([self._process.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the victim does not answer: {text!r}")
            if not (byte := self._process.stdout.read(1)):
                raise EOFError(f"the victim has ended: {self._process.wait()}")
            text += byte
        return text.decode().strip()

    def ask(self, line: str, timeout: float = 30) -> str:
        self.tell(line)
        return self.answer(timeout)

    def inject(self, timeout: float = 2.0) -> inject.Injection:
        config = CONFIG + b"RAMLOCK_SOCKET=%s\n" % os.fsencode(self.socket)
        return inject.inject(self.pid, SHIM, os.fsencode(SHIM), config, timeout)

    def maps(self) -> list[memory.Mapping]:
        with memory.Memory(self.pid) as target:
            return target.maps()

    def threads(self) -> list[str]:
        return thread_names(self.pid)

    def wait_injected(self) -> None:
        self.connect(10).close()

    def connect(self, timeout: float) -> socket.socket:
        """Connects to the shim."""
        return connect(self.socket, timeout)

    def close(self) -> None:
        assert self._process.stdin and self._process.stdout
        self._process.stdin.close()
        try:
            self._process.wait(10)
        finally:
            self._process.kill()
            self._process.wait()
            self._process.stdout.close()


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Victim]:
    if not shutil.which("cc"):
        pytest.fail("there is no C compiler")
    it = Victim(tmp_path)
    try:
        yield it
    finally:
        it.close()
