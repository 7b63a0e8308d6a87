"""`ramlock watch` on a real terminal: what is on the screen, and that the terminal is as it was afterwards."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyte
import pytest

from tests.conftest import Need
from tests.qemu.conftest import ramlock
from tests.qemu.guest import MIB, RAMLOCK, Guest

pytestmark = pytest.mark.usefixtures("lockable")

NAME = f"watched-{os.getpid()}"
EVIL = f"{NAME}-\x1b[2J\x1b[?1049h漢字" + "x" * 100
OTHER_SCREEN, CURSOR = 1049 << 5, 25 << 5
"""As pyte keeps DEC private modes."""


class Terminal:
    """`ramlock watch` on a terminal of our own, and what can be seen on it."""

    def __init__(self, *words: str, columns: int = 80, lines: int = 24, command: list[str] | None = None) -> None:
        self._ours, theirs = pty.openpty()
        self._theirs = theirs
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.before = termios.tcgetattr(theirs)
        # One line more, and columns beyond: what wraps, or is too long, would be seen there.
        self.screen = pyte.Screen(columns, lines)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            command or [str(RAMLOCK), "watch", *words],
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            env={**clean, "TERM": "xterm-256color", "LC_ALL": "C.UTF-8"},
            start_new_session=True,
        )

    def read(self, seconds: float) -> None:
        """Shows what comes within that time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            if not select.select([self._ours], [], [], left)[0]:
                return
            data = os.read(self._ours, 65536)
            self.raw += data
            self._stream.feed(data)

    def until(self, what: Callable[[], bool], timeout: float = 60) -> None:
        deadline = time.monotonic() + timeout
        while not what():
            assert time.monotonic() < deadline, "\n".join(self.screen.display)
            assert self.process.poll() is None, self.raw[-2000:]
            self.read(0.1)

    def line(self, text: str) -> str:
        """The line of the screen that begins so."""
        return next((line for line in self.screen.display if line.startswith(text)), "")

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))
        self.screen.resize(lines, columns)
        self.process.send_signal(signal.SIGWINCH)

    def ended(self) -> int:
        """Waits for the end and returns the exit code; the terminal must be as it was before."""
        deadline = time.monotonic() + 60
        while self.process.poll() is None:
            assert time.monotonic() < deadline
            self.read(0.05)
        self.read(0.2)
        assert self.raw.count(b"\x1b[?1049h") == self.raw.count(b"\x1b[?1049l") > 0
        assert self.raw.rindex(b"\x1b[?1049l") > self.raw.rindex(b"\x1b[?1049h")
        assert self.raw.rindex(b"\x1b[?25h") > self.raw.rindex(b"\x1b[?25l")
        assert CURSOR in self.screen.mode
        assert termios.tcgetattr(self._theirs) == self.before
        return self.process.returncode

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._ours)
        os.close(self._theirs)


Watch = Callable[..., Terminal]


@pytest.fixture
def watch() -> Iterator[Watch]:
    started: list[Terminal] = []

    def start(*words: str, columns: int = 80, lines: int = 24, command: list[str] | None = None) -> Terminal:
        started.append(Terminal(*words, columns=columns, lines=lines, command=command))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()


@pytest.fixture(scope="module")
def guests() -> Iterator[tuple[Guest, Guest]]:
    with (
        Guest(memory=64 * MIB, args=["-name", EVIL]) as one,
        Guest(how="plain", memory=64 * MIB, args=["-name", f"{NAME}+plain"]) as other,
    ):
        one.settle()
        yield one, other


def test_what_is_on_the_screen(watch: Watch, guests: tuple[Guest, Guest]) -> None:
    one, _ = guests
    one.guarantee(0)
    terminal = watch("--vm", f"{NAME}*")
    row = NAME[:15]
    terminal.until(lambda: "no shim" in "\n".join(terminal.screen.display) and "idle" in terminal.line(row))
    one.guarantee(32 * MIB)
    terminal.until(lambda: "reached: 32 MiB of 32 MiB" in "\n".join(terminal.screen.display))
    terminal.until(lambda: "█" in terminal.line(row))
    line = terminal.line(row)
    assert line[17:].split()[:4] == ["idle", "64M", "32M", "32M"], line
    assert 0.4 < line.count("█") / sum(line.count(char) for char in "█▒░▚·") <= 0.5, line
    # The name's escapes did nothing: one screen was entered, the head is still in its place.
    assert terminal.screen.display[0].startswith("ramlock  ")
    assert terminal.raw.count(b"\x1b[?1049h") == 1
    assert "2 VMs" in terminal.screen.display[0]
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ended() == 0


@pytest.mark.parametrize("columns", [80, 24])
def test_nothing_wraps(watch: Watch, guests: tuple[Guest, Guest], columns: int) -> None:
    """On a terminal that is twice as wide, but says it is not, nothing comes beyond what it says."""
    terminal = watch("--vm", f"{NAME}*", columns=columns)
    terminal.screen.resize(24, 2 * columns)
    terminal.until(lambda: bool(terminal.line(NAME[:15])))
    guests[0].guarantee(8 * MIB)
    terminal.read(0.7)
    assert [line for line in terminal.screen.display if line[columns:].strip()] == []
    assert terminal.screen.display[1].startswith("VM")
    if columns == 80:  # ... and after it was made smaller
        terminal.resize(60, 10)
        terminal.screen.resize(10, 120)
        terminal.screen.reset()
        terminal.read(0.7)
        assert [line for line in terminal.screen.display if line[60:].strip()] == []
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.ended() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_leave_a_clean_terminal(watch: Watch, guests: tuple[Guest, Guest], number: int) -> None:
    terminal = watch("--vm", f"{NAME}*")
    terminal.until(lambda: bool(terminal.line(NAME[:15])))
    terminal.process.send_signal(number)
    assert terminal.ended() == -number


def test_ctrl_z_gives_the_terminal_back_meanwhile(watch: Watch, guests: tuple[Guest, Guest]) -> None:
    terminal = watch("--vm", f"{NAME}*")
    terminal.until(lambda: bool(terminal.line(NAME[:15])))
    terminal.process.send_signal(signal.SIGTSTP)
    terminal.until(lambda: Path(f"/proc/{terminal.process.pid}/stat").read_text().split(")")[1].split()[0] == "T")
    terminal.read(0.2)
    assert terminal.raw.count(b"\x1b[?1049h") == terminal.raw.count(b"\x1b[?1049l") == 1
    terminal.process.send_signal(signal.SIGCONT)
    terminal.until(lambda: terminal.raw.count(b"\x1b[?1049h") == 2)
    terminal.process.send_signal(signal.SIGTERM)
    assert terminal.ended() == -signal.SIGTERM


def test_a_terminal_that_goes_away(watch: Watch, guests: tuple[Guest, Guest]) -> None:
    terminal = watch("--vm", f"{NAME}*")
    terminal.until(lambda: bool(terminal.line(NAME[:15])))
    os.dup2(os.open("/dev/null", os.O_RDWR), terminal._ours)
    os.dup2(os.open("/dev/null", os.O_RDWR), terminal._theirs)
    assert terminal.process.wait(60) != 0


def test_as_lines(guests: tuple[Guest, Guest], tmp_path: Path) -> None:
    one, other = guests
    one.guarantee(0)
    log = tmp_path / "log"
    with log.open("wb") as file:
        process = subprocess.Popen([str(RAMLOCK), "watch", "--vm", f"{NAME}*"], stdout=file, stderr=file)
    try:
        end = time.monotonic() + 60
        while (text := log.read_text()).count("\n") < 2 and time.monotonic() < end:
            time.sleep(0.05)
        one.guarantee(20 * MIB)
        while "reached: 20 MiB of 20 MiB" not in (text := log.read_text()) and time.monotonic() < end:
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == -signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    assert f"{NAME}+plain (pid {other.pid}) no shim" in text
    assert "reached: 20 MiB of 20 MiB" in text
    assert "\x1b" not in text


def test_a_reader_that_has_seen_enough(guests: tuple[Guest, Guest]) -> None:
    process = subprocess.Popen([str(RAMLOCK), "watch", "--interval", "0.1"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()
    for size in (4, 8, 12):
        guests[0].guarantee(size * MIB)
    assert process.wait(60) == 1


def test_in_tmux(need: Need, watch: Watch, guests: tuple[Guest, Guest], tmp_path: Path) -> None:
    """tmux's own idea of what a terminal is; afterwards the shell's line is where it was."""
    need("tmux", "tmux")
    server = ["tmux", "-f", "/dev/null", "-S", str(tmp_path / "tmux")]

    def tmux(*words: str) -> str:
        return subprocess.run([*server, *words], capture_output=True, text=True, timeout=60, check=True).stdout

    script = f"trap : INT; echo before; {RAMLOCK} watch --vm '{NAME}*'; echo after $?; exec sleep 600"
    tmux("new-session", "-d", "-x", "80", "-y", "24", "sh", "-c", script)
    try:
        end = time.monotonic() + 60
        while NAME[:15] not in (shown := tmux("capture-pane", "-p")) and time.monotonic() < end:
            time.sleep(0.1)
        assert NAME[:15] in shown
        assert tmux("display", "-p", "#{alternate_on} #{cursor_flag}").split() == ["1", "0"]
        tmux("send-keys", "C-c")
        while "after" not in (shown := tmux("capture-pane", "-p")) and time.monotonic() < end:
            time.sleep(0.1)
        assert shown.split() == ["before", "^Cafter", "0"] or shown.split() == ["before", "after", "0"], shown
        assert tmux("display", "-p", "#{alternate_on} #{cursor_flag}").split() == ["0", "1"]
    finally:
        tmux("kill-server")


def test_help() -> None:
    assert "Ctrl-C" in ramlock("watch", "--help").stdout
