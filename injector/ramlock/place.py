"""Where an injected shim's socket goes, and what must be there for it: folders, a link, and their removal.

In a process of root's or of our own that sees our files, the shim chooses its usual place (docs/protocol.md). For one
of another user or with another root it gets a folder of its own, /run/ramlock/PID in the root that *it* sees, which
belongs to its user; /run/ramlock/PID.sock of the host leads there. PID is the host's, so that no two namespaces meet.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import re
import socket
import stat
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from ramlock import endpoint, inside, procfs
from ramlock.errors import CannotInject, NoPermission, NotFound, UsageError

RUN = Path("/run/ramlock")
MAX_SOCKET_PATH = 107
"""Bytes of the longest path that an address of unix(7) holds."""
_ELSEWHERE = "name another place with --socket, as the VM's process sees it"


class Place(NamedTuple):
    """Where the socket will be, as the target sees it."""

    path: str | None
    """None: the shim's usual place."""
    own_folder: bool
    """Whether that is a folder made for it alone."""


def choose(process: procfs.Process, wanted: str | None, proc: Path = procfs.PROC) -> Place:
    """Choose the place; nothing is made. Raises UsageError when the `wanted` one cannot be a socket's."""
    if wanted is not None:
        if not wanted.startswith("/") or "\n" in wanted or len(os.fsencode(wanted)) > MAX_SOCKET_PATH:
            raise UsageError(
                f"a socket's path is absolute and at most {MAX_SOCKET_PATH} bytes long",
                "choose another, such as in /run",
            )
        return Place(wanted, False)
    uid = process.uids[1]
    usual = procfs.same_root(process.pid, proc) and process.inner_pid == process.pid and uid == os.geteuid()
    if usual or os.geteuid() != 0:
        return Place(None, False)
    return Place(endpoint.own_socket(process.pid), True)


def prepare(process: procfs.Process, place: Place, *, shared: bool, proc: Path = procfs.PROC) -> None:
    """Make the folder; `shared` when other users may connect. Raises CannotInject when that cannot be done."""
    if not place.own_folder:
        return
    try:
        with ExitStack() as stack:
            root = inside.open_root(process.pid, proc)
            stack.callback(os.close, root)
            run = _folder(stack, root, "run", 0o755)
            ours = _folder(stack, run, "ramlock", 0o755)
            _trust(process, ours, proc)
            _make_own(stack, ours, process, 0o711 if shared else 0o700)
    except OSError as error:
        raise CannotInject(
            f"no folder for the control socket can be made in the root of process {process.pid}: {error.strerror}",
            _ELSEWHERE,
        ) from None


def link(process: procfs.Process, place: Place, proc: Path = procfs.PROC, run: Path = RUN) -> None:
    """Leave /run/ramlock/PID.sock, which leads to the socket. Nothing depends on it, so failing is no error."""
    if place.path is None or os.geteuid() != 0:
        return
    name = run / f"{process.pid}.sock"
    if place.path == str(name):
        return
    with suppress(OSError):
        run.mkdir(mode=0o755, exist_ok=True)
        if name.is_symlink():
            name.unlink()
        name.symlink_to(_seen_from_here(process, place.path, proc))


def linked(process: procfs.Process, run: Path = RUN) -> str | None:
    """Return the place that link() recorded, as the target sees it; None when none was named."""
    try:
        path = os.readlink(run / f"{process.pid}.sock").removeprefix(f"/proc/{process.pid}/root")
    except OSError:
        return None
    return None if path == endpoint.own_socket(process.pid) else path


def remove(process: procfs.Process, proc: Path = procfs.PROC, run: Path = RUN) -> None:
    """Take away folder and link of a process whose shim has gone. Never raises."""
    with suppress(OSError, NoPermission, NotFound), ExitStack() as stack:
        root = inside.open_root(process.pid, proc)
        stack.callback(os.close, root)
        ours = inside.open_path(root, str(RUN), os.O_PATH | os.O_DIRECTORY)
        stack.callback(os.close, ours)
        _remove_own(ours, str(process.pid))
    with suppress(OSError):
        name = run / f"{process.pid}.sock"
        if name.is_symlink():
            name.unlink()


def sweep(proc: Path = procfs.PROC, run: Path = RUN) -> None:
    """Take away what processes that have ended left in /run/ramlock, where nobody listens any more. Never raises.

    A pid alone proves nothing, since it may be one of another namespace that shares this folder.
    """
    with suppress(OSError), ExitStack() as stack:
        folder = os.open(run, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        stack.callback(os.close, folder)
        for entry in os.listdir(folder):
            found = re.fullmatch(r"(\d+)(\.sock|\.books)?", entry, re.ASCII)
            if found is None or (proc / found[1]).exists():
                continue
            with suppress(OSError):
                if found[2] == ".books":
                    os.unlink(entry, dir_fd=folder)
                elif found[2]:
                    facts = os.stat(entry, dir_fd=folder, follow_symlinks=False)
                    if (stat.S_ISLNK(facts.st_mode) or stat.S_ISSOCK(facts.st_mode)) and not _alive(run / entry):
                        os.unlink(entry, dir_fd=folder)
                elif not _alive(run / entry / "sock"):
                    _remove_own(folder, entry)


def uid_inside(uid: int, pid: int, proc: Path = procfs.PROC) -> int:
    """Return how `pid` sees the user `uid` of ours: in a user namespace it has another number, or a stand-in."""
    try:
        lines = (proc / str(pid) / "uid_map").read_text(encoding="ascii").splitlines()
        for line in lines:
            inner, outer, count = map(int, line.split())
            if outer <= uid < outer + count:
                return inner + uid - outer
        return int((proc / "sys/kernel/overflowuid").read_text(encoding="ascii"))
    except (OSError, ValueError):
        return uid


def _folder(stack: ExitStack, parent: int, name: str, mode: int) -> int:
    """Open a folder, following links as the target would; make it if need be."""
    try:
        fd = inside.open_path(parent, name, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        os.mkdir(name, mode, dir_fd=parent)
        fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
        os.fchmod(fd, mode)  # whatever our umask says
    stack.callback(os.close, fd)
    return fd


def _trust(process: procfs.Process, folder: int, proc: Path) -> None:
    """Refuse a folder of ours in which others could put things. In another root the target may do as it likes."""
    if procfs.same_root(process.pid, proc):
        facts = os.fstat(folder)
        if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            raise OSError(0, f"{RUN} belongs to another user or can be written by others")


def _make_own(stack: ExitStack, ours: int, process: procfs.Process, mode: int) -> None:
    uid, name = process.uids[1], str(process.pid)
    made = True
    try:
        os.mkdir(name, 0o700, dir_fd=ours)
    except FileExistsError:
        made = False
    fd = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=ours)
    stack.callback(os.close, fd)
    owner = os.fstat(fd).st_uid
    # Another one was left by a process that had this pid before. It is not ours to give away when it holds anything.
    if owner != uid and not made and os.listdir(fd) not in ([], ["sock"]):
        raise OSError(0, f"there is another one, {RUN}/{name}, of uid {owner}")
    if owner != uid:
        os.fchown(fd, uid, -1)
    os.fchmod(fd, mode)


def _remove_own(ours: int, name: str) -> None:
    fd = os.open(name, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=ours)
    try:
        with suppress(FileNotFoundError):
            os.unlink("sock", dir_fd=fd)
    finally:
        os.close(fd)
    os.rmdir(name, dir_fd=ours)


def from_here(process: procfs.Process, path: str, proc: Path = procfs.PROC, run: Path = RUN) -> str:
    """Return where we reach the socket that the target sees at `path`."""
    name = run / f"{process.pid}.sock"
    return str(name) if name.exists() else _seen_from_here(process, path, proc)


def _seen_from_here(process: procfs.Process, path: str, proc: Path) -> str:
    if procfs.same_root(process.pid, proc):
        return path
    return f"/proc/{process.pid}/root{path}"


def _alive(path: Path) -> bool:
    """Whether somebody listens there; when in doubt, yes."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.setblocking(False)
        try:
            sock.connect(str(path))
        except (FileNotFoundError, ConnectionRefusedError, NotADirectoryError):
            return False
        except OSError:
            return True
        return True
