"""Everything on this host, and around one VM, that decides what ramlock can do here: what it is, what that means, and
what to do about it. Looks only.

Facts come from /proc and /sys below a root that a test can choose, and from asking the kernel (kernel.py).
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import platform
import re
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from ramlock import cgroups, elf, host, kernel, launch, preflight, procfs, shim
from ramlock.errors import RamlockError
from ramlock.sizes import format_size
from ramlock.text import printable

GLIBC_LEAST = (2, 28)
QEMUS = ("qemu-system-x86_64", "qemu-kvm", "kvm")
"""Names under which distributions install it."""
_QEMU_FOLDERS = ("/usr/libexec", "/usr/local/bin", "/usr/bin")
_CAP_SYS_PTRACE, _CAP_SYS_RESOURCE = 19, 24
_MAPS_USUAL = 65530
_MEANS = {
    "process": "this is the VM that is looked at",
    "qemu": "its memory can be guest RAM",
    "running": "its main thread can be borrowed for a moment",
    "not-traced": "ramlock may trace it for a moment",
    "seccomp": "no filter kills QEMU for what the shim does",
    "architecture": "the shim is made for it",
    "rights": "ramlock may look into it, and inject",
    "dynamic": "a library can be loaded into it",
    "glibc": "the shim finds what it needs",
    "shim-file": "this is what is injected",
    "room": "there is place for the few instructions that load it",
    "guest-ram": "what may be locked is known",
    "loaded": "so many shims are in it by now",
    "road": "how QEMU comes to the shim's file",
    "socket": "where the shim will listen",
}
"""What it means that a check of preflight.py passes."""


class Finding(NamedTuple):
    """One thing that was looked at."""

    name: str
    level: str
    """"ok", "note" (worth knowing), or "bad" (something does not work because of it)."""
    found: str
    means: str
    todo: str = ""
    """What to do about it; "" when there is nothing."""


class Host(NamedTuple):
    """Where to look; a test gives other places than the defaults."""

    environ: Mapping[str, str]
    root: Path = Path("/")
    features: kernel.Features | None = None
    """None: ask this kernel."""
    glibc: str | None = None
    """What confstr(3) says of libc, such as "glibc 2.36"; None: ask ours."""

    @property
    def proc(self) -> Path:
        """Where /proc is."""
        return self.root / "proc"

    def text(self, path: str) -> str | None:
        """Return what a small file says; None when there is none, or we may not know."""
        try:
            with (self.root / path).open("rb") as file:
                return file.read(procfs.MAX_FILE).decode("utf-8", "replace").strip()
        except OSError:
            return None

    def chosen(self, path: str) -> str | None:
        """Return the word in brackets of a file such as "always [madvise] never"."""
        found = re.search(r"\[(\S+)\]", self.text(path) or "")
        return found[1] if found else None


def examine(where: Host) -> list[Finding]:
    """Look at this host."""
    return [
        _kernel(where),
        *_features(where.features or kernel.features()),
        _glibc(where),
        _shim(where),
        *_qemus(where),
        _rights(where),
        _yama(where),
        _lsm(where),
        _memlock(where, None),
        _cgroup(where, os.getpid()),
        _memory(where),
        *_swap(where),
        _thp(where),
        _ksm(where),
        _maps(where),
    ]


def examine_vm(where: Host, pid: int) -> list[Finding]:
    """Look at the VM `pid`: all that `ramlock preflight` looks at, and what limits its process.

    Raises NotFound when there is no such process, NoPermission when we may not look.
    """
    procfs.read(pid, where.proc)
    findings = []
    for check in preflight.look(pid, where.environ, proc=where.proc).checks:
        means = _MEANS[check.name] if check.ok else "ramlock inject refuses this VM, and touches nothing"
        findings.append(Finding(check.name, "ok" if check.ok else "bad", check.detail, means, check.hint))
    label = printable(where.text(f"proc/{pid}/attr/current") or "", 100).rstrip("\\0")
    if label and not label.startswith("unconfined"):
        findings.append(
            Finding("lsm-label", "note", label, "a security module decides which files this VM may read and make")
        )
    return [*findings, _memlock(where, pid), _cgroup(where, pid), *_vfio(where, pid)]


def _kernel(where: Host) -> Finding:
    release = printable(where.text("proc/sys/kernel/osrelease") or "unknown", 80)
    machine = platform.machine()
    if machine != "x86_64":
        return Finding(
            "kernel", "bad", f"Linux {release}, {machine}", "the shim is made for x86_64 only", "use an x86_64 host"
        )
    return Finding("kernel", "ok", f"Linux {release}, {machine}", "what it can do is asked below, whatever its version")


def _features(has: kernel.Features) -> Iterator[Finding]:
    newer = "a newer kernel has it: Linux "
    if not has.mlock2:
        yield Finding("mlock2", "bad", "missing", "nothing can be locked", f"{newer}4.4")
    if not (has.pidfd and has.openat2):
        what = " and ".join(name for name in ("pidfd", "openat2") if not getattr(has, name))
        yield Finding(
            "controller",
            "bad",
            f"{what} missing",
            "only VMs started with LD_PRELOAD work, by their socket",
            f"{newer}5.6",
        )
    yield (
        Finding("populate", "ok", "MADV_POPULATE_WRITE", "memory is filled while the VM's page faults go on")
        if has.populate_write
        else Finding(
            "populate",
            "note",
            "no MADV_POPULATE_WRITE",
            "memory is filled by mlock2() itself, in smaller steps, and page faults of the VM wait for each",
            f"{newer}5.14",
        )
    )
    yield (
        Finding("pagemap-scan", "ok", "PAGEMAP_SCAN", "which pages are resident is found at once, in any guest")
        if has.pagemap_scan
        else Finding(
            "pagemap-scan",
            "note",
            "no PAGEMAP_SCAN",
            "resident pages are found by reading pagemap, which takes seconds in a guest of terabytes",
            f"{newer}6.7",
        )
    )


def _glibc(where: Host) -> Finding:
    try:
        said = where.glibc or os.confstr("CS_GNU_LIBC_VERSION") or ""
    except (OSError, ValueError):
        said = ""
    version = re.fullmatch(r"glibc (\d+)\.(\d+).*", said)
    if version is None:
        return Finding(
            "glibc", "bad", "none", "the shim needs glibc in QEMU's process, and this host's programs have none",
            "use a host or a container whose QEMU is built for glibc",
        )  # fmt: skip
    if (int(version[1]), int(version[2])) < GLIBC_LEAST:
        return Finding("glibc", "bad", said, "the shim needs 2.28 or newer", "use a newer distribution's QEMU")
    return Finding("glibc", "ok", said, "the shim can be loaded: it needs 2.28 or newer")


def _shim(where: Host) -> Finding:
    try:
        path = shim.find(where.environ)
        elf.read(path)
    except RamlockError as error:
        return Finding("shim", "bad", error.message, "neither ramlock run nor ramlock inject works", error.hint)
    if closed := _closed_to_others(path):
        return Finding(
            "shim", "note", str(path), f"VMs of other users, as libvirt's, cannot read it: {closed} is closed",
            f"inject gets around that; for ramlock run and LD_PRELOAD: chmod o+rx {closed}, or install it in /usr/lib",
        )  # fmt: skip
    return Finding("shim", "ok", str(path), "VMs of any user can read it")


def _closed_to_others(path: Path) -> Path | None:
    """Return the first on the way to `path` that not everybody may enter or read."""
    for folder in reversed(path.resolve().parents):
        if not folder.stat().st_mode & stat.S_IXOTH:
            return folder
    return None if path.stat().st_mode & stat.S_IROTH else path


def _qemus(where: Host) -> Iterator[Finding]:
    folders = [*where.environ.get("PATH", os.defpath).split(os.pathsep), *_QEMU_FOLDERS]
    places = (where.root / folder.lstrip("/") / name for name in QEMUS for folder in folders if folder.startswith("/"))
    found: dict[str, Path] = {}
    for place in places:
        if os.access(place, os.X_OK) and place.is_file():
            found.setdefault(os.path.realpath(place), place)
    if not found:
        yield Finding(
            "qemu", "note", "none found in PATH", "there is nothing to start with ramlock run", "install QEMU"
        )
    for real, place in found.items():
        try:
            facts = elf.read(Path(real), launch.SYMBOLS)
            elf.check_preload(facts, elf.read(shim.find(where.environ)))
        except RamlockError as error:
            yield Finding("qemu", "note", error.message, "ramlock does not work with this program", error.hint)
            continue
        if facts.exported == launch.SYMBOLS:
            yield Finding("qemu", "ok", f"{place}, symbols exported", "the shim asks QEMU itself where guest RAM is")
        else:
            yield Finding(
                "qemu",
                "note",
                f"{place}, symbols not exported",
                "guest RAM is found from outside, by debug symbols or by mappings, and the shim is told",
                "install QEMU's debug symbols, or a QEMU built with modules; ramlock locate shows how sure it is",
            )


def _rights(where: Host) -> Finding:
    mine = procfs.capabilities("self", "CapEff", where.proc)
    if mine >> _CAP_SYS_PTRACE & 1:
        return Finding("rights", "ok", "CAP_SYS_PTRACE", "VMs of any user can be injected, looked at and set")
    return Finding(
        "rights", "note", f"uid {os.geteuid()}, without CAP_SYS_PTRACE", "only VMs of this user can be worked with",
        "run ramlock as root for those of others, such as libvirt's",
    )  # fmt: skip


def _yama(where: Host) -> Finding:
    scope = where.text("proc/sys/kernel/yama/ptrace_scope")
    if scope is None:
        return Finding("yama", "ok", "not there", "it forbids no injection")
    capable = procfs.capabilities("self", "CapEff", where.proc) >> _CAP_SYS_PTRACE & 1
    found = f"kernel.yama.ptrace_scope = {printable(scope, 20)}"
    if scope == "3":
        return Finding(
            "yama", "bad", found, "no VM that runs can be injected, by anybody, until this host is started again",
            "start VMs with ramlock run; or remove the setting from /etc/sysctl.d and restart the host",
        )  # fmt: skip
    if scope == "0" or capable:
        return Finding("yama", "ok", found, "it does not keep us from injecting")
    return Finding("yama", "bad", found, "this user cannot inject, not even into VMs of its own", "run ramlock as root")


def _lsm(where: Host) -> Finding:
    modules = (where.text("sys/kernel/security/lsm") or "").split(",")
    confining = [name for name in ("apparmor", "selinux") if name in modules]
    if where.text("sys/module/apparmor/parameters/enabled") == "Y" and "apparmor" not in confining:
        confining.append("apparmor")
    if (enforce := where.text("sys/fs/selinux/enforce")) is not None and "selinux" not in confining:
        confining.append("selinux")
    if not confining or (confining == ["selinux"] and enforce == "0"):
        return Finding(
            "lsm", "ok", "none confines VMs", "QEMU may load the shim and make its socket where files allow it"
        )
    return Finding(
        "lsm", "note", " and ".join(confining),
        "libvirt's VMs are confined: they may be denied the shim's file, or its socket's folder",
        "try inject; what was denied is in the audit log. For ramlock run allow the shim's file to be mapped",
    )  # fmt: skip


def _memlock(where: Host, pid: int | None) -> Finding:
    who: int | str = "self" if pid is None else pid
    soft, hard = procfs.memlock_limit(who, where.proc)
    mine = procfs.capabilities("self", "CapEff", where.proc)
    name = "memlock" if pid is None else "vm-memlock"
    shown = "unlimited" if soft is None else format_size(soft)
    if procfs.capabilities(who, "CapEff", where.proc) >> host.CAP_IPC_LOCK & 1:
        return Finding(name, "ok", f"{shown}, with CAP_IPC_LOCK", "the limit does not count")
    if soft is None:
        return Finding(name, "ok", shown, "any amount of guest RAM may be locked")
    if mine >> _CAP_SYS_RESOURCE & 1:
        return Finding(name, "ok", shown, "ramlock raises it as far as a guarantee needs")
    most = "unlimited" if hard is None else format_size(hard)
    if hard is None or hard >= host.RESERVE_LEAST:
        return Finding(name, "ok", f"{shown}, may be raised: {most}", "guarantees up to that fit")
    return Finding(
        name, "bad", f"{shown}, at most {most}", "no guarantee above that can be held",
        "raise it in /etc/security/limits.d (memlock), by systemd's LimitMEMLOCK=, or run ramlock as root",
    )  # fmt: skip


def _cgroup(where: Host, pid: int) -> Finding:
    facts = host.memory(where.proc)
    known = cgroups.levels(pid, facts.swap_free if facts else 0, where.proc, where.root)
    name = "cgroup" if pid == os.getpid() else "vm-cgroup"
    who = "VMs started here" if pid == os.getpid() else "it"
    if known is None:
        return Finding(
            name, "note", "cannot be read", f"how much {who} may use is not known, and counts as used up",
            "mount /sys/fs/cgroup, and run ramlock in the host's cgroup namespace",
        )  # fmt: skip
    tightest = cgroups.tightest(known)
    if tightest is None:
        return Finding(name, "ok", "no memory limit", f"only the host's memory limits what {who} can lock")
    limit = f"{tightest.file} {format_size(tightest.limit)}"
    return Finding(
        name, "note", f"{format_size(tightest.allowed)} left in {tightest.path}, {limit}",
        f"{who} can lock no more than what is left; QEMU would be killed above the limit",
        "" if tightest.allowed else f"raise {tightest.file}: a guarantee above what is resident is short",
    )  # fmt: skip


def _memory(where: Host) -> Finding:
    facts = host.memory(where.proc)
    if facts is None:
        return Finding("memory", "bad", "/proc/meminfo cannot be read", "nothing is locked", "mount /proc")
    keep = host.reserve(facts.total, None)
    found = (
        f"{format_size(facts.available)} of {format_size(facts.total)} available, {format_size(keep)} kept for the host"
    )
    if facts.available <= keep:
        return Finding(
            "memory", "note", found, "a guarantee can only lock what is resident; else it is short", "free memory"
        )
    room = format_size(facts.available - keep)
    return Finding("memory", "ok", found, f"guarantees may allocate {room} beyond what their guests use already")


def _swap(where: Host) -> Iterator[Finding]:
    lines = (where.text("proc/swaps") or "").splitlines()[1:]
    devices = [printable(line.split()[0], 80) for line in lines if line.split()]
    if not devices:
        yield Finding(
            "swap", "ok", "none", "guest RAM cannot be swapped; a guarantee still keeps file-backed RAM, and room"
        )
    else:
        yield Finding("swap", "ok", ", ".join(devices), "guest RAM can be swapped, but what is guaranteed")
    zram = any("zram" in device for device in devices)
    zswap = where.text("sys/module/zswap/parameters/enabled") == "Y"
    kinds = [word for word, there in (("zram", zram), ("zswap", zswap)) if there]
    if devices and kinds:
        yield Finding(
            "compressed-swap", "note", " and ".join(kinds),
            "what is swapped still takes memory: the kernel frees less by it than the swap's size says",
            "leave more with --host-reserve than the default when most of the memory is guaranteed",
        )  # fmt: skip


def _thp(where: Host) -> Finding:
    mode = where.chosen("sys/kernel/mm/transparent_hugepage/enabled")
    if mode is None:
        return Finding("thp", "ok", "not there", "guest RAM is in small pages: locking takes longer, in steps as short")
    if mode == "never":
        return Finding(
            "thp", "note", mode, "guest RAM is in small pages: locking takes longer, in steps as short",
            "echo madvise > /sys/kernel/mm/transparent_hugepage/enabled, before the VM starts",
        )  # fmt: skip
    return Finding("thp", "ok", mode, "guest RAM is in huge pages where it can be, and is locked faster")


def _ksm(where: Host) -> Finding:
    run = where.text("sys/kernel/mm/ksm/run")
    if run != "1":
        return Finding("ksm", "ok", "off" if run else "not there", "no guest RAM is merged")
    return Finding(
        "ksm", "note", "on", "locked guest RAM is taken out of it: what was merged there needs memory of its own again",
        "reckon with that, or start VMs with -machine mem-merge=off",
    )  # fmt: skip


def _maps(where: Host) -> Finding:
    text = where.text("proc/sys/vm/max_map_count") or ""
    if text.isdecimal() and int(text) < _MAPS_USUAL:
        return Finding(
            "max-map-count", "note", text, "locked ranges are mappings; fewer of them fit, so guarantees may be short",
            f"sysctl vm.max_map_count={_MAPS_USUAL}",
        )  # fmt: skip
    return Finding("max-map-count", "ok", text or "unknown", "there is room for the mappings that locking makes")


def _vfio(where: Host, pid: int) -> Iterator[Finding]:
    if host.has_vfio(pid, where.proc):
        yield Finding(
            "vm-vfio", "note", "has devices of the host", "they pin guest RAM on the same limit: it is locked already"
        )
