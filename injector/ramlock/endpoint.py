"""Where a shim's socket is (docs/protocol.md says so), and how to connect to it without being led astray.

A VM's process chooses its own files and may be hostile: a path is resolved inside the root that the VM sees, its links
cannot lead out of there, and what is connected to must be a socket on which that very process listens.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import errno
import itertools
import os
import re
import socket
import stat
import struct
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from ramlock import inside, procfs
from ramlock.deadline import Deadline
from ramlock.errors import NoAnswer, NoPermission, NotFound, NotOurs, RamlockError, UsageError
from ramlock.text import printable

_RETRY = 0.02
_PATIENCE = 1.0
"""Seconds to wait at one of several places: whoever has put a socket there that never answers delays the rest."""
_ANYBODYS = re.compile(r"(/tmp/ramlock-\d+|/run/user/\d+/ramlock)/[^/]+", re.ASCII)
"""Places in folders that others might have made before the VM's user did."""
_BEST = (NotOurs, NoPermission, NoAnswer)
"""Which trouble says most when no place leads to the shim."""
_RIGHTS = "run ramlock as root or as the user who started the VM, or start the VM with --allow-uid"


class Peer(NamedTuple):
    """Who listens on the other side, by the kernel's word (SO_PEERCRED in unix(7)); pid is 0 when we cannot see it."""

    pid: int
    uid: int


def peer(sock: socket.socket) -> Peer:
    """Return who called listen() on the socket that `sock` is connected to."""
    pid, uid, _gid = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return Peer(pid, uid)


def check_allowed(allow_uid: int | None, socket: str | None) -> None:
    """Raise UsageError when `allow_uid` is to be let in where only our own user can come to: our usual place."""
    uid = os.geteuid()
    if allow_uid in (None, 0, uid) or uid == 0 or socket is not None:
        return
    raise UsageError(
        f"--allow-uid {allow_uid} would let nobody in: only uid {uid} can enter the folder of the socket's usual place",
        f"name another place with --socket, in a folder that uid {allow_uid} can enter",
    )


def own_folder(pid: int) -> str:
    """Return the folder that an injection makes for a process of another user or with another root, as it sees it."""
    return f"/run/ramlock/{pid}"


def own_socket(pid: int) -> str:
    """Return the socket in `own_folder`."""
    return f"{own_folder(pid)}/sock"


def candidates(process: procfs.Process, environ: Mapping[str, str] | None) -> list[str]:
    """List the paths where the shim's socket of `process` may be; the likeliest first.

    Its environment may be unknown, its uid may have changed since it was started (-runas), and in a pid namespace it
    knows itself by another pid.
    """
    environ = environ or {}
    folders = ["/run/ramlock"]
    if runtime := environ.get("XDG_RUNTIME_DIR"):
        folders.append(f"{runtime}/ramlock")
    for uid in sorted(set(process.uids) - {0}):
        folders += [f"/run/user/{uid}/ramlock", f"/tmp/ramlock-{uid}"]  # noqa: S108 the peer behind it is checked
    paths = [environ.get("RAMLOCK_SOCKET", "")]
    paths += [f"{folder}/{pid}.sock" for pid in (process.inner_pid, process.pid) for folder in folders]
    paths.append(own_socket(process.pid))
    return list(dict.fromkeys(path for path in paths if path.startswith("/")))


def connect(path: str, deadline: Deadline, root: int | None = None) -> socket.socket:
    """Connect to the socket at `path`; `root` is a directory's descriptor that stands for "/".

    Raises FileNotFoundError and ConnectionRefusedError when nobody listens there, NotOurs when it is no socket,
    NoPermission when we may not, NoAnswer when the listener's queue stays full.
    """
    shown = printable(path)
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC) if root is None else inside.open_path(root, path)
    except PermissionError:
        raise NoPermission(f"no permission to reach {shown}", _RIGHTS) from None
    except NotADirectoryError:
        raise FileNotFoundError(path) from None
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise
        raise NotOurs(f"cannot open {shown}: {error.strerror}", "give the path of the shim's socket") from None
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            raise NotOurs(f"{shown} is not a socket", "give the path of the shim's socket")
        # Through the descriptor: the path could mean another file by now, and may be longer than an address holds.
        return _connect(f"/proc/self/fd/{fd}", shown, deadline)
    finally:
        os.close(fd)


def connect_process(
    process: procfs.Process, environ: Mapping[str, str] | None, deadline: Deadline, proc: Path = procfs.PROC
) -> tuple[socket.socket, str]:
    """Connect to the shim in `process`; return the socket and its path.

    A process that sees another root than we do is looked for there, and then here: with -chroot its socket was made
    before it changed its root. What its environment names is sought here only then. Raises NotFound when it has none,
    NoPermission when we may not, NotOurs when only others listen in its place, NoAnswer when all that was found is a
    queue that stays full.
    """
    trouble: list[RamlockError] = []
    named = (environ or {}).get("RAMLOCK_SOCKET")
    with ExitStack() as stack:
        where: list[tuple[int | None, str]] = []
        if procfs.same_root(process.pid, proc):
            where += [(None, path) for path in candidates(process, environ)]
        else:
            try:
                theirs = inside.open_root(process.pid, proc)
                stack.callback(os.close, theirs)
                where += [(theirs, path) for path in candidates(process, environ)]
            except NoPermission as error:
                trouble.append(error)
            where += [(None, path) for path in candidates(process, environ if _changes_root(process) else None)]
        for root, path in where:
            if path != named and _ANYBODYS.fullmatch(path) and not _is_theirs(process, os.path.dirname(path), root):
                continue
            try:
                sock = connect(path, deadline.within(_PATIENCE), root)
            except (FileNotFoundError, ConnectionRefusedError):
                continue
            except (NoPermission, NotOurs, NoAnswer) as error:
                trouble.append(error)
                continue
            if (listener := peer(sock).pid) == process.pid:
                return sock, path
            sock.close()
            trouble.append(
                NotOurs(
                    f"{printable(path)} belongs to process {listener}, not to the VM (pid {process.pid})",
                    "remove that socket if nobody needs it, and restart the VM",
                )
            )
    if trouble:
        raise min(trouble, key=lambda error: [isinstance(error, kind) for kind in _BEST].index(True))
    raise NotFound(
        f"there is no ramlock shim in process {process.pid}",
        f"bring it in: ramlock inject --pid {process.pid}; if it listens elsewhere, name its socket with --socket",
    )


def _changes_root(process: procfs.Process) -> bool:
    """Whether QEMU was told to change its root once it has started."""
    return any(
        option in ("-chroot", "--chroot")
        or (option in ("-run-with", "--run-with") and re.search(r"(^|,)chroot=", value) is not None)
        for option, value in itertools.pairwise(process.cmdline)
    )


def _is_theirs(process: procfs.Process, folder: str, root: int | None) -> bool:
    """Whether only the users of `process` can have put anything into `folder`."""
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW
    try:
        fd = os.open(folder, flags | os.O_CLOEXEC) if root is None else inside.open_path(root, folder, flags)
        try:
            facts = os.fstat(fd)
        finally:
            os.close(fd)
    except PermissionError:
        return True  # so connect() will say that we may not
    except OSError:
        return False
    return facts.st_uid in process.uids and not facts.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _connect(address: str, shown: str, deadline: Deadline) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        # A full queue is EAGAIN at once when not blocking, and would block without end otherwise.
        sock.setblocking(False)
        while True:
            try:
                sock.connect(address)
                return sock
            except BlockingIOError:
                if deadline.expired:
                    raise NoAnswer(
                        f"{shown} does not answer",
                        "too many clients are waiting there already; is the process stopped?",
                    ) from None
                time.sleep(_RETRY)
    except PermissionError:
        sock.close()
        raise NoPermission(f"no permission to connect to {shown}", _RIGHTS) from None
    except OSError as error:
        sock.close()
        if error.errno in (errno.ENOENT, errno.ECONNREFUSED):
            raise
        raise NotOurs(f"cannot connect to {shown}: {error.strerror}", "give the path of the shim's socket") from None
    except BaseException:
        sock.close()
        raise
