"""Where an injected shim's socket goes, and what must be there for it: folders, a link, and their removal.

In a process of root's or of our own that sees our files, the shim chooses its usual place (docs/protocol.md). For one
of another user or with another root it gets a folder of its own, /run/ramlock/PID in the root that *it* sees, which
belongs to its user; /run/ramlock/PID.sock of the host leads there. PID is the host's, so that no two namespaces meet.

Whoever owns a user namespace mounts there what he likes, such as a folder of the host at /run/ramlock. In such a root
nothing is done with our own rights: we act as the root of that namespace, and so do only what he could do himself.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import fcntl
import os
import re
import socket
import stat
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from ramlock import endpoint, inside, procfs
from ramlock.errors import CannotInject, NoPermission, NotFound, UsageError, VmGone
from ramlock.text import printable

RUN = Path("/run/ramlock")
MAX_SOCKET_PATH = 107
"""Bytes of the longest path that an address of unix(7) holds."""
_NS_GET_USERNS = 0xB701
"""ioctl_ns(2): opens the user namespace that owns a namespace."""
_SYS_SETGROUPS, _SYS_SETRESUID, _SYS_SETRESGID = 116, 117, 119  # of x86-64, which is all that is injected
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
        if not _has_folder(process, os.path.dirname(wanted), proc):
            raise UsageError(
                f"process {process.pid} sees no folder {printable(os.path.dirname(wanted), 120)} for the socket",
                "make that folder, or choose another, such as /run",
            )
        return Place(wanted, False)
    uid = process.uids[1]
    usual = procfs.same_root(process.pid, proc) and process.inner_pid == process.pid and uid == os.geteuid()
    if usual or os.geteuid() != 0:
        return Place(None, False)
    return Place(endpoint.own_socket(process.pid), True)


def _has_folder(process: procfs.Process, path: str, proc: Path) -> bool:
    """Whether there is such a folder in the target's root; what we may not see may be there."""
    try:
        root = inside.open_root(process.pid, proc)
        try:
            os.close(inside.open_path(root, path, os.O_PATH | os.O_DIRECTORY))
        finally:
            os.close(root)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, NoPermission, NotFound):
        pass
    return True


def prepare(process: procfs.Process, place: Place, *, shared: bool, proc: Path = procfs.PROC) -> None:
    """Make the folder; `shared` when other users may connect. Raises CannotInject when that cannot be done."""
    if not place.own_folder:
        return
    try:
        with ExitStack() as stack:
            theirs = _look(stack, process, proc)
            with _acting(theirs.master):
                run = _folder(stack, theirs.root, "run", 0o755)
                ours = _folder(stack, run, "ramlock", 0o755)
                if theirs.is_ours:
                    _trust(ours)
                fd = _make_own(stack, ours, process)
            _give(fd, process.uids[1], 0o711 if shared else 0o700)
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
    with suppress(OSError, NoPermission, NotFound, VmGone), ExitStack() as stack:
        theirs = _look(stack, process, proc)
        own = str(process.pid)
        if theirs.master is not None:
            # The folder is of the process's user, into which the root of its namespace cannot look without privileges.
            with suppress(OSError), _acting(theirs.master._replace(uid=process.uids[1])):
                fd = inside.open_entry(_run(stack, theirs.root), own, os.O_PATH | os.O_DIRECTORY)
                stack.callback(os.close, fd)
                _unlink_socket(fd)
        with _acting(theirs.master):
            _remove_own(_run(stack, theirs.root), own)
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
            found = re.fullmatch(r"\.?(\d+)(\.sock|\.books)?", entry, re.ASCII)
            if found is None or (entry[0] == "." and found[2] != ".books") or (proc / found[1]).exists():
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


class _Who(NamedTuple):
    """Whose rights count."""

    uid: int
    gid: int


class _Root(NamedTuple):
    """The root of a process."""

    root: int
    is_ours: bool
    """Whether a path means the same there as to us."""
    master: _Who | None
    """The root of the user namespace that may have arranged it, as we number users; None when only our root may."""


def _look(stack: ExitStack, process: procfs.Process, proc: Path) -> _Root:
    """Open the root of `process`, and learn who decides what is in there. Raises OSError when that is in doubt.

    The root is opened first: a process gets into a user namespace below its own, but never back out of one.
    """
    pin = procfs.Pin(process.pid)
    stack.callback(pin.close)
    folder, self = proc / str(process.pid), proc / "self"
    root = inside.open_root(process.pid, proc)
    stack.callback(os.close, root)
    mounts = os.open(folder / "ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    stack.callback(os.close, mounts)
    users, our_users = _identity(os.stat(folder / "ns/user")), _identity(os.stat(self / "ns/user"))
    maps = [(folder / name).read_text(encoding="ascii") for name in ("uid_map", "gid_map")]
    pin.check()
    if procfs.read(process.pid, proc).start_time != process.start_time:
        raise OSError(0, "it is another process by now")
    mounts_are_ours = _identity(os.fstat(mounts)) == _identity(os.stat(self / "ns/mnt"))
    is_ours = mounts_are_ours and _identity(os.fstat(root)) == _identity(os.stat(self / "root/."))
    if is_ours or os.geteuid() != 0:
        return _Root(root, is_ours, None)
    if not mounts_are_ours:
        owner = fcntl.ioctl(mounts, _NS_GET_USERNS)
        stack.callback(os.close, owner)
        if _identity(os.fstat(owner)) not in (users, our_users):
            raise OSError(0, "its mounts belong to another user namespace than it does")
        if users == our_users and _identity(os.fstat(owner)) != our_users:
            raise OSError(0, "its mounts belong to a user namespace that is not ours")
    if users == our_users:
        return _Root(root, False, None)  # real root has mounted what is there, and changed its root
    uid, gid = (_outside(0, text) for text in maps)
    if uid is None or gid is None or not _is_mapped(process.uids[1], maps[0]):
        raise OSError(0, "its user namespace has no root, or not its user")
    return _Root(root, False, _Who(uid, gid))


def _identity(facts: os.stat_result) -> tuple[int, int]:
    return facts.st_dev, facts.st_ino


def _ranges(text: str) -> Iterator[tuple[int, int, int]]:
    """Read a uid_map or gid_map, without what has no number among ours."""
    for line in text.splitlines():
        inner, outer, count = map(int, line.split())
        if outer != 2**32 - 1:
            yield inner, outer, count


def _outside(inner: int, text: str) -> int | None:
    return next((outer + inner - first for first, outer, n in _ranges(text) if first <= inner < first + n), None)


def _is_mapped(outside: int, text: str) -> bool:
    return any(outer <= outside < outer + count for _, outer, count in _ranges(text))


@contextmanager
def _acting(who: _Who | None) -> Iterator[None]:
    """Let files be opened, made and removed with the rights of `who` alone, by this thread; None: with ours.

    Not as seteuid(3) does it, for all threads: files of a hostile process can keep this one waiting without end, and
    the others are to keep their rights.
    """
    if who is None:
        yield
        return
    uid, gid, groups = os.geteuid(), os.getegid(), os.getgroups()
    try:
        _call(_SYS_SETGROUPS, 0, None)
        _call(_SYS_SETRESGID, -1, who.gid, -1)
        _call(_SYS_SETRESUID, -1, who.uid, -1)
        yield
    finally:
        _call(_SYS_SETRESUID, -1, uid, -1)
        _call(_SYS_SETRESGID, -1, gid, -1)
        _call(_SYS_SETGROUPS, len(groups), struct.pack(f"{len(groups)}I", *groups))


def _call(number: int, *arguments: int | bytes | None) -> None:
    """Make a system call, for this thread alone. Raises OSError."""
    import ctypes  # costs milliseconds, and only VMs in other user namespaces need it

    libc = ctypes.CDLL(None, use_errno=True)
    words = [ctypes.c_long(word) if isinstance(word, int) else ctypes.c_char_p(word) for word in arguments]
    if libc.syscall(ctypes.c_long(number), *words) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def _folder(stack: ExitStack, parent: int, name: str, mode: int) -> int:
    """Open a folder, following links as the target would; make it if need be."""
    try:
        fd = inside.open_path(parent, name, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        os.mkdir(name, 0o700, dir_fd=parent)
        fd = _made(parent, name)
        os.fchmod(fd, mode)  # whatever our umask says
    stack.callback(os.close, fd)
    return fd


def _made(parent: int, name: str) -> int:
    """Open the folder that we have just made, making sure that it is that one."""
    fd = inside.open_entry(parent, name, os.O_RDONLY | os.O_DIRECTORY)
    try:
        facts = os.fstat(fd)
        if facts.st_uid != os.geteuid() or facts.st_dev != os.fstat(parent).st_dev or os.listdir(fd):
            raise OSError(0, f"somebody has put another folder in the place of {name}")
    except BaseException:
        os.close(fd)
        raise
    return fd


def _trust(folder: int) -> None:
    """Refuse a folder of ours in which others could put things. In another root the target may do as it likes."""
    facts = os.fstat(folder)
    if facts.st_uid != os.geteuid() or facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise OSError(0, f"{RUN} belongs to another user or can be written by others")


def _make_own(stack: ExitStack, ours: int, process: procfs.Process) -> int:
    """Return the process's folder: one that belongs to its user already, or else a new one of ours."""
    name = str(process.pid)
    try:
        os.mkdir(name, 0o700, dir_fd=ours)
    except FileExistsError:
        fd = inside.open_entry(ours, name, os.O_PATH | os.O_DIRECTORY)
        stack.callback(os.close, fd)
        if (owner := os.fstat(fd).st_uid) == process.uids[1]:
            return fd
        # It was left by a process that had this pid before, or put there. It is not ours to give away.
        try:
            _remove_own(ours, name)
        except OSError:
            raise OSError(0, f"there is another one, {RUN}/{name}, of uid {owner}") from None
        os.mkdir(name, 0o700, dir_fd=ours)
    fd = _made(ours, name)
    stack.callback(os.close, fd)
    return fd


def _give(fd: int, uid: int, mode: int) -> None:
    """Give a folder that _make_own() has returned to the target's user.

    It is that user's or was made by whom we acted as, so this is no more than the root of their namespace may do.
    """
    facts = os.fstat(fd)
    through = f"/proc/self/fd/{fd}"  # it may be open as a path only
    if facts.st_uid != uid:
        os.chown(through, uid, -1)
    if stat.S_IMODE(facts.st_mode) != mode:
        os.chmod(through, mode)


def _run(stack: ExitStack, root: int) -> int:
    fd = inside.open_path(root, str(RUN), os.O_PATH | os.O_DIRECTORY)
    stack.callback(os.close, fd)
    return fd


def _unlink_socket(folder: int) -> None:
    with suppress(FileNotFoundError):
        if stat.S_ISSOCK(os.stat("sock", dir_fd=folder, follow_symlinks=False).st_mode):
            os.unlink("sock", dir_fd=folder)


def _remove_own(ours: int, name: str) -> None:
    fd = inside.open_entry(ours, name, os.O_PATH | os.O_DIRECTORY)
    try:
        with suppress(PermissionError):
            _unlink_socket(fd)
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
