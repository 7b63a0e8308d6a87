"""Injection into QEMUs that are busy with something else, or no longer what is on disk; and over and over."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import fcntl
import json
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from ramlock import guestram, install
from tests.conftest import Need, absent
from tests.qemu import truth
from tests.qemu.conftest import assert_holds, assert_refused, ramlock
from tests.qemu.guest import INITRAMFS, KERNEL, MIB, QEMU, RAMLOCK, ROOT, SHIM, Guest
from tests.qemu.monitor import Monitor, connect

pytestmark = pytest.mark.usefixtures("lockable", "root")

NOBODY = 65534
SIZE = 6 * MIB
ROUNDS = int(os.environ.get("RAMLOCK_STRESS_ROUNDS", "6"))
KILLS = int(os.environ.get("RAMLOCK_STRESS_KILLS", "8"))


def inject(guest: Guest, size: int = SIZE) -> None:
    """Injects; afterwards the kernel holds what was asked for, in guest RAM only."""
    result = ramlock("inject", "--pid", guest.pid, "--guarantee", size, "--json")
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout)["source"] == "qemu"
    assert_holds(guest, size)


def eject(guest: Guest) -> None:
    result = ramlock("eject", "--pid", guest.pid)
    assert result.returncode == 0, result.stderr
    assert truth.vm_lck(guest.pid) == 0


def eventually(what: Callable[[], bool], timeout: float = 60) -> None:
    deadline = time.monotonic() + timeout
    while not what():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


# What is mapped is no longer what is at its path, as after an upgrade of the distribution's packages.


def libc_of(program: str) -> Path:
    listed = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    found = re.search(r"libc\.so\.6 => (\S+)", listed)
    assert found, listed
    return Path(found[1])


def installed_copy(folder: Path) -> Guest:
    """A QEMU whose program and libc are files in `folder`."""
    program = shutil.which(QEMU)
    assert program
    shutil.copy(program, folder / QEMU)
    libc = libc_of(program)
    shutil.copy(libc, folder / libc.name)
    environ = {"LD_LIBRARY_PATH": str(folder), "QEMU_MODULE_DIR": f"{libc.parent.resolve()}/qemu"}
    data = subprocess.run([program, "-L", "help"], capture_output=True, text=True, check=True).stdout.split()
    args = [word for path in data for word in ("-L", path)]
    # By env, so that only QEMU gets that libc.
    prepare = ("env", *(f"{name}={value}" for name, value in environ.items()))
    return Guest(how="plain", qemu=str(folder / QEMU), prepare=prepare, args=args)


def replace(path: Path, content: bytes | None) -> None:
    """Puts another file there, as a package manager does: the old one lives on without a name."""
    if content is None:
        path.unlink()
        return
    fresh = path.with_name("fresh")
    fresh.write_bytes(content)
    fresh.chmod(0o755)
    fresh.rename(path)


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF" + bytes(4092)], ids=["gone", "empty", "other"])
@pytest.mark.parametrize("which", [("libc.so.6",), (QEMU,), ("libc.so.6", QEMU)], ids=["libc", "qemu", "both"])
def test_replaced_on_disk(tmp_path: Path, which: tuple[str, ...], content: bytes | None) -> None:
    with installed_copy(tmp_path) as guest:
        guest.check_unharmed()
        for name in which:
            replace(tmp_path / name, content)
        maps = Path(f"/proc/{guest.pid}/maps").read_text()
        assert all(f"{tmp_path / name} (deleted)" in maps for name in which)
        inject(guest)
        guest.check_unharmed()
        eject(guest)
        inject(guest)
        guest.check_unharmed()


# A QEMU that starts other programs while the shim is in it.

SCRIPT = """#!/bin/sh
ls -l /proc/self/fd >"{folder}/fds.$1"
grep VmLck /proc/self/status >"{folder}/locked.$1"
{wait}
: >"{folder}/done.$1"
"""


@pytest.fixture
def tap(need: Need) -> None:
    """Skips where QEMU cannot make network interfaces."""
    need("/dev/net/tun")
    try:
        with open("/dev/net/tun", "rb+", buffering=0) as tun:
            fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"", 0x1002))  # TUNSETIFF: IFF_TAP | IFF_NO_PI
    except OSError as error:
        absent(f"no network interface can be made here: {error}")


def script(folder: Path, wait: str = "") -> str:
    path = folder / "ifup"
    path.write_text(SCRIPT.format(folder=folder, wait=wait))
    path.chmod(0o755)
    return str(path)


def interface(number: int) -> str:
    return f"rl{os.getpid() % 1_000_000}n{number}"


def plug(monitor: Monitor, number: int, program: str) -> None:
    monitor.execute(
        "netdev_add",
        {
            "type": "tap",
            "id": f"net{number}",
            "ifname": interface(number),
            "script": program,
            "downscript": program,
        },
    )
    monitor.execute("device_add", {"driver": "e1000", "id": f"nic{number}", "netdev": f"net{number}"})


def check_child(folder: Path, number: int) -> None:
    """The script ran; nothing of ramlock's was open in it, and nothing locked."""
    name = interface(number)
    assert (folder / f"done.{name}").exists()
    files = dict(re.findall(r" (\d+) -> (.*)", (folder / f"fds.{name}").read_text()))
    assert len(files) >= 4
    assert not [file for fd, file in files.items() if int(fd) > 2 and re.match(r"socket:|/memfd:|.*ramlock", file)]
    assert (folder / f"locked.{name}").read_text().split() == ["VmLck:", "0", "kB"]


@pytest.mark.usefixtures("tap")
def test_tap_scripts(tmp_path: Path) -> None:
    """At its start, then with the shim in it, while it locks, and without it again."""
    program = script(tmp_path)
    netdev = f"tap,id=net0,ifname={interface(0)},script={program},downscript={program}"
    with Guest(how="plain", args=["-netdev", netdev, "-device", "e1000,netdev=net0"]) as guest:
        check_child(tmp_path, 0)
        guest.check_unharmed()
        inject(guest)
        plug(guest.monitor, 1, program)
        check_child(tmp_path, 1)
        assert_holds(guest, SIZE)
        assert ramlock("set", "900M", "--no-wait", "--pid", guest.pid).returncode == 0
        plug(guest.monitor, 2, program)
        check_child(tmp_path, 2)
        guest.settle()
        assert_holds(guest, 900 * MIB)
        eject(guest)
        plug(guest.monitor, 3, program)
        check_child(tmp_path, 3)
        guest.check_unharmed()
        inject(guest)
        guest.monitor.execute("device_del", {"id": "nic1"})
        guest.check_unharmed()


@pytest.mark.usefixtures("tap")
def test_while_a_tap_script_runs(tmp_path: Path) -> None:
    """QEMU waits for its child then and is never idle: refused in time, and nothing happened."""
    os.mkfifo(tmp_path / "go")
    program = script(tmp_path, f'read -r _ <"{tmp_path}/go"')
    with Guest(how="plain") as guest:
        plugging = threading.Thread(target=plug, args=(guest.monitor, 0, program))
        plugging.start()
        try:
            eventually(lambda: (tmp_path / f"locked.{interface(0)}").exists())
            before = Path(f"/proc/{guest.pid}/maps").read_text()
            begun = time.monotonic()
            result = ramlock("inject", "--pid", guest.pid, "--timeout", "0.5", timeout=60)
            assert_refused(result, 4)
            assert "never seen idle" in result.stderr
            assert time.monotonic() - begun < 30
            assert Path(f"/proc/{guest.pid}/maps").read_text() == before
        finally:
            (tmp_path / "go").write_text("on\n")
            plugging.join(60)
        assert not plugging.is_alive()
        check_child(tmp_path, 0)
        (tmp_path / "ifup").write_text("#!/bin/sh\n")  # closing it runs the script once more
        inject(guest)
        guest.check_unharmed()


# A QEMU whose memory is being saved.


def filled(memory: int = 256 * MIB, **more: Any) -> Guest:
    """A guest of many vCPUs whose memory has something in it."""
    args = ["-smp", "16", *more.pop("args", ())]
    return Guest(how="plain", boot=True, memory=memory, args=args, **more)


AS_BOOTED = (
    *("-kernel", str(KERNEL), "-initrd", str(INITRAMFS), "-append", "-"),
    *("-serial", "null", "-chardev", "socket,id=agent,path={directory}/agent,server=on,wait=off"),
    *("-serial", "chardev:agent"),
)
"""The machine of a guest that was booted; what runs in it comes by migration."""


def attempt(guest: Guest) -> bool:
    """Injects or is refused, in time and with a reason. Returns whether it was injected."""
    result = ramlock("inject", "--pid", guest.pid, "--guarantee", SIZE, timeout=60)
    if result.returncode:
        assert_refused(result, 4)
        assert truth.vm_lck(guest.pid) == 0
        return False
    assert truth.locked(guest.pid).resident >= SIZE
    return True


def migration(monitor: Monitor) -> str:
    return str(monitor.execute("query-migrate").get("status", "none"))


def test_during_a_migration(tmp_path: Path) -> None:
    """On both sides of one: what arrives is what was sent."""
    saved = tmp_path / "saved"
    with filled() as guest:
        guest.agent.ask(f"touch {64 * MIB}")
        guest.check_unharmed()
        monitor = guest.monitor
        monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 20})
        monitor.execute("migrate", {"uri": f"exec:cat >{saved}"})
        eventually(lambda: migration(monitor) == "active")
        inject(guest)
        assert migration(monitor) == "active"
        guest.check_unharmed()
        eject(guest)
        inject(guest, 32 * MIB)
        assert migration(monitor) == "active"
        monitor.execute("migrate-set-parameters", {"max-bandwidth": 1 << 34, "downtime-limit": 60_000})
        eventually(lambda: migration(monitor) == "completed", 120)
        assert_holds(guest, 32 * MIB)
        monitor.execute("cont")
        guest.agent.ask("verify")
        guest.check_unharmed()
    (tmp_path / "first").write_bytes(saved.read_bytes()[:4_000_000])
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    incoming = f"exec:cat {tmp_path}/first; cat {fifo}"
    with Guest(how="plain", memory=256 * MIB, args=["-smp", "16", *AS_BOOTED, "-incoming", incoming]) as guest:
        eventually(lambda: migration(guest.monitor) == "active")
        print("injected:", done := attempt(guest))
        fifo.write_bytes(saved.read_bytes()[4_000_000:])
        eventually(lambda: guest.monitor.execute("query-status")["status"] != "inmigrate", 120)
        if not done:
            inject(guest)
        assert_holds(guest, SIZE)
        guest.monitor.execute("cont")
        with connect(guest.directory / "agent", 60) as agent, agent.makefile("rwb") as file:
            file.write(b"verify\n")
            file.flush()
            assert file.readline().startswith(b"ok")
        assert_holds(guest, SIZE)
        guest.check_unharmed()


@contextmanager
def in_background(monitor: Monitor, line: str) -> Iterator[list[str]]:
    """Runs a command of QEMU's human monitor that takes its time; the list has its answer afterwards."""
    answer: list[str] = []
    thread = threading.Thread(target=lambda: answer.append(monitor.human(line)))
    thread.start()
    try:
        yield answer
    finally:
        thread.join(120)
        assert not thread.is_alive()


def test_during_savevm_and_loadvm(tmp_path: Path, need: Need) -> None:
    """Its main loop is a nested one then, or none: injected or refused, and the snapshot is whole."""
    need("qemu-img", "qemu-utils")
    disk = tmp_path / "disk.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", str(disk), "64M"], check=True)
    slow = ("-object", "throttle-group,id=slow,x-bps-total=16000000,x-iops-total=0")
    file = f"file.driver=throttle,file.throttle-group=slow,file.file.driver=file,file.file.filename={disk}"
    with filled(args=[*slow, "-blockdev", f"driver=qcow2,node-name=disk,{file}"]) as guest:
        guest.agent.ask(f"touch {64 * MIB}")
        outcomes = []
        for command in ("savevm here", "loadvm here"):
            with in_background(guest.monitor, command) as answer:
                while not answer:
                    done = attempt(guest)
                    outcomes.append((done, "before" if answer else "after"))
                    if done:
                        eject(guest)
            assert answer == [""], command
            guest.check_unharmed()
        print("injected; the command had ended before or ended after that:", outcomes)
        inject(guest)
        guest.agent.ask("verify")
        guest.check_unharmed()


# A shim that does not know guest RAM yet.


def test_guest_ram_is_compared_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """QEMU's main loop may take its time before the shim can look: it is waited for, and compared then."""
    answers = []

    def slow(reply: object) -> list[guestram.Block]:
        answers.append(honest(reply))
        return [] if len(answers) < 5 else answers[-1]

    honest = guestram.parse_reply
    monkeypatch.setattr(guestram, "parse_reply", slow)
    with Guest(how="plain") as guest:
        for _ in ("injected", "already there"):
            with install.installed(guest.pid, install.Options(), os.environ) as (_, outcome):
                assert outcome.source == "qemu"
            assert len(answers) >= 5
            answers.clear()
        guest.check_unharmed()


def test_nothing_is_locked_before_it_is_compared() -> None:
    with Guest(how="plain", args=["-preconfig", "-object", "memory-backend-ram,id=spare,size=64M"]) as guest:
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", SIZE)
        assert_refused(result, 4)
        assert "not known yet" in result.stderr
        guest.monitor.execute("x-exit-preconfig")
        assert guest.query()["requested"] == 0
        inject(guest)
        guest.check_unharmed()


# One's own VM, without being root.

AS_NOBODY = """
import codecs, ctypes, importlib, logging, os, pkgutil, sys
import elftools, ramlock
for package in (elftools, ramlock):  # that user may not read Python's own files
    for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if module.name not in ("ramlock.__main__", "ramlock.ramlock"):
            importlib.import_module(module.name)
codecs.lookup("ascii"), codecs.lookup("idna")
os.setgroups([]), os.setgid(65534), os.setuid(65534)
os.environ["RAMLOCK_SHIM"] = sys.argv.pop(1)
from ramlock.commands import main
main()
"""


def as_nobody(*args: object, shim: Path) -> subprocess.CompletedProcess[str]:
    """Runs the ramlock command as another user, who has no capability."""
    return subprocess.run(
        [sys.executable, "-c", AS_NOBODY, str(shim), *map(str, args)],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=60,
        check=False,
    )


def test_ones_own_without_root() -> None:
    """All verbs; root finds the same shim, and other users' VMs stay out of reach."""
    with Guest(how="plain", user=NOBODY) as guest, Guest(how="plain") as other:
        shim = Path(shutil.copy(SHIM, guest.directory))
        for _ in range(2):
            result = as_nobody("preflight", "--pid", guest.pid, shim=shim)
            assert result.returncode == 0, (result.stdout, result.stderr)
            result = as_nobody("inject", "--pid", guest.pid, "--guarantee", SIZE, "--json", shim=shim)
            assert result.returncode == 0, result.stderr
            assert not json.loads(result.stdout)["already"]
            assert_holds(guest, SIZE)
            assert as_nobody("status", "--pid", guest.pid, shim=shim).returncode == 0
            assert as_nobody("set", SIZE // 2, "--pid", guest.pid, shim=shim).returncode == 0
            assert_holds(guest, SIZE // 2)
            assert ramlock("status", "--pid", guest.pid).returncode == 0
            assert_refused(as_nobody("inject", "--pid", other.pid, shim=shim), 7)
            result = as_nobody("eject", "--pid", guest.pid, shim=shim)
            assert result.returncode == 0, result.stderr
            assert truth.vm_lck(guest.pid) == 0
            guest.check_unharmed()
        other.check_unharmed()


# Over and over.


def left(guest: Guest) -> dict[str, Any]:
    """What could pile up in QEMU. Its own pool of workers comes and goes, and its heap grows: these are left out."""
    files = Counter()  # type: Counter[str]
    for file in Path(f"/proc/{guest.pid}/fd").iterdir():
        files[re.sub(r"\d+", "N", os.readlink(file))] += 1
    entries = list(truth.mappings(guest.pid))
    return {
        "threads": sorted(name for name in truth.threads(guest.pid) if name.startswith("ramlock")),
        "files": files,
        "mapped": Counter(entry.path for entry in entries if entry.path.startswith(("/", "[stack"))),
        "anonymous": sum(entry.path == "" for entry in entries),
        "locked": sum("lo" in entry.flags for entry in entries),
        "limit": truth.memlock_limit(guest.pid),
        "folder": sorted(str(path) for path in Path("/run/ramlock").glob(f"{guest.pid}*")),
    }


def test_rounds() -> None:
    """After the first rounds nothing grows: neither with the shim in it nor without."""
    with Guest(how="plain", args=["-smp", "4"]) as guest:
        first: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for _ in range(ROUNDS):
            inject(guest)
            during = left(guest)
            eject(guest)
            first.append((during, left(guest)))
        # Arenas of malloc() are mappings without a name; there can be as many as threads, but not more each round.
        for now in first[1:]:
            for was, is_now in zip(first[0], now, strict=True):
                assert is_now["anonymous"] <= was["anonymous"] + 8
                assert {**is_now, "anonymous": 0} == {**was, "anonymous": 0}
        guest.check_unharmed()


def test_killed_at_any_instant() -> None:
    """Injections and ejections, each killed at a random instant of its life; the VM answers, and the next succeeds."""
    seed = int(os.environ.get("RAMLOCK_STRESS_SEED", random.randrange(1 << 32)))
    chance = random.Random(seed)
    print(f"RAMLOCK_STRESS_SEED={seed}")
    with Guest(how="plain", args=["-smp", "4"]) as guest:
        begun = time.monotonic()
        inject(guest)
        whole = time.monotonic() - begun
        eject(guest)
        for number in range(KILLS):
            verb = ["inject", "--guarantee", str(SIZE)]
            if number % 4 == 3:
                inject(guest)
                verb = ["eject"]
            process = subprocess.Popen(
                [str(RAMLOCK), *verb, "--pid", str(guest.pid)],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                process.wait(chance.uniform(0.2, 1.0) * whole)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
            process.wait(30)
            guest.check_unharmed()
            inject(guest)
            eject(guest)
            guest.check_unharmed()
        assert Path(f"/proc/{guest.pid}/status").read_text().count("TracerPid:\t0") == 1
