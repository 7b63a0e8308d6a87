"""By which path a target can load the shim's file: the file's own, or else a memory file (memfd.py).

dlopen() finds an object again by the name under which it was loaded, and by the file's inode. So a file that was
replaced at the same path would give the former object, and needs another spelling of its path; one that was
overwritten in place needs a memory file.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
from typing import NamedTuple

from ramlock import elf, inside, procfs
from ramlock.errors import CannotInject
from ramlock.loaded import Shim
from ramlock.memory import Mapping, find_build_id

_PROC_MAGIC = 0x9FA0
_CAP_DAC_OVERRIDE, _CAP_DAC_READ_SEARCH = 1, 2


class File(NamedTuple):
    """The shim's file."""

    path: Path
    build_id: str
    stat: os.stat_result


class Road(NamedTuple):
    """How the target gets the shim."""

    path: str | None
    """What the target opens; None: a memory file, which is to be made."""
    why: str
    """Why it is not the file itself; "" when it is."""


def read(path: Path) -> File:
    """Read what identifies the shim's file. Raises CannotPreload when it is not one that can be injected."""
    (note,) = elf.sections(path, (".note.gnu.build-id",))
    return File(path, find_build_id(note), path.stat())


def choose(
    process: procfs.Process, shim: File, loaded: list[Shim], maps: list[Mapping], proc: Path = procfs.PROC
) -> Road:
    """Choose the path; nothing is made. Raises CannotInject when there is none, and VmGone or NoPermission."""
    for other in reversed(loaded):
        if other.build_id == shim.build_id:
            return Road(other.name, "")
    why = hidden(process, shim, proc)
    if not why and any(m.inode == shim.stat.st_ino and "ramlock" in m.path for m in maps):
        why = "the shim's file was overwritten since the process loaded it"
    if not why:
        return Road(spelling(str(shim.path), [other.name for other in loaded]), "")
    if not has_proc(process, proc):
        raise CannotInject(
            f"{why}, and /proc is not mounted where process {process.pid} could use it instead",
            f"make {shim.path} readable there, or mount /proc in its root",
        )
    return Road(None, why)


def spelling(path: str, taken: list[str]) -> str:
    """Return a path to the same file that is none of `taken`."""
    folder, slash, base = path.rpartition("/")
    while (spelled := folder + slash + base) in taken:
        folder += "/."
    return spelled


def hidden(process: procfs.Process, shim: File, proc: Path = procfs.PROC) -> str:
    """Say why the target cannot load the shim's file by its path; "" when it can."""
    try:
        root = inside.open_root(process.pid, proc)
        try:
            fd = inside.open_path(root, str(shim.path))
        finally:
            os.close(root)
    except OSError:
        return f"the process does not see {shim.path}"
    try:
        facts, flags = os.fstat(fd), os.fstatvfs(fd).f_flag
    finally:
        os.close(fd)
    if (facts.st_dev, facts.st_ino) != (shim.stat.st_dev, shim.stat.st_ino):
        return f"the process sees another file as {shim.path}"
    if flags & os.ST_NOEXEC:
        return f"the process sees {shim.path} on a file system mounted noexec"
    if not _may_read(process, shim, proc):
        return f"the process may not read {shim.path}"
    return ""


def has_proc(process: procfs.Process, proc: Path = procfs.PROC) -> bool:
    """Tell whether /proc in the target's root is the kernel's."""
    import ctypes  # costs milliseconds, and few targets need it

    try:
        root = inside.open_root(process.pid, proc)
        try:
            fd = inside.open_path(root, "/proc/self", os.O_PATH | os.O_NOFOLLOW)
        finally:
            os.close(root)
    except OSError:
        return False
    try:
        # struct statfs begins with f_type, a long.
        words = (ctypes.c_long * 64)()
        return ctypes.CDLL(None).fstatfs(fd, ctypes.byref(words)) == 0 and words[0] == _PROC_MAGIC
    finally:
        os.close(fd)


def _may_read(process: procfs.Process, shim: File, proc: Path) -> bool:
    """Whether the modes of the file and of the folders above let the target's user read it; other rules may not."""
    capabilities = procfs.capabilities(process.pid, "CapEff", proc)
    if capabilities >> _CAP_DAC_OVERRIDE & 1 or capabilities >> _CAP_DAC_READ_SEARCH & 1:
        return True
    uid, groups = process.uids[3], procfs.groups(process.pid, proc)
    path = os.path.realpath(shim.path)
    wanted = [(path, 4)]
    while path != "/":
        path = os.path.dirname(path)
        wanted.append((path, 1))
    for place, bit in wanted:
        facts = os.stat(place)
        shift = 6 if facts.st_uid == uid else 3 if facts.st_gid in groups else 0
        if not facts.st_mode >> shift & bit:
            return False
    return True
