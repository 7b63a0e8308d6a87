"""What /proc says, out of folders that a test made and of real processes."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from ramlock import procfs
from ramlock.deadline import Deadline
from ramlock.errors import NotFound, VmGone

QEMU = "/usr/bin/qemu-system-x86_64"


def make(proc: Path, pid: int, *words: str, exe: str | None = QEMU, state: str = "S", name: str = "qemu") -> Path:
    """Make a process in a folder that stands for /proc."""
    folder = proc / str(pid)
    folder.mkdir(parents=True)
    (folder / "cmdline").write_bytes(b"".join(word.encode() + b"\0" for word in words))
    after = " ".join(["1"] * 18)
    (folder / "stat").write_text(f"{pid} ({name}) {state} {after} 4242 0 0\n")
    (folder / "status").write_text(
        f"Name:\t{name}\nUid:\t1000\t0\t1001\t0\nNSpid:\t{pid}\t7\nVmLck:\t  2048 kB\nCapBnd:\t00000000ffffffff\n"
    )
    (folder / "limits").write_text(
        "Limit  Soft  Hard  Units\nMax locked memory         8388608    unlimited    bytes\n"
    )
    if exe:
        (folder / "exe").symlink_to(exe)
    return folder


def test_facts(tmp_path: Path) -> None:
    make(tmp_path, 7, QEMU, "-name", "web", name="a) R (b")
    process = procfs.read(7, tmp_path)
    assert (process.pid, process.inner_pid, process.start_time, process.state) == (7, 7, 4242, "S")
    assert process.uids == (1000, 0, 1001, 0)
    assert process.locked == 2 << 20
    assert process.name == "web"
    assert process.exe == QEMU
    assert procfs.memlock_limit(7, tmp_path) == (8 << 20, None)
    assert procfs.capabilities(7, "CapBnd", tmp_path) == 0xFFFFFFFF


def test_nobody_there(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        procfs.read(7, tmp_path)
    with pytest.raises(NotFound):
        procfs.memlock_limit(7, tmp_path)
    assert procfs.environ(7, tmp_path) is None


def test_this_process() -> None:
    me = procfs.read(os.getpid())
    assert me.exe == os.readlink("/proc/self/exe")
    assert me.uids[0] == os.getuid()
    assert not me.ended
    assert not me.stopped
    assert me.name is None
    assert procfs.same_root(os.getpid())


def test_a_real_environment() -> None:
    child = subprocess.Popen(["sleep", "60"], env={"A": "1", "B": "x=y"})
    try:
        deadline = Deadline(10)
        while not procfs.environ(child.pid) and not deadline.expired:
            time.sleep(0.01)  # in the middle of exec it has none
        assert procfs.environ(child.pid) == {"A": "1", "B": "x=y"}
    finally:
        child.kill()
        child.wait()


def test_environment_of_any_bytes() -> None:
    assert procfs.parse_environ(b"A=1\0rubbish\0=x\0B=\xff\0C=\0") == {"A": "1", "": "x", "B": "\udcff", "C": ""}


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["-name", "web"], "web"),
        (["--name", "web"], "web"),
        (["-name", "guest=web,debug-threads=on"], "web"),
        (["-name", "debug-threads=on,guest=web"], "web"),
        (["-name", "web,process=x"], "web"),
        (["-name", "a,,b,debug-threads=on"], "a,b"),
        (["-name", "guest=a,,,,b"], "a,,b"),
        (["-name", "guest=a,,,debug-threads=on"], "a,"),
        (["-name", "guest=a=b"], "a=b"),
        (["-name", "one", "-name", "two"], "two"),
        (["-name", "one", "-name", "debug-threads=on"], "one"),
        (["-name", "process=x"], None),
        (["-m", "64"], None),
        (["-name"], None),
        (["web", "-names", "x"], None),
        (["-name", "Grüße"], "Grüße"),
    ],
)
def test_names(words: list[str], name: str | None) -> None:
    assert procfs.vm_name(("qemu", *words)) == name


def test_no_command_line() -> None:
    assert procfs.vm_name(()) is None


@pytest.mark.parametrize(
    ("exe", "argv0", "expected"),
    [
        (QEMU, "x", True),
        (f"{QEMU} (deleted)", "x", True),
        ("/usr/libexec/qemu-kvm", "x", True),
        ("/nix/store/abc/bin/.qemu-system-x86_64-wrapped", "x", True),
        ("/usr/bin/qemu-system-x86_64-microvm", "x", True),
        ("/usr/bin/kvm", "x", True),
        (None, QEMU, True),
        (None, "qemu-system-aarch64", True),
        ("/usr/bin/qemu-img", QEMU, False),
        ("/bin/bash", "qemu-system-x86_64", False),
        (None, "", False),
    ],
)
def test_what_looks_like_qemu(exe: str | None, argv0: str, expected: bool) -> None:
    assert procfs.looks_like_qemu(exe, (argv0,)) is expected


def test_finding_qemus(tmp_path: Path) -> None:
    make(tmp_path, 30, "x")
    make(tmp_path, 4, "x")
    make(tmp_path, 5, "x", exe="/bin/sh")
    make(tmp_path, 6, "x", state="Z")
    make(tmp_path, 8, exe=None)
    (make(tmp_path, 9, "x") / "stat").write_text("9 (x")
    (tmp_path / "10").mkdir()
    (tmp_path / "self").mkdir()
    assert [process.pid for process in procfs.qemus(tmp_path)] == [4, 30]


def test_a_qemu_that_keeps_its_reader_waiting(tmp_path: Path) -> None:
    """It is told without a name, and delays nobody: others are read beside it."""
    make(tmp_path, 4, "x", "-name", "web")
    slow = make(tmp_path, 5, "x", "-name", "db") / "cmdline"
    slow.unlink()
    os.mkfifo(slow)
    try:
        web, db = procfs.qemus(tmp_path, 0.2)
        assert (web.pid, web.name, db.pid, db.cmdline) == (4, "web", 5, ())
    finally:
        slow.open("wb").close()  # its reader goes on, and ends


def test_a_pin_sees_the_end() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    pin = procfs.Pin(child.pid)
    try:
        pin.check()
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not pin.alive
        with pytest.raises(VmGone) as error:
            pin.check()
        assert error.value.exit_code == 6
    finally:
        pin.close()
        child.communicate()
    with pytest.raises(NotFound):
        procfs.Pin(child.pid)


def test_a_long_command_line_is_cut(tmp_path: Path) -> None:
    (make(tmp_path, 7) / "cmdline").write_bytes(b"x" * (procfs.MAX_FILE * 2))
    assert sum(map(len, procfs.read(7, tmp_path).cmdline)) <= procfs.MAX_FILE


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ((), False),
        (("-sandbox", "on"), True),
        (("--sandbox", "on,spawn=deny"), True),
        (("-sandbox", "enable=on"), True),
        (("-sandbox", "off"), False),
        (("-sandbox", "on", "-sandbox", "off"), False),
        (("-sandbox",), False),
    ],
)
def test_sandboxed(words: tuple[str, ...], wanted: bool) -> None:
    assert procfs.sandboxed(("qemu-system-x86_64", *words)) is wanted


def test_seccomp_and_stack_limit_and_stops(tmp_path: Path) -> None:
    folder = tmp_path / "1"
    (folder / "task/1").mkdir(parents=True)
    (folder / "task/2").mkdir()
    (folder / "limits").write_text("Max stack size             8388608              unlimited            bytes\n")
    (folder / "status").write_text("Seccomp:\t2\nSeccomp_filters:\t3\nShdPnd:\t0000000000000000\n")
    (folder / "task/2/stat").write_text("2 (a) b) S 1 1")
    assert procfs.seccomp(1, tmp_path) == (2, 3)
    assert procfs.stack_limit(1, tmp_path) == 8 << 20
    assert not procfs.stopping(1, tmp_path)
    (folder / "task/2/stat").write_text("2 (a) b) T 1 1")
    assert procfs.stopping(1, tmp_path)
    (folder / "status").write_text("Seccomp:\t2\nShdPnd:\t0000000000040000\n")
    assert procfs.seccomp(1, tmp_path) == (2, None)
    (folder / "task/2/stat").unlink()
    assert procfs.stopping(1, tmp_path)
    with pytest.raises(NotFound):
        procfs.seccomp(2, tmp_path)


@pytest.mark.parametrize(
    "question",
    [
        procfs.tracer,
        procfs.groups,
        procfs.seccomp,
        lambda pid, proc: procfs.capabilities(pid, "CapEff", proc),
    ],
)
def test_a_process_that_has_ended_is_not_found(question: Callable[[int, Path], object], tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        question(2, tmp_path)
