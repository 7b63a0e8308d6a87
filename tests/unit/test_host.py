"""RLIMIT_MEMLOCK is raised as far as one may, on real processes."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from ramlock import host, procfs
from tests.unit.test_procfs import make

MIB = 1 << 20
Child = Callable[[int, int], int]


@pytest.fixture
def child() -> Iterator[Child]:
    """A function that starts a process with a soft and a hard limit and returns its pid."""
    started: list[subprocess.Popen[bytes]] = []

    def start(soft: int, hard: int) -> int:
        code = f"ulimit -Sl {soft // 1024} && ulimit -Hl {hard // 1024} && echo && exec sleep 60"
        started.append(subprocess.Popen(["bash", "-c", code], stdout=subprocess.PIPE))
        stdout = started[-1].stdout
        assert stdout is not None
        if not stdout.readline():
            pytest.skip("this user may not set these limits")
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.communicate()


def limits(pid: int) -> tuple[int, int]:
    return resource.prlimit(pid, resource.RLIMIT_MEMLOCK)


def may_raise_hard() -> bool:
    cap_sys_resource = 24
    return bool(procfs.capabilities(os.getpid(), "CapEff") >> cap_sys_resource & 1)


def test_enough_is_left_alone(child: Child) -> None:
    pid = child(4 * MIB, 6 * MIB)
    assert host.raise_memlock(pid, 3 * MIB) == 4 * MIB
    assert host.raise_memlock(pid, 4 * MIB) == 4 * MIB
    assert limits(pid) == (4 * MIB, 6 * MIB)


def test_no_more_than_needed(child: Child) -> None:
    pid = child(1 * MIB, 6 * MIB)
    assert host.raise_memlock(pid, 5 * MIB) == 5 * MIB
    assert limits(pid) == (5 * MIB, 6 * MIB)


@pytest.mark.parametrize("need", [64 * MIB, None])
def test_above_the_hard_limit(child: Child, need: int | None) -> None:
    pid = child(1 * MIB, 6 * MIB)
    reached = host.raise_memlock(pid, need)
    if may_raise_hard():
        assert reached == need
    else:
        assert reached == 6 * MIB
        assert limits(pid) == (6 * MIB, 6 * MIB)


def test_no_such_process(child: Child) -> None:
    process = subprocess.Popen(["true"])
    process.wait()
    with pytest.raises(ProcessLookupError):
        host.raise_memlock(process.pid, MIB)


@pytest.mark.parametrize(
    ("limit", "target", "enough"),
    [(5, 5, True), (5, 6, False), (-1, 6, True), (-1, -1, True), (6, -1, False)],
)
def test_infinity_is_the_largest(limit: int, target: int, enough: bool) -> None:
    assert resource.RLIM_INFINITY == -1
    assert host._reaches(limit, target) is enough


def test_capability_after_exec(tmp_path: Path) -> None:
    folder = make(tmp_path, 1, "x")
    (tmp_path / "self").symlink_to(folder)
    for which, expected in (("CapBnd", os.getuid() == 0), ("CapAmb", os.getuid() != 0)):
        (folder / "status").write_text(f"{which}:\t{1 << host.CAP_IPC_LOCK:016x}\n")
        assert host.locks_freely_after_exec(tmp_path) is expected


def test_nobody_can_have_the_host_keep_nothing() -> None:
    assert host.reserve(64 << 30, None) == host.reserve(64 << 30, 0) == (64 << 30) // 50
    assert host.reserve(8 << 30, 1) == 128 << 20
    assert host.reserve(8 << 30, 3 << 30) == 3 << 30
