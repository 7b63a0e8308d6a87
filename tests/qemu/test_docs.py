"""The commands of the pages, run as they stand there, against two VMs that no other process of this machine sees.

The commands are taken out of the pages' text, so a page that changes is tested as it is. They run in namespaces of
their own (processes, mounts, network), where the VMs have the names of the pages and no other VM can be meant.
Host.text() puts in the values that an example cannot know; what needs more than a VM is in ELSEWHERE of
tests/unit/test_docs.py, with the reason.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests import pages
from tests.pages import Command
from tests.qemu.guest import MIB, RAMLOCK, ROOT, SHIM

pytestmark = pytest.mark.usefixtures("lockable", "root")

QEMU = "-S -accel tcg -machine pc -nodefaults -no-user-config -display none"
UUID = "0c9f3bb2-5d0f-4a5f-9f1c-3f3f1f2a7b11"
"""Of docs/policy.md."""
LASTING = r"ramlock (watch|daemon|metrics --listen)\b"
"""Commands that go on until they are told to end."""
STARTS = r"qemu-system-x86_64 .*\.\.\.$"
SCRIPT = """
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /var/lib
mkdir -p /run/etc /run/work /var/lib/prometheus/node-exporter
mount -t overlay overlay -o lowerdir=/etc,upperdir=/run/etc,workdir=/run/work /etc
mkdir /etc/ramlock
ip link set lo up
echo ready
exec sleep infinity
"""


class Host:
    """A host as the pages' examples have it: only these VMs, `web` and `db`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        words = ["unshare", "--mount", "--pid", "--net", "--fork", "--kill-child", "--mount-proc", "sh", "-ec", SCRIPT]
        self._outer = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        assert self._outer.stdout
        assert self._outer.stdout.readline() == "ready\n", "the namespaces could not be made"
        self._inner = int(Path(f"/proc/{self._outer.pid}/task/{self._outer.pid}/children").read_text())
        self._vms: list[subprocess.Popen[str]] = []
        self.pid = 0
        self.done: set[str] = set()
        """The commands that were run; some are on several pages."""

    def text(self, text: str) -> str:
        """A page's text with values for the examples': gigabytes scaled down, this VM's pid, the shim of this tree."""
        text = re.sub(r"\b(\d+)G\b", lambda match: f"{int(match[1]) * 64}M", text)
        text = text.replace("1073741824", str(64 * MIB)).replace("/usr/local/lib/ramlock/ramlock.so", str(SHIM))
        return re.sub(r"\b4711\b|\bPID\b", str(self.pid), text)

    def words(self, command: str) -> list[str]:
        path = f"PATH={shlex.quote(str(RAMLOCK.parent))}:$PATH; cd {shlex.quote(str(self.directory))}; "
        return [*("nsenter", f"--target={self._inner}", "--mount", "--pid", "--net"), "bash", "-c", path + command]

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.words(command), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False
        )

    def begin(self, command: str) -> subprocess.Popen[str]:
        """Starts what does not end by itself; its output goes to the file `said`."""
        with (self.directory / "said").open("w") as output:
            return subprocess.Popen(
                self.words(command), stdin=subprocess.DEVNULL, stdout=output, stderr=output, text=True
            )

    def end(self, process: subprocess.Popen[str]) -> int:
        """Presses Ctrl-C in what begin() started, and returns its exit code."""
        (inside,) = map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())
        os.kill(inside, signal.SIGINT)
        return process.wait(30)

    def start(self, command: str, more: str) -> int:
        """Starts a VM by a page's command, which ends in "...", and returns its pid there."""
        file = self.directory / f"pid-{len(self._vms)}"
        line = self.text(command).removesuffix("...")
        self._vms.append(self.begin(f"{line} {QEMU} {more} -pidfile {file}"))
        wait(lambda: file.exists() and file.read_text().endswith("\n"), self.said)
        return int(file.read_text())

    def said(self) -> str:
        """What the latest command that does not end has said."""
        return (self.directory / "said").read_text()

    def close(self) -> None:
        """Ends the first process there, and with it all others."""
        self._outer.kill()
        for process in (self._outer, *self._vms):
            process.wait(30)
        assert self._outer.stdout
        self._outer.stdout.close()


def shown(name: str) -> list[Command]:
    """The commands of a page that a VM is enough for."""
    pattern = r"(ramlock|printf|eval|LD_PRELOAD=\S+) "
    return [command for command in pages.commands(ROOT / name) if re.match(pattern, command.text)]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    made = Host(tmp_path_factory.mktemp("docs"))
    try:
        run, preload = (command.text for command in shown("README.md") if re.search(STARTS, command.text))
        made.pid = made.start(run, "")
        made.start(preload, f"-name db -uuid {UUID}")
        policy = next(block for block in pages.blocks(ROOT / "docs/policy.md") if block.language == "toml")
        for file in ("policy.toml", "/run/etc/ramlock/policy.toml"):
            target = Path(f"/proc/{made._inner}/root{file}") if file.startswith("/") else made.directory / file
            target.write_text(made.text(policy.text))
        yield made
    finally:
        made.close()


PAGES = ["README.md", "docs/libvirt.md", "docs/operating.md", "docs/policy.md", "docs/installing.md"]


def wait(until: Callable[[], object], what: Callable[[], object]) -> None:
    """Waits for something to be so. Raises AssertionError with `what` there was instead."""
    deadline = time.monotonic() + 60
    while not until():
        assert time.monotonic() < deadline, what()
        time.sleep(0.05)


@pytest.mark.parametrize("page", PAGES)
def test_page(host: Host, page: str) -> None:
    """Each command of the page does what it says, in the order of the page."""
    commands = [command for command in shown(page) if not re.search(STARTS, command.text)]
    assert commands
    for command in commands:
        bare = command.text.split(" #")[0].strip()
        if bare in host.done:
            continue
        host.done.add(bare)
        if re.match(LASTING, command.text):
            last(host, command)
            continue
        done = host.run(f"set -o pipefail; {host.text(command.text)}")
        said = (command.where, done.returncode, done.stdout, done.stderr)
        # A host that is not as it should be is doctor's to tell of.
        assert done.returncode == 0 or (done.returncode == 1 and command.text.startswith("ramlock doctor")), said
        assert "Traceback" not in done.stderr, said
        judge(host, command.text, done, said)


def last(host: Host, command: Command) -> None:
    """A command that goes on does what it is there for, until Ctrl-C."""
    text = host.text(command.text).split(" #")[0].strip()
    process = host.begin(f"exec {text}")
    if "daemon" in text:
        wait(
            lambda: status(host, "db")["requested"] == 128 * MIB, host.said
        )  # by its UUID, which comes before its name
    elif "metrics" in text:
        fetch = f"{sys.executable} -c \"import urllib.request as u; print(u.urlopen('http://{text.split()[-1]}/metrics').read())\""
        wait(lambda: "ramlock_locked_bytes{" in host.run(fetch).stdout, host.said)
    else:
        log = host.directory / (text.split(">>")[1] if ">>" in text else "said")
        wait(lambda: log.exists() and "db" in log.read_text(), host.said)
    assert host.end(process) in (0, 130), (command.where, host.said())
    assert "Traceback" not in host.said()


def judge(host: Host, text: str, done: subprocess.CompletedProcess[str], said: object) -> None:
    """Holds what a command came to against what the pages say of it."""
    if text.startswith("ramlock set "):
        wanted = {"1G": 64, "2G": 128, "50%": 128}[text.split()[2]] * MIB
        now = status(host)
        assert (now["requested"], now["state"]) == (wanted, "idle"), said
    elif text.startswith("ramlock inject "):
        assert status(host)["requested"] == 64 * MIB, said
    elif text.startswith("ramlock eject "):
        assert host.run("ramlock status --vm web").returncode == 6, said
        assert host.run("ramlock inject --vm web").returncode == 0, said  # what follows on a page supposes a shim
    elif text.startswith("printf "):
        assert [list(json.loads(line)) for line in done.stdout.splitlines()][:3] == [["QMP"], ["return"], ["return"]], (
            said
        )
    elif text.startswith("ramlock apply ") or text.split(" #")[0].strip() == "ramlock list":
        assert "db" in done.stdout, said


def status(host: Host, name: str = "web") -> dict[str, object]:
    done = host.run(f"ramlock status --vm {name} --json")
    assert done.returncode == 0, done.stderr
    reply = json.loads(done.stdout)
    assert isinstance(reply, dict)
    return reply
