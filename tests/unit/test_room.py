"""Whether a guarantee fits, from trees of files; what is not known refuses nothing."""
# SPDX-License-Identifier: GPL-2.0-or-later

from pathlib import Path
from typing import Any

import pytest

from ramlock import host, procfs, room
from ramlock.admission import FOLLOWED, Gate
from ramlock.errors import CommandError, TooMuch
from ramlock.guarantee import Wish, limit_needed
from ramlock.reply import parse
from ramlock.room import Ask
from ramlock.sizes import Size
from tests.unit.conftest import GIB, reply
from tests.unit.test_procfs import make

MIB = 1 << 20
PID, OTHER = 7, 8


class Host:
    """A host of 16 GiB, 8 GiB of them available, with one QEMU of which 1 GiB is in memory, in a cgroup."""

    def __init__(self, root: Path) -> None:
        self.root, self.proc = root, root / "proc"
        self.proc.mkdir()
        self.memory(16 * GIB, 8 * GIB)
        self.vm(PID, "web", 0)
        (self.proc / str(PID) / "maps").write_text("7f0000000000-7f0080000000 rw-p 00000000 00:00 0 \n")
        (self.proc / str(PID) / "cgroup").write_text("0::/vm\n")
        (self.proc / "self").mkdir()
        (self.proc / "self/mountinfo").write_text("40 31 0:37 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw\n")
        self.cgroup("max\n", 0)

    def memory(self, total: int, available: int, **more: int) -> None:
        sizes = {"MemTotal": total, "MemAvailable": available, "SwapFree": 0, "Hugetlb": 0, **more}
        (self.proc / "meminfo").write_text("".join(f"{name}: {size >> 10} kB\n" for name, size in sizes.items()))

    def vm(self, pid: int, name: str, locked: int) -> None:
        folder = make(self.proc, pid, "qemu-system-x86_64", "-name", name)
        status = (folder / "status").read_text()
        rss = f"RssAnon:\t{GIB >> 10} kB\nRssFile:\t0 kB\nRssShmem:\t0 kB\n"
        lines = [line for line in status.splitlines() if not line.startswith("VmLck")]
        (folder / "status").write_text("\n".join(lines) + f"\nVmLck:\t{locked >> 10} kB\n{rss}")

    def cgroup(self, limit: object, usage: int) -> None:
        folder = self.root / "sys/fs/cgroup/vm"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text("anon 0\n")

    def check(self, want: int, reserve: int | None = None, **more: int) -> TooMuch | None:
        return room.check(PID, Ask(want, reserve, **more), self.proc, self.root)


@pytest.fixture
def machine(tmp_path: Path) -> Host:
    return Host(tmp_path)


def test_what_is_in_memory_already_costs_nothing(machine: Host) -> None:
    machine.memory(16 * GIB, 0)
    assert machine.check(GIB) is None
    assert machine.check(GIB + MIB) is not None
    assert machine.check(3 * GIB, hugetlb=2 * GIB) is None
    assert machine.check(3 * GIB, file_backed=2 * GIB) is None


def test_the_host(machine: Host) -> None:
    assert machine.check(8 * GIB) is None  # 7 GiB to allocate, 8 GiB less 512 MiB to be had
    error = machine.check(9 * GIB)
    assert error is not None
    assert "7.5 GiB available beyond a reserve of 512 MiB" in error.message
    assert "8 GiB are asked beyond" in error.message
    assert not error.never
    assert machine.check(8 * GIB, 2 * GIB) is not None
    far = machine.check(17 * GIB)
    assert far is not None
    assert far.never


def test_the_cgroup(machine: Host) -> None:
    machine.cgroup(4 * GIB, 2 * GIB)
    error = machine.check(4 * GIB)
    assert error is not None
    assert "/vm with its limit of 4 GiB leaves 1.75 GiB beyond a reserve of 256 MiB" in error.message
    assert "memory.max of /vm" in error.hint
    assert "--force" in error.hint
    assert not error.never
    assert machine.check(2 * GIB) is None
    never = machine.check(5 * GIB)
    assert never is not None
    assert never.never


def test_others_keep_a_cushion(machine: Host) -> None:
    """A cgroup of 4 GiB, full, of which 1 GiB is this VM's; with swap and as much more in it."""
    machine.cgroup(4 * GIB, 4 * GIB)
    vm = machine.root / "sys/fs/cgroup/vm"
    (vm / "memory.stat").write_text(f"inactive_anon {2 * GIB}\nactive_anon {2 * GIB}\n")
    assert machine.check(GIB) is None  # nothing can be swapped out, locked or not
    machine.memory(16 * GIB, 8 * GIB, SwapTotal=16 * GIB, SwapFree=12 * GIB)
    (vm / "memory.swap.max").write_text("max\n")
    (vm / "memory.swap.current").write_text(f"{2 * GIB}\n")
    assert machine.check(GIB) is None  # 3 GiB are left for 5
    (vm / "memory.swap.current").write_text(f"{4 * GIB}\n")
    error = machine.check(GIB)
    assert error is not None
    assert "the memory cgroup /vm with its limit of 4 GiB, 3 GiB would be left unlocked" in error.message
    assert "for 7 GiB that are used besides" in error.message
    assert not error.never
    assert "--force" in error.hint
    assert machine.check(GIB, held=GIB) is None
    (vm / "memory.max").write_text("max\n")
    assert machine.check(GIB) is None
    # The same of the host.
    machine.memory(16 * GIB, GIB, **{"SwapTotal": 16 * GIB, "SwapFree": 0, "Active(anon)": 8 * GIB})
    assert machine.check(GIB) is not None
    machine.memory(16 * GIB, GIB, **{"SwapTotal": 16 * GIB, "SwapFree": 12 * GIB, "Active(anon)": 8 * GIB})
    assert machine.check(GIB) is None


def test_what_is_unknown_refuses_nothing(machine: Host) -> None:
    (machine.proc / str(PID) / "cgroup").write_text("0::/../elsewhere\n")
    assert machine.check(8 * GIB) is None
    (machine.proc / "meminfo").write_text("nonsense\n")
    assert machine.check(8 * GIB) is None
    assert room.check_sum(PID, Ask(80 * GIB, None), machine.proc) is None
    machine.memory(GIB, 0)
    # A memory file whose pages cannot be counted.
    (machine.proc / str(PID) / "maps").write_text(
        "7f0000000000-7f0080000000 rw-s 00000000 00:01 5 /memfd:ram (deleted)\n"
    )
    assert machine.check(8 * GIB) is None
    (machine.proc / str(PID) / "status").unlink()
    assert machine.check(8 * GIB) is None


def test_mappings_without_end_are_not_read(machine: Host) -> None:
    """A hostile process decides how many there are, and how long their names."""
    machine.memory(GIB, 0)
    assert machine.check(8 * GIB) is not None
    line = "7f0000000000-7f0080000000 r--p 00000000 00:01 5 /" + "a/" * 2000 + "\n"
    (machine.proc / str(PID) / "maps").write_text(line * 8500)
    assert machine.check(8 * GIB) is None


def test_shared_files_without_end_are_not_counted(machine: Host) -> None:
    machine.memory(GIB, 0)
    folder = machine.proc / str(PID) / "map_files"
    folder.mkdir()
    lines = []
    for i in range(1025):
        range_ = f"{0x7F0000000000 + (i << 21):x}-{0x7F0000100000 + (i << 21):x}"
        (folder / range_).touch()
        lines.append(f"{range_} rw-s 00000000 00:01 {i + 1} /memfd:ram (deleted)\n")
    (machine.proc / str(PID) / "maps").write_text("".join(lines[:1024]))
    assert machine.check(8 * GIB) is not None
    (machine.proc / str(PID) / "maps").write_text("".join(lines))
    assert machine.check(8 * GIB) is None


def test_pages_of_a_memory_file_count_once(machine: Host) -> None:
    machine.memory(16 * GIB, 0)
    line = "7f0000000000-7f0080000000 rw-s 00000000 00:01 5 /memfd:ram (deleted)\n"
    (machine.proc / str(PID) / "maps").write_text(line + line.replace("7f0", "7e0"))
    folder = machine.proc / str(PID) / "map_files"
    folder.mkdir()
    file = folder / "7f0000000000-7f0080000000"
    file.write_bytes(b"x" * (3 * MIB))
    (folder / "7e0000000000-7e0080000000").hardlink_to(file)
    assert machine.check(GIB + 3 * MIB) is None
    assert machine.check(GIB + 5 * MIB) is not None


def test_who_holds_what(machine: Host) -> None:
    machine.vm(OTHER, "db", 10 * GIB)
    assert room.check_sum(PID, Ask(5 * GIB, None), machine.proc) is None
    error = room.check_sum(PID, Ask(6 * GIB, None), machine.proc)
    assert error is not None
    assert "6 GiB for this VM and 10 GiB that other VMs have locked" in error.message
    rows = [row.split() for row in error.details]
    assert rows[1][:2] == [str(OTHER), "db"]
    assert rows[1][3:] == ["10", "GiB"]
    assert rows[2][:2] == [str(PID), "web"]
    assert room.check_sum(PID, Ask(6 * GIB, None, hugetlb=2 * GIB), machine.proc) is None
    assert room.check_sum(PID, Ask(5 * GIB, 2 * GIB), machine.proc) is not None
    for pid in range(100, 130):
        machine.vm(pid, "many", 0)
    error = room.check_sum(PID, Ask(6 * GIB, None), machine.proc)
    assert error is not None
    assert error.details[-1].split() == ["and", "12", "more"]


class FakeClient:
    """Takes down what it is asked to send."""

    def __init__(self, error: CommandError | None = None) -> None:
        self.sent: list[tuple[str, Any]] = []
        self.error = error

    def execute(self, command: str, arguments: object = None, *, deadline: object) -> None:
        self.sent.append((command, arguments))
        if self.error:
            raise self.error


def gate(machine: Host, size: int, **more: bool) -> tuple[Gate, list[str]]:
    said: list[str] = []
    return Gate(PID, Wish(Size("bytes", size)), proc=machine.proc, root=machine.root, warn=said.append, **more), said


def test_force_and_patience(machine: Host) -> None:
    now = parse(reply(ram=12 * GIB))
    machine.memory(16 * GIB, GIB)
    refusing, _ = gate(machine, 4 * GIB)
    with pytest.raises(TooMuch):
        refusing.check(now)
    patient, said = gate(machine, 4 * GIB, patient=True)
    patient.check(now)
    assert "waiting for room" in said[0]
    forced, said = gate(machine, 4 * GIB, force=True)
    forced.check(now)
    assert not said
    machine.memory(2 * GIB, GIB)
    patient, _ = gate(machine, 4 * GIB, patient=True)
    with pytest.raises(TooMuch):
        patient.check(now)
    for size, held in ((13 * GIB, 0), (4 * GIB, 4 * GIB)):  # above guest RAM, which the shim says; held already
        passing, _ = gate(machine, size)
        passing.check(parse(reply(ram=12 * GIB, locked=held, armed=held)))


@pytest.mark.parametrize("hidden", [False, True])
def test_a_shim_is_told_what_it_cannot_see(machine: Host, hidden: bool) -> None:
    for pid in ("self", str(PID)):
        (machine.proc / pid / "ns").mkdir()
    (machine.proc / "self/ns/cgroup").write_text("")
    theirs = machine.proc / str(PID) / "ns/cgroup"
    if hidden:
        theirs.write_text("")
    else:
        theirs.hardlink_to(machine.proc / "self/ns/cgroup")
    assert procfs.hides_cgroups(PID, machine.proc) is hidden
    machine.cgroup(4 * GIB, 2 * GIB)
    telling, _ = gate(machine, GIB)
    telling.check(parse(reply(cgroups_seen=not hidden)))
    client = FakeClient(CommandError("no such command"))
    telling.inform(client)  # type: ignore[arg-type]
    telling.inform(client)  # type: ignore[arg-type] # not again so soon
    expected = {"cgroup-left": 2 * GIB - 256 * MIB, "valid-s": FOLLOWED}
    assert client.sent == ([("set-headroom-limits", expected)] if hidden else [])


@pytest.mark.parametrize("link", ["/dev/vfio/12", "/dev/vfio/devices/vfio0", "anon_inode:[vfio-device]", "/dev/iommu"])
def test_devices_of_the_host(machine: Host, link: str) -> None:
    folder = machine.proc / str(PID) / "fd"
    folder.mkdir()
    (folder / "3").symlink_to("anon_inode:kvm-vm")
    assert not host.has_vfio(PID, machine.proc)
    (folder / "4").symlink_to(link)
    assert host.has_vfio(PID, machine.proc)


def test_slack_for_devices() -> None:
    ram = 256 * MIB
    now, wish = parse(reply(ram=ram)), Wish(Size("bytes", 64 * MIB))
    plain = limit_needed(now, wish, 0)
    assert plain == 64 * MIB + host.SLACK
    assert limit_needed(now, wish, 0, vfio=True) == plain + ram + host.VFIO_SLACK
    # What the devices have pinned already is part of it.
    pinned = parse(reply(ram=ram, foreign=ram))
    assert limit_needed(pinned, wish, ram, vfio=True) == plain + ram + host.VFIO_SLACK
    assert limit_needed(now, Wish(Size("all")), 0, vfio=True) is None
