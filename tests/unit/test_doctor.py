"""What `ramlock doctor` says of a host, from trees of files as other hosts have them, and of this one."""
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ramlock import doctor, kernel, shim
from ramlock.doctor import Finding

ALL = kernel.Features(*[True] * len(kernel.Features._fields))
NONE = kernel.Features(*[False] * len(kernel.Features._fields))
FULL, NOTHING = "0000003fffffffff", "0000000000000000"


class Tree:
    """A host, of which a test changes what it wants."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.features = ALL
        self.glibc = "glibc 2.36"
        self.environ = {"PATH": "/usr/bin", "RAMLOCK_SHIM": str(shim.find({}))}
        self.limit("8388608")
        self.capabilities(FULL)
        self.put("proc/sys/kernel/osrelease", "6.1.0-21-amd64\n")
        self.put("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 8388608 kB\nSwapFree: 0 kB\n")
        self.put("proc/swaps", "Filename Type Size Used Priority\n")
        self.put("proc/self/mountinfo", "40 31 0:37 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        self.put(f"proc/{os.getpid()}/cgroup", "0::/user\n")
        self.put("sys/fs/cgroup/user/memory.max", "max\n")
        self.put("sys/kernel/mm/transparent_hugepage/enabled", "always [madvise] never\n")
        self.put("sys/kernel/mm/ksm/run", "0\n")
        self.put("proc/sys/vm/max_map_count", "65530\n")

    def put(self, name: str, text: str) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def limit(self, hard: str) -> None:
        self.put("proc/self/limits", f"Max locked memory         {hard}              {hard}              bytes\n")

    def capabilities(self, mask: str) -> None:
        self.put("proc/self/status", f"CapEff:\t{mask}\n")

    def examine(self) -> list[Finding]:
        return doctor.examine(doctor.Host(self.environ, self.root, self.features, self.glibc))

    def find(self, name: str) -> Finding:
        return next(finding for finding in self.examine() if finding.name == name)

    def bad(self) -> set[str]:
        return {finding.name for finding in self.examine() if finding.level == "bad"}


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def test_a_host_on_which_all_is_well(tree: Tree) -> None:
    found = tree.examine()
    assert tree.bad() == set()
    assert {finding.name for finding in found} >= {
        *("kernel", "populate", "pagemap-scan", "glibc", "shim", "qemu", "rights", "yama", "lsm", "memlock"),
        *("cgroup", "memory", "swap", "thp", "ksm"),
    }
    for finding in found:
        assert finding.found
        assert finding.means
        assert finding.todo or finding.level == "ok", finding


def test_an_old_kernel(tree: Tree) -> None:
    tree.features = NONE
    assert tree.bad() == {"mlock2", "controller"}
    assert tree.find("populate").level == tree.find("pagemap-scan").level == "note"
    tree.features = ALL._replace(openat2=False)
    assert "openat2" in tree.find("controller").found
    assert "pidfd" not in tree.find("controller").found


@pytest.mark.parametrize(("said", "level"), [("glibc 2.28", "ok"), ("glibc 2.27", "bad"), ("musl", "bad")])
def test_glibc(tree: Tree, said: str, level: str) -> None:
    tree.glibc = said
    assert tree.find("glibc").level == level


@pytest.mark.parametrize(
    ("scope", "capabilities", "level"),
    [("0", NOTHING, "ok"), ("1", NOTHING, "bad"), ("1", FULL, "ok"), ("2", FULL, "ok"), ("3", FULL, "bad")],
)
def test_yama(tree: Tree, scope: str, capabilities: str, level: str) -> None:
    tree.put("proc/sys/kernel/yama/ptrace_scope", scope + "\n")
    tree.capabilities(capabilities)
    assert tree.find("yama").level == level


def test_security_modules(tree: Tree) -> None:
    tree.put("sys/kernel/security/lsm", "lockdown,capability,yama,apparmor")
    assert tree.find("lsm").found == "apparmor"
    tree.put("sys/kernel/security/lsm", "lockdown,capability,selinux,bpf")
    tree.put("sys/fs/selinux/enforce", "1")
    assert tree.find("lsm").level == "note"
    tree.put("sys/fs/selinux/enforce", "0")
    assert tree.find("lsm").level == "ok"


@pytest.mark.parametrize(("hard", "level"), [("8388608", "bad"), ("4294967296", "ok"), ("unlimited", "ok")])
def test_a_user_and_the_memlock_limit(tree: Tree, hard: str, level: str) -> None:
    tree.capabilities(NOTHING)
    tree.limit(hard)
    assert tree.find("memlock").level == level
    assert tree.find("rights").level == "note"


def test_a_cgroup_that_is_full(tree: Tree) -> None:
    tree.put("sys/fs/cgroup/user/memory.max", f"{1 << 30}\n")
    tree.put("sys/fs/cgroup/user/memory.current", f"{1 << 30}\n")
    tree.put("sys/fs/cgroup/user/memory.stat", "anon 1\n")
    found = tree.find("cgroup")
    assert found.level == "note"
    assert "memory.max 1 GiB" in found.found
    assert "raise memory.max" in found.todo
    tree.put("proc/self/mountinfo", "")
    assert "cannot be read" in tree.find("cgroup").found


def test_memory_that_is_used_up(tree: Tree) -> None:
    tree.put("proc/meminfo", "MemTotal: 16777216 kB\nMemAvailable: 100000 kB\n")
    assert tree.find("memory").level == "note"
    (tree.root / "proc/meminfo").unlink()
    assert tree.find("memory").level == "bad"


def test_swap_in_memory(tree: Tree) -> None:
    tree.put("proc/swaps", "Filename Type Size Used Priority\n/dev/zram0 partition 1 0 -2\n")
    tree.put("sys/module/zswap/parameters/enabled", "Y\n")
    assert tree.find("swap").found == "/dev/zram0"
    assert tree.find("compressed-swap").found == "zram and zswap"


def test_pages(tree: Tree) -> None:
    tree.put("sys/kernel/mm/transparent_hugepage/enabled", "always madvise [never]\n")
    tree.put("sys/kernel/mm/ksm/run", "1\n")
    tree.put("proc/sys/vm/max_map_count", "1024\n")
    assert [tree.find(name).level for name in ("thp", "ksm", "max-map-count")] == ["note"] * 3


def test_a_shim_that_is_not_there_or_closed(tree: Tree) -> None:
    tree.environ["RAMLOCK_SHIM"] = str(tree.root / "nothing.so")
    assert tree.find("shim").level == "bad"
    folder = tree.root / "closed"
    folder.mkdir(mode=0o700)
    copy = folder / "ramlock.so"
    copy.write_bytes(shim.find({}).read_bytes())
    tree.environ["RAMLOCK_SHIM"] = str(copy)
    found = tree.find("shim")
    assert found.level == "note"
    assert "chmod o+rx" in found.todo


def test_qemus(tree: Tree) -> None:
    assert tree.find("qemu").found == "none found in PATH"
    program = tree.root / "usr/bin/qemu-system-x86_64"
    program.parent.mkdir(parents=True)
    program.symlink_to("/bin/true")  # whatever it is, it exports nothing of QEMU's
    assert "symbols not exported" in tree.find("qemu").found
    program.unlink()
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert tree.find("qemu").level == "note"


def test_nothing_to_be_seen(tmp_path: Path) -> None:
    """Where /proc and /sys have none of it, what matters is bad, and nothing breaks."""
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("")
    (tmp_path / "proc/self/limits").write_text("")
    found = doctor.examine(doctor.Host({}, tmp_path, NONE, "glibc 2.36"))
    assert {"memory", "mlock2"} <= {finding.name for finding in found if finding.level == "bad"}


def test_the_command_here() -> None:
    """On this host; where a VM could be locked at all, the rest of the tests needs what it says is fine."""
    said = subprocess.run(
        [sys.executable, "-m", "ramlock", "doctor", "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    report = json.loads(said.stdout)
    assert report["ok"] is (said.returncode == 0)
    levels = {finding["name"]: finding["level"] for finding in report["findings"]}
    assert levels["shim"] != "bad"
    assert levels["glibc"] == "ok"
    shown = subprocess.run(
        [sys.executable, "-m", "ramlock", "doctor"], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == said.returncode
    for name in levels:
        assert f" {name} " in shown.stdout
