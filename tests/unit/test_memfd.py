"""Memory files of other processes, and what only pretends to be one."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from ramlock import memfd
from ramlock.errors import CannotInject
from tests.conftest import absent

NAME = "ramlock-0123"
CONTENTS = b"the shim" * 1000


@pytest.fixture
def file() -> Iterator[int]:
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    yield fd
    os.close(fd)


def test_it_is_found_filled_and_sealed(file: int) -> None:
    assert memfd.find(os.getpid(), NAME) == file
    for _ in range(2):
        memfd._fill(os.getpid(), file, CONTENTS, Path("/proc"))
        assert os.pread(file, 2 * len(CONTENTS), 0) == CONTENTS
    with pytest.raises(PermissionError):
        os.pwrite(file, b"x", 0)


def test_a_deleted_file_is_no_memory_file(tmp_path: Path) -> None:
    """Even on a tmpfs it is refused by its mount, before its file system is asked anything."""
    for folder in (tmp_path, Path("/dev/shm")):
        path = folder / f"memfd:{NAME}"
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
        try:
            path.unlink()
            with pytest.raises(CannotInject, match="it is no memory file"):
                memfd._fill(os.getpid(), fd, CONTENTS, Path("/proc"))
            assert os.fstat(fd).st_size == 0
        finally:
            os.close(fd)


def test_one_in_another_namespace(tmp_path: Path) -> None:
    """In the root of a mount namespace a deleted file has the very name of a memory file, and still is none."""
    if os.getuid() != 0:
        absent("only root can become another user")
    script = f'mount -t tmpfs none /mnt && cd /mnt && exec 7<>"memfd:{NAME}" && rm memfd:* && pivot_root . . && '
    script += "echo && read line"
    drop = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups")
    with subprocess.Popen(
        [*drop, "unshare", "-Urm", "sh", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            absent("no user namespace can be made here")
        try:
            assert memfd.find(process.pid, NAME) == 7
            with pytest.raises(CannotInject, match="it is no memory file"):
                memfd._fill(process.pid, 7, CONTENTS, Path("/proc"))
        finally:
            process.kill()
