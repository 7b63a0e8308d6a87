"""What memory cgroups leave, from trees of files as the kernel shows them; the same figures as in test_headroom.c."""
# SPDX-License-Identifier: GPL-2.0-or-later

from pathlib import Path

import pytest

from ramlock import cgroups
from ramlock.cgroups import Level
from ramlock.evictable import Evictable

MIB = 1 << 20
PID = 7
V1 = "35 31 0:32 {} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
V2 = "40 31 0:37 {} /sys/fs/cgroup rw,relatime - cgroup2 cgroup2 rw,nsdelegate\n"


class Tree:
    """A folder that stands for the root."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def put(self, name: str, text: object) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n" if isinstance(text, int) else str(text))

    def v2(self, folder: str, limit: object, usage: int) -> None:
        self.put(f"{folder}/memory.max", limit)
        self.put(f"{folder}/memory.current", usage)
        self.put(f"{folder}/memory.stat", "anon 1\n")

    def levels(self, swap_free: int = 0) -> list[Level] | None:
        return cgroups.levels(PID, swap_free, self.root / "proc", self.root)

    def left(self, swap_free: int = 0) -> int | None:
        known = self.levels(swap_free)
        level = cgroups.tightest(known or [])
        return None if level is None else level.left


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = Tree(tmp_path)
    made.put("proc/self/mountinfo", V2.format("/"))
    made.put(f"proc/{PID}/cgroup", "0::/machine/vm\n")
    (tmp_path / "sys/fs/cgroup/machine/vm").mkdir(parents=True)
    return made


def test_the_tightest_ancestor(tree: Tree) -> None:
    tree.v2("sys/fs/cgroup/machine", 3200 * MIB, 2048 * MIB)
    tree.put("sys/fs/cgroup/machine/memory.stat", f"inactive_file {100 * MIB}\n")
    tree.v2("sys/fs/cgroup/machine/vm", "max\n", 2048 * MIB)
    room = Evictable((3200 - 2048 + 100) * MIB, 0, swaps=False)
    assert tree.levels() == [Level("/machine", "memory.max", 3200 * MIB, (3200 - 2048 + 100 - 200) * MIB, room)]
    tree.put("sys/fs/cgroup/machine/vm/memory.high", 2400 * MIB)
    found = cgroups.tightest(tree.levels() or [])
    assert found is not None
    assert found[:4] == ("/machine/vm", "memory.high", 2400 * MIB, (2400 - 2048 - 150) * MIB)
    tree.v2("sys/fs/cgroup/machine", 3200 * MIB, 4096 * MIB)
    assert tree.left() == 0


def test_version_one(tree: Tree) -> None:
    tree.put("proc/self/mountinfo", V1.format("/"))
    tree.put(f"proc/{PID}/cgroup", "9:cpuset:/x\n4:memory:/vm\n0::/\n")
    top = "sys/fs/cgroup/memory"
    tree.put(f"{top}/memory.limit_in_bytes", 9223372036854771712)
    tree.put(f"{top}/vm/memory.limit_in_bytes", 1024 * MIB)
    tree.put(f"{top}/vm/memory.usage_in_bytes", 800 * MIB)
    tree.put(f"{top}/vm/memory.stat", f"inactive_file 7\ntotal_inactive_file {50 * MIB}\n")
    room = Evictable((1024 - 800 + 50) * MIB, 0, swaps=False)
    assert tree.levels() == [Level("/vm", "memory.limit_in_bytes", 1024 * MIB, (1024 - 800 + 50 - 64) * MIB, room)]
    tree.put(f"{top}/vm/memory.stat", f"total_inactive_anon {300 * MIB}\ntotal_active_anon {100 * MIB}\n")
    assert tree.left(1 << 40) == (1024 - 800 - 64) * MIB
    tree.put(f"{top}/vm/memory.memsw.limit_in_bytes", 1000 * MIB)
    tree.put(f"{top}/vm/memory.memsw.usage_in_bytes", 700 * MIB)
    assert tree.left(1 << 40) == (1024 - 800 - 64 + 150) * MIB
    assert tree.left(10 * MIB) == (1024 - 800 - 64 + 5) * MIB


def test_who_swaps_keeps_a_cushion(tree: Tree) -> None:
    """The same figures as the shim's test has."""
    tree.put("proc/self/mountinfo", V1.format("/"))
    tree.put(f"proc/{PID}/cgroup", "4:memory:/vm\n")
    vm = "sys/fs/cgroup/memory/vm"
    tree.put("sys/fs/cgroup/memory/memory.limit_in_bytes", 9223372036854771712)
    tree.put(f"{vm}/memory.limit_in_bytes", 400 * MIB)
    tree.put(f"{vm}/memory.usage_in_bytes", 400 * MIB)
    tree.put(f"{vm}/memory.stat", f"total_inactive_anon {200 * MIB}\ntotal_active_anon {140 * MIB}\n")

    def level() -> Level:
        (found,) = tree.levels(4 << 30) or []
        return found

    # Who does not tell may swap, but is not relied on to.
    assert level().evictable == Evictable(340 * MIB, 340 * MIB, swaps=True)
    assert level().left == 0
    tree.put(f"{vm}/memory.memsw.limit_in_bytes", 9223372036854771712)
    tree.put(f"{vm}/memory.memsw.usage_in_bytes", 560 * MIB)
    assert level().evictable == Evictable(340 * MIB, 500 * MIB, swaps=True)
    assert level().allowed == 90 * MIB
    tree.put(f"{vm}/memory.memsw.usage_in_bytes", 800 * MIB)
    assert level().allowed == 0
    # What is locked of it is not wanted any more.
    assert level().evictable.beyond_cushion() == 0
    assert level().evictable.beyond_cushion(300 * MIB) == (340 - (740 - 300) / 2) * MIB


def test_what_cannot_be_known(tree: Tree) -> None:
    for lines in ("5:memory:/vm\n", "0::/../vm\n", "0::/elsewhere\n"):
        tree.put(f"proc/{PID}/cgroup", lines)
        assert tree.levels() is None, lines
    tree.put(f"proc/{PID}/cgroup", "0::/machine/vm\n")
    tree.put("sys/fs/cgroup/machine/memory.max", "a lot\n")
    assert tree.levels() is None
    tree.put("proc/self/mountinfo", "nonsense\n")
    assert tree.levels() is None
    assert cgroups.levels(8, 0, tree.root / "proc", tree.root) is None  # no such process


def test_no_limit_at_all(tree: Tree) -> None:
    assert tree.levels() == []
    (tree.root / f"proc/{PID}/cgroup").unlink()
    assert tree.levels() == []  # a kernel without cgroups


def test_our_own_part_of_the_tree(tree: Tree) -> None:
    tree.put("proc/self/mountinfo", V2.format("/docker/abc"))
    tree.put(f"proc/{PID}/cgroup", "0::/docker/abc/vm\n")
    tree.v2("sys/fs/cgroup/vm", 1024 * MIB, 0)
    assert tree.left() == 960 * MIB
    tree.put(f"proc/{PID}/cgroup", "0::/docker/abcdef/vm\n")
    assert tree.levels() is None
