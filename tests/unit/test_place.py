"""The folders and links of injected shims' sockets."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from ramlock import place, procfs
from ramlock.errors import CannotInject, UsageError
from ramlock.place import Place
from tests.conftest import absent

DEAD = 2**22 + 1
"""Above the largest pid."""


@pytest.fixture
def ours() -> procfs.Process:
    return procfs.read(os.getpid())


@pytest.fixture
def nobodys() -> Iterator[procfs.Process]:
    """A process of another user."""
    if os.getuid() != 0:
        absent("only root can start a process of another user")
    with subprocess.Popen(["sleep", "60"], user=65534, group=65534) as process:
        yield procfs.read(process.pid)
        process.kill()


def test_ones_own_has_the_usual_place(ours: procfs.Process) -> None:
    assert place.choose(ours, None) == Place(None, False)


def test_another_users_has_its_own_folder(nobodys: procfs.Process) -> None:
    assert place.choose(nobodys, None) == Place(f"/run/ramlock/{nobodys.pid}/sock", True)


@pytest.mark.parametrize("wanted", ["relative", "", "/with\nline", "/" + "x" * 107])
def test_no_path_of_a_socket(ours: procfs.Process, wanted: str) -> None:
    with pytest.raises(UsageError):
        place.choose(ours, wanted)
    assert place.choose(ours, "/" + "x" * 106) == Place("/" + "x" * 106, False)


def test_a_folder_that_is_not_there(ours: procfs.Process, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in ("no", "file"):
        with pytest.raises(UsageError, match="sees no folder"):
            place.choose(ours, str(tmp_path / folder / "sock"))
    assert place.choose(ours, str(tmp_path / "sock")).path == str(tmp_path / "sock")


def test_a_folder_is_made_and_removed(nobodys: procfs.Process) -> None:
    chosen = place.choose(nobodys, None)
    folder = Path(f"/run/ramlock/{nobodys.pid}")
    try:
        for shared, mode in ((False, 0o700), (True, 0o711), (False, 0o700)):
            place.prepare(nobodys, chosen, shared=shared)
            assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (65534, mode)
        place.link(nobodys, chosen)
        link = Path(f"/run/ramlock/{nobodys.pid}.sock")
        assert os.readlink(link) == f"{folder}/sock"
        assert place.linked(nobodys) is None
    finally:
        place.remove(nobodys)
    assert not folder.exists()
    assert not link.is_symlink()
    place.remove(nobodys)  # once more is no error


def test_a_link_remembers_the_place(ours: procfs.Process, tmp_path: Path) -> None:
    if os.getuid() != 0:
        absent("only root leaves a link")
    place.link(ours, Place("/elsewhere.sock", False), run=tmp_path)
    place.link(ours, Place("/elsewhere.sock", False), run=tmp_path)
    assert place.linked(ours, run=tmp_path) == "/elsewhere.sock"
    assert place.from_here(ours, "/elsewhere.sock", run=tmp_path) == "/elsewhere.sock"


def test_only_the_dead_are_swept(tmp_path: Path) -> None:
    living = os.getpid()
    for pid in (DEAD, living):
        (tmp_path / str(pid)).mkdir()
        (tmp_path / f"{pid}.sock").symlink_to(f"{pid}/sock")
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(tmp_path / f"{pid}/sock"))
    (tmp_path / str(DEAD + 1)).mkdir()
    (tmp_path / str(DEAD + 1) / "precious").touch()
    (tmp_path / f"{DEAD + 2}.sock").write_text("a file that is no socket")
    (tmp_path / str(DEAD + 3)).symlink_to(tmp_path / str(living))
    (tmp_path / "other.sock").touch()
    (tmp_path / f"{DEAD}.books").touch()
    place.sweep(run=tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    kept = {str(living), f"{living}.sock", str(DEAD + 1), f"{DEAD + 2}.sock", str(DEAD + 3), "other.sock"}
    assert left == kept
    assert (tmp_path / str(living) / "sock").exists()


def test_who_still_listens_is_not_swept(tmp_path: Path) -> None:
    """Its pid may be one of another namespace."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / f"{DEAD}.sock"))
        server.listen()
        place.sweep(run=tmp_path)
        assert (tmp_path / f"{DEAD}.sock").exists()
    place.sweep(run=tmp_path)
    assert not (tmp_path / f"{DEAD}.sock").exists()
    place.sweep(run=tmp_path / "nothing")


def test_users_of_another_namespace(tmp_path: Path) -> None:
    (tmp_path / "9").mkdir()
    (tmp_path / "9/uid_map").write_text("         0     100000      65536\n     65536       1000          1\n")
    (tmp_path / "sys/kernel").mkdir(parents=True)
    (tmp_path / "sys/kernel/overflowuid").write_text("65534\n")
    assert place.uid_inside(100005, 9, tmp_path) == 5
    assert place.uid_inside(1000, 9, tmp_path) == 65536
    assert place.uid_inside(0, 9, tmp_path) == 65534
    assert place.uid_inside(7, 10, tmp_path) == 7
    assert place.uid_inside(os.getuid(), os.getpid()) == os.getuid()


def test_a_folder_of_anothers_is_not_given_away(nobodys: procfs.Process, tmp_path: Path) -> None:
    """In a root where that user may do as it likes, nothing is made its own that it put there."""
    code = "import os, sys; os.chroot(sys.argv[1]); os.setgid(65534); os.setuid(65534); print(flush=True); input()"
    run = tmp_path / "run/ramlock"
    run.mkdir(parents=True)
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        target = procfs.read(process.pid)
        secret = tmp_path / "secret"
        secret.mkdir()
        (run / str(process.pid)).symlink_to("/secret")
        with pytest.raises(Exception, match="no folder for the control socket"):
            place.prepare(target, place.choose(target, None), shared=False)
        assert secret.stat().st_uid == 0
        (run / str(process.pid)).unlink()
        place.prepare(target, place.choose(target, None), shared=False)
        assert (run / str(process.pid)).stat().st_uid == 65534
        process.kill()


@contextmanager
def in_namespace(folder: Path, over: str, *, user: int = 65534) -> Iterator[procfs.Process]:
    """A process in a user and mount namespace of `user`, who has mounted `folder` at `over`."""
    if os.getuid() != 0:
        absent("only root can become another user")
    script = 'mount -t tmpfs none /run && mkdir -p "$2" && mount --bind "$1" "$2" && echo && exec sleep 60'
    # The name of the folder has the pid in it, which exec keeps.
    script = f'set -- "$1" "$(echo "$2" | sed s/PID/$$/)"; {script}'
    drop = ("setpriv", "--reuid", str(user), "--regid", str(user), "--clear-groups")
    with subprocess.Popen(
        [*drop, "unshare", "-Urm", "sh", "-c", script, "sh", folder, over], stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        if not process.stdout.readline():
            absent("no user namespace can be made here")
        while b"sleep" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
            time.sleep(0.01)
        try:
            yield procfs.read(process.pid)
        finally:
            process.kill()


@pytest.fixture
def reachable(tmp_path: Path) -> Path:
    """A folder of root's to which any user finds the way."""
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(path.stat().st_mode | 0o011)
    folder = tmp_path / "host"
    folder.mkdir(mode=0o755)
    return folder


def facts(folder: Path) -> tuple[int, int, int]:
    found = folder.stat()
    return found.st_uid, found.st_gid, found.st_mode


@pytest.mark.parametrize("over", ["/run/ramlock/PID", "/run/ramlock", "/run"])
def test_a_folder_of_the_host_is_not_given_away(reachable: Path, over: str) -> None:
    """Who makes a mount namespace of his own can have any folder of the host stand in the place of his."""
    before = facts(reachable)
    with in_namespace(reachable, over) as target:
        with pytest.raises(CannotInject, match="no folder for the control socket"):
            place.prepare(target, place.choose(target, None), shared=False)
        place.remove(target)
    assert facts(reachable) == before
    assert not list(reachable.iterdir())


def test_a_socket_of_the_host_is_not_removed(reachable: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, in_namespace(reachable, "/run/ramlock") as target:
        (reachable / str(target.pid)).mkdir()
        server.bind(str(reachable / str(target.pid) / "sock"))
        place.remove(target)
        assert (reachable / str(target.pid) / "sock").exists()


def test_a_namespace_of_its_own_gets_its_folder(reachable: Path) -> None:
    us = os.geteuid(), os.getegid(), os.getgroups()
    with in_namespace(reachable, "/run/other") as target:
        folder = Path(f"/proc/{target.pid}/root/run/ramlock/{target.pid}")
        for shared, mode in ((False, 0o700), (True, 0o711)):
            place.prepare(target, place.choose(target, None), shared=shared)
            assert (folder.stat().st_uid, folder.stat().st_mode & 0o7777) == (65534, mode)
        assert (os.geteuid(), os.getegid(), os.getgroups()) == us
        place.remove(target)
        assert not folder.exists()
    assert (os.geteuid(), os.getegid(), os.getgroups()) == us


def test_who_waits_there_takes_no_rights_from_others(nobodys: procfs.Process) -> None:
    """A file system of the target's own may let a thread of the daemon wait without end, while others go on."""
    entered, leave = threading.Event(), threading.Event()
    us = os.geteuid(), os.getegid(), os.getgroups()
    seen = []

    def wait() -> None:
        with place._acting(place._Who(65534, 65534)):
            seen.append((os.geteuid(), os.getegid(), os.getgroups()))
            entered.set()
            leave.wait(60)
        seen.append((os.geteuid(), os.getegid(), os.getgroups()))

    thread = threading.Thread(target=wait)
    thread.start()
    try:
        assert entered.wait(60)
        assert (os.geteuid(), os.getegid(), os.getgroups()) == us
        place.prepare(nobodys, place.choose(nobodys, None), shared=False)
        place.remove(nobodys)
    finally:
        leave.set()
        thread.join(60)
    assert seen == [(65534, 65534, []), us]


def test_a_folder_that_is_there_is_not_given_away(nobodys: procfs.Process) -> None:
    """Neither what root keeps there nor, when it is empty, the folder itself: a new one takes its place."""
    folder = Path(f"/run/ramlock/{nobodys.pid}")
    folder.mkdir(parents=True)
    held = os.open(folder, os.O_PATH)
    try:
        place.prepare(nobodys, place.choose(nobodys, None), shared=False)
        assert folder.stat().st_uid == 65534
        assert os.fstat(held).st_uid == 0
    finally:
        os.close(held)
        place.remove(nobodys)
