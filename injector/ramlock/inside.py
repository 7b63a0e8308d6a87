"""Files of a process that may be hostile: paths are resolved inside the root that it sees, and never lead out of it.

Neither ".." nor a symbolic link leaves that root, and links of /proc are not followed at all (openat2(2)).
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path

from ramlock import procfs
from ramlock.errors import NoPermission, NotFound

_SYS_OPENAT2 = 437  # on every architecture: it came after the numbers were unified
_RESOLVE_NO_XDEV, _RESOLVE_NO_MAGICLINKS, _RESOLVE_NO_SYMLINKS, _RESOLVE_BENEATH, _RESOLVE_IN_ROOT = 1, 2, 4, 8, 16


def open_root(pid: int, proc: Path = procfs.PROC) -> int:
    """Open the directory that is "/" to `pid` (O_PATH). Raises NoPermission and NotFound."""
    try:
        return os.open(proc / str(pid) / "root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except PermissionError:
        raise NoPermission(
            f"no permission to look into the file system of process {pid}",
            "run ramlock as root or as the user who started the VM, or start the VM with --allow-uid",
        ) from None
    except OSError:
        raise NotFound(f"there is no process {pid}", "see the running VMs with: ramlock list") from None


def open_path(root: int, path: str, flags: int = os.O_PATH) -> int:
    """Open `path` as if the directory `root` were "/". Raises OSError.

    With other flags than O_PATH the file may block whoever reads it: look first whether it is a regular one.
    """
    return _openat2(root, path, flags, _RESOLVE_IN_ROOT | _RESOLVE_NO_MAGICLINKS)


def open_entry(folder: int, name: str, flags: int = os.O_PATH) -> int:
    """Open what `folder` itself holds under `name`: no link, and nothing that is mounted there. Raises OSError."""
    resolve = _RESOLVE_BENEATH | _RESOLVE_NO_SYMLINKS | _RESOLVE_NO_MAGICLINKS | _RESOLVE_NO_XDEV
    return _openat2(folder, name, flags | os.O_NOFOLLOW, resolve)


def _openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    import ctypes  # costs milliseconds, and only VMs in other mount namespaces need it

    class OpenHow(ctypes.Structure):
        _fields_ = (("flags", ctypes.c_uint64), ("mode", ctypes.c_uint64), ("resolve", ctypes.c_uint64))

    how = OpenHow(flags | os.O_CLOEXEC, 0, resolve)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = int(
        libc.syscall(
            ctypes.c_long(_SYS_OPENAT2),
            ctypes.c_int(folder),
            ctypes.c_char_p(os.fsencode(path)),
            ctypes.byref(how),
            ctypes.c_size_t(ctypes.sizeof(how)),
        )
    )
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path)
    return fd
