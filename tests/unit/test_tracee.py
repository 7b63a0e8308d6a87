"""A thread under ptrace: stopped, looked at, written to, let go."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramlock import procfs
from ramlock.errors import AlreadyTraced, NotFound, VmGone
from ramlock.memory import Memory
from ramlock.tracee import Tracee


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


def test_a_stop_has_its_end(child: subprocess.Popen[bytes]) -> None:
    with Tracee(child.pid) as thread:
        thread.stop(5)
        assert procfs.tracer(child.pid) == os.getpid()
        assert procfs.read(child.pid).state == "t"
        assert thread.registers().rsp
        assert 512 < thread.xstate_size() < 64 << 10
    assert procfs.tracer(child.pid) == 0
    assert procfs.read(child.pid).state in "SR"


def test_an_error_lets_go_too(child: subprocess.Popen[bytes]) -> None:
    with pytest.raises(ZeroDivisionError), Tracee(child.pid) as thread:
        thread.stop(5)
        raise ZeroDivisionError
    assert procfs.tracer(child.pid) == 0


@pytest.mark.parametrize("size", [1, 7, 8, 13, 64])
def test_poking_changes_these_bytes_and_no_others(child: subprocess.Popen[bytes], size: int) -> None:
    with Memory(child.pid) as memory, Tracee(child.pid) as thread:
        thread.stop(5)
        code = next(m for m in memory.maps() if m.executable and m.path.startswith("/"))
        before = memory.read(code.start, 128)
        thread.poke(code.start, bytes(range(size)))
        assert memory.read(code.start, 128) == bytes(range(size)) + before[size:]
        thread.poke(code.start, before)
        with pytest.raises(OSError):
            thread.poke(0, b"nowhere")


def test_who_traces_already(child: subprocess.Popen[bytes]) -> None:
    code = "import sys; from ramlock.tracee import Tracee\nwith Tracee(int(sys.argv[1])): print(flush=True); input()\n"
    with subprocess.Popen(
        [sys.executable, "-c", code, str(child.pid)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(AlreadyTraced, match=f"by process {other.pid}"), Tracee(child.pid):
            pass
        other.kill()


def test_nobody_there() -> None:
    with subprocess.Popen(["true"]) as process:
        process.wait()
    with pytest.raises(NotFound), Tracee(process.pid):
        pass


def test_it_ends_meanwhile(child: subprocess.Popen[bytes]) -> None:
    with pytest.raises(VmGone), Tracee(child.pid) as thread:
        child.kill()
        while Path(f"/proc/{child.pid}/stat").read_text().split()[2] not in "Zt":
            pass
        thread.stop(5)
        thread.stop(5)
