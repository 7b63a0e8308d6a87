"""Every reason not to inject is told before anything is touched, each by an error of its own."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Need
from tests.qemu.conftest import assert_refused, ramlock
from tests.qemu.guest import MIB, ROOT, SHIM, Guest

pytestmark = pytest.mark.usefixtures("root")

NOBODY = 65534
MICROVM = "/usr/bin/qemu-system-x86_64-microvm"
CHECKS = [
    "process",
    "qemu",
    "running",
    "not-traced",
    "seccomp",
    "architecture",
    "rights",
    "dynamic",
    "glibc",
    "shim-file",
    "room",
    "guest-ram",
    "loaded",
    "road",
    "socket",
]

VICTIM = """
#define _GNU_SOURCE
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>
__attribute__((visibility("default"))) long ram_list[8];
int main(int argc, char **argv)
{
	puts("ready"), fflush(stdout);
	for (;;)
		if (argc > 1)
			ppoll(NULL, 0, NULL, NULL);
}
"""
"""A program that looks like a QEMU without RAM: with an argument it sleeps in ppoll(), without one it never does."""


def preflight(pid: int, code: int = 4, *options: str) -> dict[str, dict[str, Any]]:
    """The checks by name."""
    result = ramlock("preflight", "--pid", pid, "--json", *options)
    assert result.returncode == code, (result.stdout, result.stderr)
    reply = json.loads(result.stdout)
    assert reply["ok"] is (code == 0)
    assert reply["ok"] is all(check["ok"] for check in reply["checks"])
    for check in reply["checks"]:
        assert set(check) == {"name", "ok", "detail", "hint"}
        assert check["detail"]
        assert bool(check["hint"]) is not check["ok"]
    return {check["name"]: check for check in reply["checks"]}


def doctor(pid: int, code: int) -> dict[str, dict[str, Any]]:
    """What `ramlock doctor` finds, by name; of host and VM."""
    result = ramlock("doctor", "--pid", pid, "--json")
    assert result.returncode == code, (result.stdout, result.stderr)
    reply = json.loads(result.stdout)
    assert reply["ok"] is (code == 0)
    for finding in reply["findings"]:
        assert set(finding) == {"name", "level", "found", "means", "do"}
        assert finding["found"]
        assert finding["means"]
        assert finding["do"] or finding["level"] == "ok", finding
    return {finding["name"]: finding for finding in reply["findings"]}


def check_refused(pid: int, name: str, says: str, code: int = 4) -> None:
    """preflight names the check, and inject refuses by it."""
    failed = preflight(pid)[name]
    assert not failed["ok"]
    assert says in failed["detail"]
    result = ramlock("inject", "--pid", pid, timeout=30)
    assert_refused(result, code)
    assert says in result.stderr


@contextmanager
def program(*command: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


Compile = Callable[..., str]


@pytest.fixture
def victim(tmp_path: Path, need: Need) -> Compile:
    """A function that builds the victim under QEMU's name, and returns its path."""
    need("gcc", "gcc")

    def build(*flags: str, compiler: str = "gcc") -> str:
        (tmp_path / "v.c").write_text(VICTIM)
        path = tmp_path / "qemu-system-x86_64"
        subprocess.run([compiler, "-rdynamic", *flags, "-o", str(path), str(tmp_path / "v.c")], check=True)
        return str(path)

    return build


def test_all_is_well() -> None:
    with Guest(how="plain", args=["-name", "fine"]) as guest:
        checks = preflight(guest.pid, 0)
        assert list(checks) == CHECKS
        assert checks["loaded"]["detail"] == "no shim is in it"
        result = ramlock("preflight", "--vm", "fine")
        assert result.returncode == 0
        assert result.stdout.count("pass") == len(CHECKS)
        report = doctor(guest.pid, 0)
        assert all(report[name]["level"] == "ok" for name in CHECKS)
        assert {"vm-memlock", "vm-cgroup"} <= set(report)
        assert ramlock("inject", "--pid", guest.pid).returncode == 0
        assert "already" in preflight(guest.pid, 0)["loaded"]["detail"]


def test_it_writes_nothing() -> None:
    """By strace's word: no tracing, and no file of the process opened for writing."""
    with Guest(how="plain") as guest:
        trace = guest.directory / "trace"
        command = [
            "strace",
            "-f",
            "-o",
            str(trace),
            "-e",
            "trace=ptrace,open,openat,openat2,process_vm_writev,prlimit64",
        ]
        try:
            subprocess.run(
                [*command, str(ROOT / ".venv/bin/ramlock"), "preflight", "--pid", str(guest.pid)], check=True
            )
        except FileNotFoundError:
            pytest.skip("strace is not here (install: strace)")
        lines = trace.read_text().splitlines()
        assert not [line for line in lines if "ptrace(" in line or "process_vm_writev(" in line]
        of_target = [line for line in lines if f"/proc/{guest.pid}" in line]
        assert any("/mem" in line for line in of_target)
        assert not [line for line in of_target if "O_WRONLY" in line or "O_RDWR" in line]
        assert not [line for line in lines if f"prlimit64({guest.pid}" in line]


def test_no_such_process() -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    check_refused(process.pid, "process", "there is no process", 6)
    assert_refused(ramlock("preflight", "--vm", "no-such-vm"), 6)
    assert_refused(ramlock("doctor", "--pid", process.pid), 6)
    assert_refused(ramlock("preflight"), 2)
    assert_refused(ramlock("inject", "--pid", "1", "--vm", "x"), 2)


def test_a_zombie() -> None:
    process = subprocess.Popen(["true"])
    deadline = time.monotonic() + 10
    while b") Z " not in Path(f"/proc/{process.pid}/stat").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    check_refused(process.pid, "process", "zombie")
    process.wait()


def test_not_qemu() -> None:
    check_refused(os.getpid(), "qemu", "is not QEMU")
    found = doctor(os.getpid(), 1)["qemu"]
    assert found["level"] == "bad"
    assert "is not QEMU" in found["found"]
    kernel_thread = 2
    if not Path(f"/proc/{kernel_thread}/exe").exists():
        check_refused(kernel_thread, "qemu", "is not QEMU")


def test_stopped_by_a_signal() -> None:
    with Guest(how="plain") as guest:
        os.kill(guest.pid, signal.SIGSTOP)
        try:
            check_refused(guest.pid, "running", "stopped by a signal")
        finally:
            os.kill(guest.pid, signal.SIGCONT)
        assert ramlock("inject", "--pid", guest.pid).returncode == 0


def test_traced_already() -> None:
    code = (
        "import sys; from ramlock.tracee import Tracee\n"
        "with Tracee(int(sys.argv[1])): print(flush=True); sys.stdin.read(1)\n"
    )
    with Guest(how="plain") as guest:
        with program(sys.executable, "-c", code, str(guest.pid)) as tracer:
            check_refused(guest.pid, "not-traced", f"is traced by process {tracer.pid}")
        guest.check_unharmed()
        assert ramlock("inject", "--pid", guest.pid).returncode == 0


def test_a_static_program(victim: Compile) -> None:
    with program(victim("-static"), "sleep") as process:
        check_refused(process.pid, "dynamic", "statically linked")


def test_a_program_with_musl(victim: Compile, need: Need) -> None:
    """It is parked, has ram_list and a loader: all but a glibc."""
    need("musl-gcc", "musl-tools")
    with program(victim(compiler="musl-gcc"), "sleep") as process:
        check_refused(process.pid, "glibc", "uses musl")
        assert process.poll() is None


def test_a_32_bit_program(tmp_path: Path, need: Need) -> None:
    """Without a library of that size: only a system call, in a loop."""
    need("gcc", "gcc")
    source = tmp_path / "v.S"
    source.write_text(
        ".globl _start\n_start: movl $4, %eax\nmovl $1, %ebx\nmovl $text, %ecx\nmovl $1, %edx\nint $0x80\n"
        '1: movl $29, %eax\nint $0x80\njmp 1b\n.data\ntext: .ascii "\\n"\n'
    )
    path = tmp_path / "qemu-system-x86_64"
    subprocess.run(["gcc", "-m32", "-nostdlib", "-static", "-o", str(path), str(source)], check=True)
    try:
        with program(str(path)) as process:
            check_refused(process.pid, "architecture", "32-bit")
    except OSError as error:
        pytest.skip(f"this kernel runs no 32-bit programs: {error}")


@pytest.mark.parametrize("where", ["relative.sock", "/" + "x" * 120, "/nowhere/at/all.sock"])
def test_a_socket_that_cannot_be(where: str) -> None:
    """preflight is asked the same as inject, and says the same."""
    with Guest(how="plain") as guest:
        said = ramlock("preflight", "--pid", guest.pid, "--json", "--socket", where)
        result = ramlock("inject", "--pid", guest.pid, "--socket", where)
        assert (said.returncode == 0) is (result.returncode == 0), (said.stdout, result.stderr)
        if said.returncode == 4:
            (failed,) = (check for check in json.loads(said.stdout)["checks"] if not check["ok"])
            assert failed["name"] == "socket"
            assert failed["detail"] in result.stderr
        else:
            assert said.returncode == result.returncode == 2
        guest.check_unharmed()


def test_without_symbols(need: Need) -> None:
    """Guest RAM is found by its mappings; where that is only a guess, it is said."""
    need(MICROVM, "qemu-system-x86")
    with Guest(how="plain", qemu=MICROVM, machine="microvm", accel="qtest") as guest:
        check = preflight(guest.pid, 0)["guest-ram"]
        assert check["detail"] == "1 GiB in 1 block, certain by its mappings"
        guest.monitor.execute("object-add", {"qom-type": "memory-backend-ram", "id": "spare", "size": 64 * MIB})
        check_refused(guest.pid, "guest-ram", "only probably")
        assert guest.monitor.execute("query-status")["status"]


def test_a_main_thread_that_is_never_idle(victim: Compile) -> None:
    with program(victim()) as process:
        preflight(process.pid, 0)
        begun = time.monotonic()
        result = ramlock("inject", "--pid", process.pid, "--timeout", "0.5", timeout=30)
        assert_refused(result, 4)
        assert "never seen idle in 0.5 s" in result.stderr
        assert time.monotonic() - begun < 20
        assert process.poll() is None
        assert "TracerPid:\t0" in Path(f"/proc/{process.pid}/status").read_text()


def test_a_process_that_only_looks_like_qemu(victim: Compile) -> None:
    """It has a parked main thread and ram_list, and no more: the shim comes, and goes, and finds nothing to lock."""
    with program(victim(), "sleep") as process:
        result = ramlock("inject", "--pid", process.pid, "--guarantee", "6M", timeout=60)
        assert_refused(result, 1, 4)
        assert process.poll() is None
        assert "VmLck:\t       0 kB" in Path(f"/proc/{process.pid}/status").read_text()


def as_nobody(guest: Guest, *, shim: Path) -> str:
    """What another user is told by inject, as exit code and message."""
    code = (
        "import codecs, ctypes, os, sys; from ramlock import errors, install\n"
        "codecs.lookup('ascii')\n"  # that user may not read Python's own files
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try:\n"
        "    with install.installed(int(sys.argv[1]), install.Options(), {'RAMLOCK_SHIM': sys.argv[2]}): pass\n"
        "except errors.RamlockError as error: print(error.exit_code, error.message)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(guest.pid), str(shim)], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_another_users() -> None:
    with Guest(how="plain") as guest:
        said = as_nobody(guest, shim=SHIM)
        assert said.startswith("7 ")
        assert "another user (uid 0)" in said
        guest.check_unharmed()


def test_not_dumpable() -> None:
    """After -runas it is the user's own process, and yet may not be traced by that user."""
    with Guest(how="plain", args=["-runas", "nobody"]) as guest:
        said = as_nobody(guest, shim=SHIM)
        assert said.startswith("7 ")
        assert "not dumpable" in said
        guest.check_unharmed()


def test_ones_own_without_root(tmp_path: Path) -> None:
    """No root is needed for one's own VM."""
    shim = tmp_path / "ramlock.so"
    shim.write_bytes(SHIM.read_bytes())
    tmp_path.chmod(0o755)
    with Guest(how="plain", user=NOBODY) as guest:
        copy = guest.directory / "ramlock.so"
        copy.write_bytes(shim.read_bytes())
        copy.chmod(0o644)
        assert as_nobody(guest, shim=copy) == ""
        assert guest.query()["state"] == "idle"
        guest.check_unharmed()


def test_a_file_that_the_target_may_not_read(tmp_path: Path) -> None:
    """And without /proc there is no other road."""
    shim = tmp_path / "ramlock.so"
    shim.write_bytes(SHIM.read_bytes())
    shim.chmod(0o600)
    env = {"RAMLOCK_SHIM": str(shim)}
    without_proc = ("unshare", "--mount", "sh", "-c", 'umount -l /proc && exec "$@"', "sh")
    with Guest(how="plain", args=["-runas", "nobody"], prepare=without_proc) as guest:
        said = ramlock("preflight", "--pid", guest.pid, "--json", env=env)
        assert said.returncode == 4
        (failed,) = (check for check in json.loads(said.stdout)["checks"] if not check["ok"])
        result = ramlock("inject", "--pid", guest.pid, env=env)
        assert_refused(result, 4)
        for text in (failed["detail"], result.stderr):
            assert "may not read" in text
            assert "/proc is not mounted" in text
        guest.check_unharmed()


def test_a_hostile_root(tmp_path: Path) -> None:
    """Links and pipes where the shim's file should be lead nowhere and hang nobody."""
    place = tmp_path / str(SHIM).lstrip("/")
    place.parent.mkdir(parents=True)
    (tmp_path / "proc").mkdir()
    with Guest(how="plain", args=["-chroot", str(tmp_path)]) as guest:
        for link in (None, f"/proc/self/root{SHIM}", "../" * 30 + str(SHIM).lstrip("/"), str(place)):
            if link:
                place.symlink_to(link)
            else:
                os.mkfifo(place)
            begun = time.monotonic()
            check_refused(guest.pid, "road", "and /proc is not mounted")
            assert time.monotonic() - begun < 20
            place.unlink()
        outside = tmp_path.parent / f"{tmp_path.name}-outside"
        outside.mkdir()
        (tmp_path / "run").symlink_to(outside)
        guest.check_unharmed()
        assert list(outside.iterdir()) == []


FILTER = """
import ctypes, os, struct, sys
deny = int(sys.argv[1])
# Load the number of the system call; kill the process when it is the forbidden one; else allow it.
code = struct.pack("=" + "HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, deny, 0x06, 0, 0, 0x80000000, 0x06, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(code, len(code))
program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", 4, ctypes.addressof(buffer)))
prctl = ctypes.CDLL(None, use_errno=True).prctl
assert prctl(38, 1, 0, 0, 0) == 0
assert prctl(22, 2, program) == 0, os.strerror(ctypes.get_errno())
os.execvp(sys.argv[2], sys.argv[2:])
"""
"""Puts a seccomp filter on itself that kills at one system call, and becomes QEMU."""
SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
MLOCK2, ACCT = 325, 163


def filtered(number: int, *args: str) -> Guest:
    return Guest(how="plain", prepare=(sys.executable, "-c", FILTER, str(number)), args=args)


@pytest.mark.parametrize("args", [(), ("-sandbox", SANDBOX)], ids=["alone", "with-qemus-own"])
def test_somebody_elses_seccomp_filter(args: tuple[str, ...]) -> None:
    """It would kill QEMU by SIGSYS."""
    with filtered(MLOCK2, *args) as guest:
        assert not preflight(guest.pid)["seccomp"]["ok"]
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "4M")
        assert_refused(result, 4)
        assert "--allow-seccomp" in result.stderr
        assert "not QEMU's own (1)" in result.stderr
        guest.check_unharmed()


@pytest.mark.parametrize("args", [(), ("-sandbox", SANDBOX)], ids=["alone", "with-qemus-own"])
def test_a_seccomp_filter_that_the_user_answers_for(args: tuple[str, ...]) -> None:
    with filtered(ACCT, *args) as guest:
        assert preflight(guest.pid, 0, "--allow-seccomp")["seccomp"]["ok"]
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "4M", "--allow-seccomp")
        assert result.returncode == 0, result.stderr
        guest.check_unharmed()


@pytest.mark.parametrize("value", ["on", SANDBOX, "enable=on,spawn=deny"])
def test_qemus_own_sandbox_is_no_reason(value: str) -> None:
    with Guest(how="plain", args=["-sandbox", value]) as guest:
        result = ramlock("preflight", "--pid", guest.pid)
        assert result.returncode == 0, result.stdout + result.stderr
        assert "QEMU's own sandbox" in result.stdout
