"""Why the kernel does not let us into a process (ptrace(2), "Ptrace access mode checking")."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path
from typing import NamedTuple

from ramlock import procfs
from ramlock.errors import NoPermission, NotFound

CAP_SYS_PTRACE = 19
_AS_ROOT = "run ramlock as root"


class Facts(NamedTuple):
    """What the kernel decides by."""

    pid: int
    uid: int
    """Our effective uid."""
    capabilities: int
    """Our effective capabilities, a bit mask."""
    uids: tuple[int, ...]
    """The target's real, effective, saved and file system uid."""
    permitted: int
    """The target's permitted capabilities."""
    owner: int
    """Who owns the files in /proc/PID: root, when the process may not be dumped."""
    yama: int
    """kernel.yama.ptrace_scope; 0 where there is no Yama."""


def facts(process: procfs.Process, proc: Path = procfs.PROC) -> Facts:
    """Read them; of a process that has ended, what was known before."""
    try:
        # Of a file in it: the folder itself always belongs to the process's user.
        owner = (proc / str(process.pid) / "status").stat().st_uid
        permitted = procfs.capabilities(process.pid, "CapPrm", proc)
    except (OSError, NotFound):
        owner, permitted = process.uids[1], 0
    try:
        yama = int((proc / "sys/kernel/yama/ptrace_scope").read_text(encoding="ascii"))
    except (OSError, ValueError):
        yama = 0
    return Facts(
        process.pid,
        os.geteuid(),
        procfs.capabilities("self", "CapEff", proc),
        process.uids,
        permitted,
        owner,
        yama,
    )


def explain(f: Facts) -> NoPermission:
    """Say which of the kernel's rules forbids it."""
    capable = bool(f.capabilities >> CAP_SYS_PTRACE & 1)
    what = f"the kernel forbids to trace process {f.pid}: "
    if f.yama >= 3:
        return NoPermission(
            what + "Yama forbids it to everybody (kernel.yama.ptrace_scope is 3)",
            "it stays so until the host is started again; start VMs with ramlock run there",
        )
    if not capable and f.uid == 0:
        return NoPermission(
            what + "this root lacks the capability CAP_SYS_PTRACE",
            "give it to the container or service that ramlock runs in, or run ramlock on the host",
        )
    if not capable:
        if set(f.uids[:3]) != {f.uid}:
            return NoPermission(what + f"it belongs to another user (uid {f.uids[1]})", _AS_ROOT)
        if f.owner != f.uid:
            return NoPermission(what + "it is protected, since it changed its user or rights (not dumpable)", _AS_ROOT)
        if f.yama:
            return NoPermission(what + f"Yama forbids it (kernel.yama.ptrace_scope is {f.yama})", _AS_ROOT)
        if f.permitted & ~f.capabilities:
            return NoPermission(what + "it has capabilities that this user lacks", _AS_ROOT)
    return NoPermission(
        what + "a security module, or it is of a user namespace outside of ours",
        "run ramlock as root on the host; look into the kernel's log for who forbade it",
    )
