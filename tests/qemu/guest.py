"""A real QEMU as a context manager: plain, under `ramlock run`, or with the shim by environment alone."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from tests.qemu import truth
from tests.qemu.monitor import Monitor, connect

ROOT = Path(__file__).resolve().parents[2]
RAMLOCK = ROOT / ".venv/bin/ramlock"
SHIM = ROOT / "injector/ramlock/ramlock.so"
KERNEL = ROOT / ".cache/guest/vmlinuz"
INITRAMFS = ROOT / ".cache/guest/initramfs.cpio.gz"
QEMU = "qemu-system-x86_64"

MIB = 1 << 20
GIB = 1 << 30
# A guarantee may be exceeded by this much: locks go by chunks.
SLACK = 4 * MIB

How = Literal["run", "env", "plain"]


class GuestError(Exception):
    """QEMU or the guest did not do what it should; the text has what QEMU said."""


class Agent:
    """The guest's own word, over a serial port."""

    def __init__(self, path: Path, timeout: float) -> None:
        self._socket = connect(path, timeout)
        self._socket.settimeout(timeout)
        self._file = self._socket.makefile("rwb")
        self._answer()  # "ok ready"

    def ask(self, line: str, timeout: float = 120) -> str:
        """Sends a command line and returns what follows "ok". Raises GuestError and TimeoutError."""
        self.tell(line, timeout)
        return self.answer()

    def tell(self, line: str, timeout: float = 120) -> None:
        """Sends a command line; its answer is to be fetched with answer()."""
        self._socket.settimeout(timeout)
        self._file.write(line.encode() + b"\n")
        self._file.flush()

    def answer(self) -> str:
        return self._answer().removeprefix("ok").strip()

    def _answer(self) -> str:
        text = self._file.readline().decode(errors="replace").strip()
        if not text.startswith("ok"):
            raise GuestError(f"the guest agent said {text!r}")
        return text

    def uptime(self) -> float:
        return float(self.ask("uptime"))

    def fileno(self) -> int:
        """For select(): readable when an answer has come."""
        return self._socket.fileno()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Guest:
    """A running QEMU. Without `boot` it has no kernel: only firmware runs, and it is up in a fraction of a second.

    how         "run": under the ramlock command; "env": the shim by LD_PRELOAD; "plain": without ramlock
    ramlock     arguments of `ramlock run`
    env         more environment; RAMLOCK_SOCKET moves the shim's socket here too
    args        more arguments of QEMU; "{directory}" in them is replaced
    user        uid and gid to start as, without any capability
    prepare     words put before the command line, such as prlimit and its arguments
    """

    def __init__(
        self,
        *,
        how: How = "run",
        boot: bool = False,
        memory: int = GIB,
        args: Sequence[str] = (),
        ramlock: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        qemu: str = QEMU,
        machine: str = "pc",
        accel: str = "tcg",
        user: int | None = None,
        prepare: Sequence[str] = (),
        append: str = "",
        timeout: float = 60,
    ) -> None:
        self.how = how
        self.memory = memory
        self.timeout = timeout
        self.pid = 0
        self.directory = Path(tempfile.mkdtemp(prefix="ramlock-"))
        self.directory.chmod(0o755)
        if user is not None:
            os.chown(self.directory, user, user)
        self.stderr = self.directory / "stderr"
        self.console = self.directory / "console"
        self._user = user
        self._env = {**os.environ, **(env or {})}
        self._socket = self._env.get("RAMLOCK_SOCKET")
        if "--socket" in ramlock:
            self._socket = ramlock[list(ramlock).index("--socket") + 1]
        self._process: subprocess.Popen[bytes] | None = None
        self._monitor: Monitor | None = None
        self._agent: Agent | None = None
        self._boot = boot
        self.command = [
            *self._launcher(ramlock, prepare),
            *(qemu, "-accel", accel, "-machine", machine),
            *(("-m", f"{memory // MIB}M") if memory else ()),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-qmp", f"unix:{self.directory}/qmp,server=on,wait=off", "-pidfile", f"{self.directory}/pid"),
            *(self._kernel(append) if boot else ()),
            *(word.replace("{directory}", str(self.directory)) for word in args),
        ]

    def _launcher(self, ramlock: Sequence[str], prepare: Sequence[str]) -> list[str]:
        if self.how == "run":
            return [*prepare, str(RAMLOCK), "run", *ramlock, "--"]
        if self.how == "env":
            shim = SHIM
            if self._user is not None and SHIM.exists():  # this tree may be closed to other users
                shim = Path(shutil.copy(SHIM, self.directory))
            # By env, so that a command in front of it does not get the shim.
            return [*prepare, "env", f"LD_PRELOAD={shim}"]
        return list(prepare)

    def _kernel(self, append: str) -> list[str]:
        return [
            *("-kernel", str(KERNEL), "-initrd", str(INITRAMFS)),
            *("-append", f"console=ttyS0 panic=-1 quiet port=ttyS1 {append}".strip()),
            *("-serial", f"file:{self.console}"),
            *("-chardev", f"socket,id=agent,path={self.directory}/agent,server=on,wait=off"),
            *("-serial", "chardev:agent"),
        ]

    def __enter__(self) -> Guest:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and (said := self.said()):
            error.add_note(f"QEMU said: {said}")
        self.close()

    def start(self) -> None:
        """Starts QEMU and waits until its monitor (and with `boot` the guest) answers. Raises GuestError."""
        with self.stderr.open("wb") as stderr:
            self._process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=stderr,
                stderr=stderr,
                env=self._env,
                user=self._user,
                group=self._user,
                extra_groups=None if self._user is None else [],
                start_new_session=True,
            )
        self.pid = self._process.pid
        try:
            self._wait_for(self.directory / "pid")
            self._wait_for(self.directory / "qmp")
            # With -daemonize it is another process than the one that was started.
            self.pid = int((self.directory / "pid").read_text())
            self._monitor = Monitor(self.directory / "qmp", self.timeout)
            if self._boot:
                self._agent = Agent(self.directory / "agent", self.timeout)
        except (OSError, GuestError) as error:
            raise GuestError(f"{' '.join(self.command)}: {error}\n{self.said()}") from error

    def _wait_for(self, path: Path) -> None:
        deadline = time.monotonic() + self.timeout
        assert self._process is not None
        while not (path.exists() and (path.is_socket() or path.stat().st_size)):
            code = self._process.poll()
            if code not in (None, 0):
                raise GuestError(f"ended with {code}")
            if time.monotonic() >= deadline:
                raise GuestError(f"no {path.name} after {self.timeout} s")
            time.sleep(0.01)

    @property
    def monitor(self) -> Monitor:
        """QEMU's own QMP monitor."""
        assert self._monitor is not None, "not started"
        return self._monitor

    @property
    def agent(self) -> Agent:
        assert self._agent is not None, "not booted"
        return self._agent

    @property
    def shim_socket(self) -> Path:
        """Where the shim should listen."""
        if self._socket:
            return Path(self._socket)
        uid = os.getuid() if self._user is None else self._user
        if uid == 0:
            return Path(f"/run/ramlock/{self.pid}.sock")
        runtime = self._env.get("XDG_RUNTIME_DIR") or f"/run/user/{uid}"
        if Path(runtime).is_dir():
            return Path(f"{runtime}/ramlock/{self.pid}.sock")
        return Path(f"/tmp/ramlock-{uid}/{self.pid}.sock")

    def shim(self, timeout: float = 30) -> Monitor:
        """A new session with the shim."""
        return Monitor(self.shim_socket, timeout)

    def query(self) -> dict[str, Any]:
        """What the shim says of the guarantee now."""
        with self.shim() as shim:
            reply: dict[str, Any] = shim.execute("query-ram-minguarantee")
        return reply

    def settle(self, timeout: float = 90) -> dict[str, Any]:
        """Waits until the shim works no more, and returns its last word."""
        deadline = time.monotonic() + timeout
        with self.shim() as shim:
            while True:
                reply: dict[str, Any] = shim.execute("query-ram-minguarantee")
                # A guarantee asked for at the start waits for the machine; without one there is nothing to wait for.
                starting = reply["state"] == "waiting" and reply["waiting"]["reason"] == "starting"
                if reply["state"] in ("idle", "short", "waiting") and not starting:
                    return reply
                if time.monotonic() >= deadline:
                    raise GuestError(f"not settled after {timeout} s: {reply}")
                time.sleep(0.02)

    def guarantee(self, size: int, **more: Any) -> dict[str, Any]:
        """Sets a guarantee over the socket and waits for it."""
        with self.shim() as shim:
            shim.execute("set_ram_minguarantee", {"size": size, **more})
        return self.settle()

    def ram(self) -> truth.Range:
        """Where guest RAM is in QEMU, as QEMU says (one block; memory below 4 GiB)."""
        answer = self.monitor.human("gpa2hva 0")
        start = int(answer.rsplit(" ", 1)[1], 16)
        return truth.Range(start, start + self.memory)

    def blocks(self) -> dict[str, int]:
        """Names and sizes of QEMU's RAM blocks, ROMs and video RAM included."""
        lines = self.monitor.human("info ramblock").splitlines()[1:]
        # Name, page size and its unit, offset, used length; what follows differs between releases.
        return {words[0]: int(words[4], 16) for words in (line.split() for line in lines) if len(words) >= 6}

    def check_unharmed(self) -> None:
        """Fails unless the VM is the same process as ever and answers."""
        os.kill(self.pid, 0)
        assert self.monitor.execute("query-status")["running"] is True
        if self._agent:
            before = self.agent.uptime()
            time.sleep(0.02)
            assert self.agent.uptime() > before

    def said(self) -> str:
        """What QEMU wrote on stdout and stderr."""
        return self.stderr.read_text(errors="replace").strip() if self.stderr.exists() else ""

    def kill(self) -> None:
        """Ends QEMU at once."""
        if self._process is None:
            return
        if self.pid and self.pid != self._process.pid:
            _kill_stranger(self.pid)
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(30)

    def wait(self, timeout: float = 30) -> int:
        """Waits for QEMU to end by itself and returns its exit code."""
        assert self._process is not None
        return self._process.wait(timeout)

    def close(self) -> None:
        """Ends QEMU and removes what it left."""
        for session in (self._agent, self._monitor):
            if session:
                session.close()
        self.kill()
        if self.pid:
            self.shim_socket.unlink(missing_ok=True)
        shutil.rmtree(self.directory, ignore_errors=True)


def _kill_stranger(pid: int) -> None:
    """Ends a process that is no child of ours (QEMU after -daemonize) and waits until it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{pid}").exists() and time.monotonic() < deadline:
            if truth.status(pid, "State").startswith("Z"):
                return
            time.sleep(0.02)
    except (ProcessLookupError, FileNotFoundError):
        pass
    finally:
        os.close(handle)
