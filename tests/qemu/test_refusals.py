"""Bad input and bad surroundings: a clear error, the right exit code, the VM unharmed, the former guarantee intact."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.qemu import truth
from tests.qemu.conftest import assert_holds, assert_refused, ramlock
from tests.qemu.guest import GIB, MIB, RAMLOCK, Guest
from tests.qemu.monitor import Monitor, MonitorError

pytestmark = pytest.mark.usefixtures("lockable")

FORMER = 64 * MIB
NOBODY = 65534
DONE, FAILED, USAGE, TIMED_OUT, REFUSED, SHORT, NOT_FOUND, NO_PERMISSION = range(8)


@pytest.fixture(scope="module")
def guest() -> Iterator[Guest]:
    with Guest(args=["-name", "refusing"]) as started:
        started.guarantee(FORMER)
        yield started


@pytest.fixture(autouse=True)
def intact(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test with the shared guest: the VM is unharmed and the former guarantee holds."""
    yield
    if "guest" in request.fixturenames:
        started: Guest = request.getfixturevalue("guest")
        started.check_unharmed()
        assert_holds(started, FORMER)


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["1025M"], REFUSED),
        (["16T"], REFUSED),
        (["--", "-1"], USAGE),
        (["--", "abc"], USAGE),
        (["--", "-1G"], USAGE),
        (["--", ""], USAGE),
        (["nan"], USAGE),
        (["inf"], USAGE),
        (["0x10000000"], USAGE),
        (["1e9"], USAGE),
        (["2GB"], USAGE),
        (["2048"], USAGE),
        (["101%"], USAGE),
    ],
)
def test_sizes(guest: Guest, words: list[str], code: int) -> None:
    assert_refused(ramlock("set", "--pid", guest.pid, *words), code)


def test_more_than_any_machine_has(guest: Guest) -> None:
    assert_refused(ramlock("set", 10**30, "--pid", guest.pid), USAGE)


@pytest.mark.parametrize(
    "arguments",
    [
        {"size": -1},
        {"size": 10**30},
        {"size": GIB + 1},
        {"size": 2**64},
        {"size": 2**63},
        {"size": "1G"},
        {"size": 1.5},
        {"size": None},
        {"size": True},
        {"size": [1]},
        {},
        {"all": False},
        {"size": MIB, "all": True},
        {"size": MIB, "order": "random"},
        {"size": MIB, "prefault": 1},
        {"size": MIB, "hold-budget": 49},
        {"size": MIB, "hold-budget": 100_001},
        {"size": MIB, "threads": 0},
        {"size": MIB, "threads": 17},
        {"size": MIB, "host-reserve": -1},
        {"size": MIB, "host-reserve": "1G"},
        {"size": MIB, "unknown": 1},
    ],
    ids=str,
)
def test_arguments_over_the_socket(guest: Guest, arguments: dict[str, Any]) -> None:
    with guest.shim() as shim:
        with pytest.raises(MonitorError) as error:
            shim.execute("set_ram_minguarantee", arguments)
        assert error.value.kind == "GenericError"
        assert shim.execute("query-ram-minguarantee")["requested"] == FORMER


def raw(guest: Guest, data: bytes) -> bytes:
    """What the shim answers to bytes, until it closes."""
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(20)
        client.connect(str(guest.shim_socket))
        answer = b""
        try:
            client.sendall(data)
            client.shutdown(socket.SHUT_WR)
            while more := client.recv(65536):
                answer += more
        except (BrokenPipeError, ConnectionResetError):
            pass
        return answer


@pytest.mark.parametrize(
    "data",
    [
        b"hello\n",
        b"\xff\x00\x01",
        b"[" * 100000,
        b'{"execute": "' + b"x" * 100000 + b'"}',
        b'{"execute": "set_ram_minguarantee", "arguments": {"size": 0}}',  # not negotiated
        b'{"execute": "qmp_capabilities"} {"execute": 5}',
        b'{"execute": "qmp_capabilities"}{"execute": "set_ram_minguarantee", "arguments": 7}',
        b'{"execute": "qmp_capabilities"}{"execute": "set_ram_minguarantee", "arguments": {"size": 0}',  # cut off
        b"GET / HTTP/1.1\r\n\r\n",
    ],
    ids=range(9),
)
def test_rubbish_over_the_socket(guest: Guest, data: bytes) -> None:
    assert b'"error"' in raw(guest, data) or data.endswith(b"}") or b"QMP" in raw(guest, data)


def test_unknown_vm() -> None:
    assert_refused(ramlock("set", "64M", "--vm", "no-such-vm-here"), NOT_FOUND)
    assert_refused(ramlock("status", "--vm", "no-such-vm-here"), NOT_FOUND)


def test_a_process_that_is_no_vm() -> None:
    assert_refused(ramlock("set", "64M", "--pid", os.getpid()), NOT_FOUND)
    assert_refused(ramlock("status", "--pid", 2**22 + 1), NOT_FOUND)


def test_no_vm_named_at_all() -> None:
    assert ramlock("set", "64M").returncode == USAGE


def test_a_qemu_without_the_shim() -> None:
    with Guest(how="plain", memory=64 * MIB) as plain:
        assert_refused(ramlock("set", "32M", "--pid", plain.pid), NOT_FOUND)
        plain.check_unharmed()


def test_two_of_one_name() -> None:
    args = ["-name", "twin"]
    with Guest(memory=64 * MIB, args=args) as one, Guest(memory=64 * MIB, args=args) as two:
        result = ramlock("set", "32M", "--vm", "twin")
        assert_refused(result, REFUSED)
        assert str(one.pid) in result.stderr
        assert str(two.pid) in result.stderr
        assert truth.vm_lck(one.pid) == truth.vm_lck(two.pid) == 0


def test_qemus_own_monitor_is_not_ours() -> None:
    """A command that both know would be carried out by QEMU: it is not even sent."""
    with Guest(memory=64 * MIB) as running:
        own = running.directory / "qmp2"
        running.monitor.human(f"chardev-add socket,id=c2,path={own},server=on,wait=off")
        running.monitor.close()  # QEMU's monitor serves one client at a time
        assert_refused(ramlock("set", "32M", "--socket", running.directory / "qmp"), NOT_FOUND)
        with Monitor(running.directory / "qmp") as again:
            assert again.execute("query-status")["running"] is True
        assert truth.vm_lck(running.pid) == 0


def test_a_socket_that_says_nothing(tmp_path: Path) -> None:
    """The wait has an end."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "mute"))
        server.listen()
        result = ramlock("set", "32M", "--socket", tmp_path / "mute", "--timeout", "2", timeout=60)
    assert_refused(result, FAILED)
    assert "does not answer" in result.stderr


def test_a_file_and_nothing_instead_of_a_socket(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for name in ("file", "nothing"):
        assert_refused(ramlock("status", "--socket", tmp_path / name), NOT_FOUND)


def test_vm_ends_in_the_middle() -> None:
    with Guest(memory=8 * GIB) as victim:
        killer = threading.Timer(0.7, victim.kill)
        killer.start()
        result = ramlock("set", "8G", "--pid", victim.pid, timeout=60)
        killer.join()
        assert_refused(result, NOT_FOUND)


def test_interrupted_leaves_the_guarantee_as_set() -> None:
    with Guest(memory=8 * GIB) as busy:
        command = subprocess.Popen(
            [str(RAMLOCK), "set", "6G", "--pid", str(busy.pid)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        deadline = time.monotonic() + 30
        while busy.query()["requested"] != 6 * GIB:
            assert time.monotonic() < deadline
        command.send_signal(signal.SIGINT)
        _, said = command.communicate(timeout=30)
        assert command.returncode != 0
        assert "Traceback" not in said
        assert busy.query()["requested"] == 6 * GIB


def test_timed_out_leaves_the_guarantee_as_set() -> None:
    with Guest(memory=8 * GIB) as busy:
        # Long enough to set it on a busy machine, too short to lock so much, in small steps.
        result = ramlock("set", "8G", "--pid", busy.pid, "--timeout", "0.5", "--hold-budget", "50")
        assert_refused(result, TIMED_OUT)
        assert busy.query()["requested"] == 8 * GIB


LIMIT = 8 * MIB
LIMITED = ["prlimit", f"--memlock={LIMIT}:{LIMIT}"]


@pytest.mark.usefixtures("root")
def test_unprivileged_with_a_small_limit() -> None:
    """The limit of locked memory is the kernel's: what fits is held, what does not is refused at once."""
    # Root starts it as another, whose uid is then anybody's, unless that is allowed.
    env = {"XDG_RUNTIME_DIR": "", "RAMLOCK_ALLOW_UID": str(NOBODY)}
    with Guest(how="env", user=NOBODY, prepare=LIMITED, env=env) as small:
        assert small.query()["memlock-limit"] == LIMIT
        small.guarantee(4 * MIB)
        result = nobodys_ramlock("set", "64M", "--pid", small.pid)
        assert_refused(result, NO_PERMISSION)
        assert "limit" in result.stderr.lower()
        with small.shim() as shim, pytest.raises(MonitorError, match=r"^GenericError: \[rlimit\]"):
            shim.execute("set_ram_minguarantee", {"size": 64 * MIB})
        small.check_unharmed()
        assert_holds(small, 4 * MIB)
        # Root's command may raise the limit from outside, where root is allowed to.
        result = ramlock("set", "64M", "--pid", small.pid)
        if result.returncode != DONE:
            assert_refused(result, REFUSED)
        assert_holds(small, 64 * MIB if result.returncode == DONE else 4 * MIB)


@pytest.mark.usefixtures("root")
def test_guarantee_from_the_start_above_the_limit() -> None:
    """The VM starts all the same, and status says why it is short."""
    env = {"XDG_RUNTIME_DIR": "", "RAMLOCK_GUARANTEE": "256M"}
    with Guest(how="env", user=NOBODY, prepare=LIMITED, env=env) as small:
        reply = small.settle()
        assert reply["state"] == "short", reply
        assert reply["short"]["reason"] == "rlimit"
        assert truth.vm_lck(small.pid) <= LIMIT
        small.check_unharmed()


def nobodys_ramlock(*words: object) -> subprocess.CompletedProcess[str]:
    """The ramlock command as user nobody; it may read files that nobody may not, as this tree may be root's alone."""
    read = ("--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search")
    command = ["setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups", *read, str(RAMLOCK)]
    return subprocess.run([*command, *map(str, words)], capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.usefixtures("root")
def test_no_rights_on_the_socket(guest: Guest) -> None:
    assert_refused(nobodys_ramlock("set", "1M", "--socket", guest.shim_socket), NO_PERMISSION)
    assert_refused(nobodys_ramlock("set", "32M", "--pid", guest.pid), NO_PERMISSION)


@pytest.mark.usefixtures("root")
def test_the_shim_itself_turns_strangers_away() -> None:
    """Not only the mode of the socket: an allowed uid opens the mode for all, and others still get no greeting."""
    program = (
        "import socket, sys\n"
        "client = socket.socket(socket.AF_UNIX)\n"
        "client.settimeout(20)\n"
        "client.connect(sys.argv[1])\n"
        "sys.stdout.write(str(len(client.recv(4096))))\n"
    )

    def greeted(qemu: Guest, uid: int) -> bool:
        result = subprocess.run(
            ["/usr/bin/python3", "-c", program, str(qemu.shim_socket)],
            user=uid, group=uid, extra_groups=[], capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        return result.returncode == 0 and int(result.stdout) > 0

    with Guest(how="env", memory=64 * MIB, env={"RAMLOCK_ALLOW_UID": str(NOBODY)}) as open_to_nobody:
        open_to_nobody.query()
        assert greeted(open_to_nobody, NOBODY)
        assert not greeted(open_to_nobody, 12345)
        assert greeted(open_to_nobody, 0)
