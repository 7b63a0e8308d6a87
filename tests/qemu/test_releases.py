"""QEMUs of other releases than this host's, with their glibcs, each in a root of its own."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from ramlock import locate, procfs
from ramlock.guestram import Found
from tests.conftest import absent
from tests.qemu import truth
from tests.qemu.conftest import assert_holds, ramlock
from tests.qemu.guest import MIB, ROOT, SHIM, Guest
from tests.qemu.monitor import MonitorError
from tests.qemu.test_layout import unplug
from tests.qemu.test_locate import hosts

pytestmark = pytest.mark.usefixtures("lockable", "root")

QEMU = "/usr/bin/qemu-system-x86_64"
SIZE = 24 * MIB
# On both sides of where the interfaces of QEMU and glibc changed.
SUITES = os.environ.get("RAMLOCK_TEST_RELEASES", "bullseye trixie").split()


@pytest.fixture(params=SUITES)
def release(request: pytest.FixtureRequest) -> Path:
    """The root of that release."""
    root = ROOT / ".cache/release" / str(request.param)
    if not root.is_dir():
        absent(f"{root} is not there: tests/guest/release {request.param} makes it, from Debian's packages")
    return root


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """The shim, where those roots have it too."""
    return Path(shutil.copy(SHIM, tmp_path / "ramlock.so"))


def enter(root: Path, *, proc: bool, preload: str = "") -> list[str]:
    """A command that runs another in that root, in a mount namespace of its own; /tmp is ours, /run is empty."""
    mounts = f"mount --bind /tmp '{root}/tmp' && mount -t tmpfs none '{root}/run' && "
    if proc:
        mounts += f"mount -t proc none '{root}/proc' && mount --rbind /sys '{root}/sys' && "
    return ["unshare", "-m", "sh", "-c", f"{mounts}{preload} exec chroot '{root}' \"$@\"", "sh"]


def foreign(root: Path, *, proc: bool, preload: str = "", args: Sequence[str] = (), **more: Any) -> Guest:
    """A QEMU of that release."""
    prepare = enter(root, proc=proc, preload=preload)
    more = {"memory": 256 * MIB, **more}
    return Guest(how="plain", qemu=QEMU, args=args, prepare=prepare, timeout=120, **more)


def check_round(guest: Guest, env: dict[str, str] | None = None) -> None:
    """Preflight, inject, change, eject, inject again: each does what it says, and the VM is unharmed."""
    report = ramlock("preflight", "--pid", guest.pid, "--json", env=env)
    assert report.returncode == 0, report.stdout + report.stderr
    assert json.loads(report.stdout)["ok"] is True
    result = ramlock("inject", "--pid", guest.pid, "--guarantee", SIZE, "--json", env=env)
    assert result.returncode == 0, result.stderr
    answer = json.loads(result.stdout)
    assert (answer["already"], answer["source"]) == (False, "qemu")
    check_holds(guest, answer["socket"], SIZE)
    assert ramlock("set", 2 * SIZE, "--pid", guest.pid).returncode == 0
    check_holds(guest, answer["socket"], 2 * SIZE)
    assert ramlock("set", 0, "--pid", guest.pid).returncode == 0
    assert truth.vm_lck(guest.pid) == 0
    guest.check_unharmed()
    result = ramlock("eject", "--pid", guest.pid)
    assert result.returncode == 0, result.stderr
    guest.check_unharmed()
    result = ramlock("inject", "--pid", guest.pid, "--guarantee", "all", "--json", env=env)
    assert result.returncode == 0, result.stderr
    assert truth.vm_lck(guest.pid) == guest.memory
    guest.check_unharmed()


def check_holds(guest: Guest, socket: str, size: int) -> None:
    guest._socket = socket
    assert_holds(guest, size)


def settled(guest: Guest) -> dict[str, Any]:
    """What the shim says once it knows of the memory that came."""
    deadline = time.monotonic() + 60
    while (reply := guest.settle())["ram"] == guest.memory and time.monotonic() < deadline:
        time.sleep(0.02)
    return reply


def test_memory_file(release: Path) -> None:
    """The shim's file is not there, so that it comes as a memory file."""
    with foreign(release, proc=True) as guest:
        check_round(guest)


def test_without_proc(release: Path, file: Path) -> None:
    """/proc is not there, so that the shim can come by its file only."""
    with foreign(release, proc=False) as guest:
        result = ramlock("inject", "--pid", guest.pid)
        assert result.returncode == 4
        assert "/proc is not mounted" in result.stderr
        env = {"RAMLOCK_SHIM": str(file)}
        assert ramlock("preflight", "--pid", guest.pid, env=env).returncode == 0
        result = ramlock("inject", "--pid", guest.pid, "--json", env=env)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["source"] == "qemu"
        # What the limits are cannot be seen in there, so nothing is locked.
        assert ramlock("set", SIZE, "--pid", guest.pid).returncode in (4, 5)
        assert truth.vm_lck(guest.pid) <= SIZE
        guest.check_unharmed()
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        guest.check_unharmed()


def test_memory_that_comes_and_goes(release: Path) -> None:
    """The form in which QEMU tells of RAM blocks has changed over time."""
    args = ["-m", "256M,slots=2,maxmem=1G"]
    with foreign(release, proc=True, args=args) as guest:
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "all", "--json")
        assert result.returncode == 0, result.stderr
        guest._socket = json.loads(result.stdout)["socket"]
        more: dict[str, Any] = {"qom-type": "memory-backend-ram", "id": "more"}
        more.update({"props": {"size": 64 * MIB}} if release.name == "bullseye" else {"size": 64 * MIB})
        for _ in range(3):
            guest.monitor.execute("object-add", more)
            guest.monitor.execute("object-del", {"id": "more"})
        guest.monitor.execute("object-add", more)
        guest.monitor.execute("device_add", {"driver": "pc-dimm", "id": "dimm", "memdev": "more"})
        assert settled(guest)["ram"] == 320 * MIB
        assert truth.vm_lck(guest.pid) == 320 * MIB
        with guest.shim() as shim:
            assert sorted(block["id"] for block in shim.execute("query-ram-blocks")) == ["more", "pc.ram"]
        guest.check_unharmed()


def test_in_qemus_own_monitor(release: Path) -> None:
    """The functions that this takes have changed over time."""
    with foreign(release, proc=True) as guest:
        for _ in range(2):
            result = ramlock("inject", "--pid", guest.pid, "--monitor", "--json")
            assert result.returncode == 0, result.stderr
            guest._socket = json.loads(result.stdout)["socket"]
            assert guest.monitor.execute("set_ram_minguarantee", {"size": SIZE}) == {}
            guest.settle()
            assert guest.monitor.execute("query-ram-minguarantee") == guest.query()
            assert_holds(guest, SIZE)
            errors = []
            for command, argument in (("set_ram_minguarantee", "size"), ("balloon", "value")):
                for arguments in ({}, {argument: "x"}, {argument: 1, "more": {"a": [None, 1.5]}}):
                    with pytest.raises(MonitorError) as error:
                        guest.monitor.execute(command, arguments)
                    errors.append((error.value.kind, error.value.desc.replace(f"'{argument}'", "it")))
            assert errors[:3] == errors[3:]
            assert ramlock("eject", "--pid", guest.pid).returncode == 0
            with pytest.raises(MonitorError):
                guest.monitor.execute("query-ram-minguarantee")
            names = {entry["name"] for entry in guest.monitor.execute("query-commands")}
            assert "set_ram_minguarantee" not in names
        guest.check_unharmed()


LAYOUT = """
    -m 64M,slots=4,maxmem=2G -device VGA
    -object memory-backend-memfd,id=n0,size=32M -numa node,memdev=n0
    -object memory-backend-file,id=n1,size=32M,mem-path={directory} -numa node,memdev=n1
    -object memory-backend-ram,id=d0,size=64M -device pc-dimm,id=dimm0,memdev=d0
    -object memory-backend-ram,id=v0,size=128M -device virtio-mem-pci,id=vm0,memdev=v0
    -object memory-backend-ram,id=x0,size=32M -device nvdimm,id=nv0,memdev=x0
    -object memory-backend-ram,id=s0,size=16M,share=on -device ivshmem-plain,memdev=s0
    -object memory-backend-ram,id=spare,size=64M
"""


def add(guest: Guest, backend: str, size: int, driver: str, *, old: bool) -> None:
    """Plugs in a device that uses a new backend."""
    props = {"props": {"size": size}} if old else {"size": size}
    guest.monitor.execute("object-add", {"qom-type": "memory-backend-ram", "id": backend, **props})
    guest.monitor.execute("device_add", {"driver": driver, "id": f"dev-{backend}", "memdev": backend})


def where(guest: Guest) -> dict[str, int]:
    """Where QEMU says that its RAM blocks are; from 10.0 it lists that, before only of what the guest has mapped."""
    lines = guest.monitor.human("info ramblock").splitlines()
    if "HVA" not in lines[0]:
        return hosts(guest)
    named = [words for words in map(str.split, lines[1:]) if not words[0].isdecimal()]
    return {words[0].rsplit("/", 1)[-1]: int(words[-2], 16) for words in named}


def check_found(guest: Guest, found: Found, names: str, part: str, perhaps: str = "") -> None:
    """What was found certainly, from outside, is just these blocks; `part`, and `perhaps`, are those of virtio-mem."""
    assert found.certain, found
    places, sizes = where(guest), {name.rsplit("/", 1)[-1]: size for name, size in guest.blocks().items()}
    blocks = {block.id.rsplit("/", 1)[-1]: block for block in found.blocks}
    partly = {name for name, block in blocks.items() if block.virtio_mem}
    assert set(part.split()) <= partly <= {*part.split(), *perhaps.split()}
    assert set(blocks) == {*names.split(), *partly}
    for name, block in blocks.items():
        assert block.size == sizes[name]
        # What is not plugged is mapped nowhere in the guest.
        assert block.host == places.get(name, block.host if block.virtio_mem else 0)


def test_where_guest_ram_is(release: Path) -> None:
    """NUMA nodes, DIMMs, virtio-mem, and what is none: from outside, by the shim, and when more is plugged in."""
    old = release.name == "bullseye"
    with foreign(release, proc=True, machine="pc,nvdimm=on", memory=0, args=LAYOUT.split()) as guest:
        process = procfs.read(guest.pid)
        # What nothing has plugged of virtio-mem is no guest RAM; before 6.1 it is not known, and left alone.
        check_found(guest, locate.outside(process), "n0 n1 d0", "v0")
        assert not locate.outside(process, "maps").certain
        add(guest, "d1", 32 * MIB, "pc-dimm", old=old)
        add(guest, "x1", 32 * MIB, "nvdimm", old=old)
        add(guest, "v1", 128 * MIB, "virtio-mem-pci", old=old)
        found = locate.outside(process)
        # Before 6.1 a device that was plugged in later is found by luck only.
        plugged = ("v0", "v1") if old else ("v0 v1", "")
        check_found(guest, found, "n0 n1 d0 d1", *plugged)
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "all", timeout=60)
        assert result.returncode == 0, result.stderr
        ram = [block for block in found.blocks if not block.virtio_mem]
        ranges = truth.join([truth.Range(block.host, block.end) for block in ram])
        assert truth.locked(guest.pid).ranges == ranges
        unplug(guest, "dev-d1", 2)
        check_found(guest, locate.outside(process), "n0 n1 d0", *plugged)
        guest.check_unharmed()


def test_preloaded(release: Path, file: Path) -> None:
    """chroot itself runs on this host's glibc, with the shim too, which does nothing there."""
    preload = f"LD_PRELOAD={file} RAMLOCK_GUARANTEE={SIZE}"
    with foreign(release, proc=True, preload=preload) as guest:
        guest._socket = f"/proc/{guest.pid}/root/run/ramlock/{guest.pid}.sock"
        assert "ramlock" not in guest.said()
        guest.settle()
        assert_holds(guest, SIZE)
        result = ramlock("set", 2 * SIZE, "--pid", guest.pid)
        assert result.returncode == 0, result.stderr
        assert_holds(guest, 2 * SIZE)
        guest.check_unharmed()


ALONE = """
extern long write(int, const void *, unsigned long);
extern void _exit(int);
void _start(void)
{
	_exit(write(1, "here\\n", 5) != 5);
}
"""


def test_harmless_without_libraries(release: Path, file: Path, tmp_path: Path) -> None:
    """In a program without the libraries that older glibcs keep threads in."""
    source = tmp_path / "alone.c"
    source.write_text(ALONE)
    command = ["gcc", "-nostartfiles", "-o", str(tmp_path / "alone"), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    command = [*enter(release, proc=True, preload=f"LD_PRELOAD={file}"), str(tmp_path / "alone")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (0, "here\n", "")
