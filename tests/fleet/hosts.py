"""Several hosts on this one: each with a network, process ids, /run, /opt and /etc of its own, an sshd, and VMs."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from pathlib import Path

SSHD = "/usr/sbin/sshd"
NETWORK = "198.18.{}.{}"  # for measuring networks (RFC 2544): nobody's here


def run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=30)


class Host:
    """One such host; `with` starts it, and takes everything away again."""

    def __init__(self, number: int, directory: Path, key: Path) -> None:
        self.name = f"ramlock-test-{os.getpid()}-{number}"
        self.here, self.address = (NETWORK.format(os.getpid() % 250, 4 * number + end) for end in (1, 2))
        self.directory = directory / self.name
        self._veth = f"rl{os.getpid() % 100000}-{number}"
        self._key = key
        self._init: subprocess.Popen[bytes] | None = None
        self._pid = 0  # of its process 1

    def __enter__(self) -> Host:
        self.directory.mkdir()
        try:
            self._network()
            self._boot()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._init is not None:
            if self._pid:
                os.kill(self._pid, signal.SIGKILL)  # and with process 1 all others of its namespace
            self._init.wait(30)
        subprocess.run(["ip", "netns", "del", self.name], check=False, capture_output=True, timeout=30)
        subprocess.run(["ip", "link", "del", self._veth], check=False, capture_output=True, timeout=30)

    def _network(self) -> None:
        run("ip", "netns", "add", self.name)
        run("ip", "link", "add", self._veth, "type", "veth", "peer", "name", "eth0", "netns", self.name)
        run("ip", "addr", "add", f"{self.here}/30", "dev", self._veth)
        run("ip", "link", "set", self._veth, "up")
        run("ip", "-n", self.name, "addr", "add", f"{self.address}/30", "dev", "eth0")
        run("ip", "-n", self.name, "link", "set", "eth0", "up")
        run("ip", "-n", self.name, "link", "set", "lo", "up")

    def _boot(self) -> None:
        config = self.directory / "sshd_config"
        config.write_text(
            f"HostKey {self._key}\nAuthorizedKeysFile {self._key}.pub\nPidFile none\nUsePAM no\nStrictModes no\n"
            f"Subsystem sftp internal-sftp\nPermitRootLogin prohibit-password\n"
            f"ListenAddress {self.address}\nMaxStartups 100\n"
        )
        script = self.directory / "boot"
        # What a host has for itself lies over this one's files, in memory.
        script.write_text(
            "set -e\n"
            "mount -t tmpfs tmpfs /run && mkdir /run/sshd /run/upper /run/work /run/bin\n"
            "mount -t tmpfs tmpfs /opt\n"
            "mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/upper,workdir=/run/work /etc\n"
            "mount --bind /run/bin /usr/local/sbin\n"
            f"{SSHD} -D -e -f {shlex.quote(str(config))} 2>{shlex.quote(str(self.directory / 'sshd.log'))} &\n"
            "exec sleep infinity\n"
        )
        self._init = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{self.name}", "unshare", "--mount", "--pid", "--fork", "--kill-child",
             "--mount-proc", "sh", script],
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 30
        while True:
            try:
                socket.create_connection((self.address, 22), 1).close()
                break
            except OSError:
                assert self._init.poll() is None, "the host did not come up"
                assert time.monotonic() < deadline, (self.directory / "sshd.log").read_text()
                time.sleep(0.05)
        children = Path(f"/proc/{self._init.pid}/task/{self._init.pid}/children").read_text()
        (self._pid,) = map(int, children.split())

    def run(self, *command: str, timeout: float = 60) -> str:
        """What a command says that runs there."""
        inside = ["nsenter", f"--target={self._pid}", "--mount", "--pid", "--net", *command]
        done = subprocess.run(inside, check=False, capture_output=True, text=True, timeout=timeout)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def start_vm(self, name: str, memory: str) -> None:
        """A VM whose guest never runs: its memory is there all the same."""
        self.run(
            "qemu-system-x86_64", "-accel", "tcg", "-S", "-nodefaults", "-display", "none", "-name", name,
            "-m", memory, "-daemonize", "-pidfile", f"/run/{name}.pid",
        )  # fmt: skip
