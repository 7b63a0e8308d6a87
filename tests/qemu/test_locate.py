"""Guest RAM is found exactly, in every layout, with and without QEMU's symbols; QEMU's own word is the truth."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from ramlock import locate, procfs
from ramlock.errors import NotLocated
from ramlock.guestram import Found
from tests.conftest import Need, absent
from tests.qemu import truth
from tests.qemu.conftest import Setting, assert_holds, assert_refused, ramlock
from tests.qemu.guest import GIB, MIB, Guest
from tests.qemu.nosymbols import debug_file, regions, renamed
from tests.qemu.test_layout import ABOVE, host_of, unplug

pytestmark = pytest.mark.usefixtures("lockable")
MICROVM = "/usr/bin/qemu-system-x86_64-microvm"
HUGE = 2 * MIB


class Layout(NamedTuple):
    """A command line and the guest RAM that it makes: name, size in MiB, backing."""

    machine: str
    args: str
    blocks: Sequence[tuple[str, int, str]]
    certain: bool = True
    """Whether mappings alone make it certain."""


def nodes(count: int) -> Layout:
    args = f"-m {64 * count}M " + " ".join(
        f"-object memory-backend-ram,id=n{i},size=64M -numa node,memdev=n{i}" for i in range(count)
    )
    return Layout("pc", args, [(f"n{i}", 64, "anonymous") for i in range(count)])


BACKEND = "-m 64M -object memory-backend-{0},id=m0,size=64M{1}"
LAYOUTS = {
    "plain": Layout("pc", "-m 128M -device VGA", [("pc.ram", 128, "anonymous")]),
    "default": Layout("pc", "", [("pc.ram", 128, "anonymous")]),
    "as-large-as-video": Layout("pc", "-m 16M -device VGA", [("pc.ram", 16, "anonymous")], certain=False),
    "microvm": Layout("microvm", "-m 96M", [("microvm.ram", 96, "anonymous")]),
    "pci-hole": Layout("q35", "-m 5G", [("pc.ram", 5120, "anonymous")]),
    **{f"{count}-nodes": nodes(count) for count in (1, 2, 4)},
    "ram": Layout("pc,memory-backend=m0", BACKEND.format("ram", ""), [("m0", 64, "anonymous")]),
    "ram-shared": Layout("pc,memory-backend=m0", BACKEND.format("ram", ",share=on"), [("m0", 64, "anonymous")]),
    "memfd": Layout("pc,memory-backend=m0", BACKEND.format("memfd", ""), [("m0", 64, "memfd")]),
    "memfd-private": Layout("pc,memory-backend=m0", BACKEND.format("memfd", ",share=off"), [("m0", 64, "memfd")]),
    "file-shared": Layout(
        "pc,memory-backend=m0",
        BACKEND.format("file", ",share=on,mem-path={directory}/m0"),
        [("m0", 64, "file")],
    ),
    "file-private": Layout(
        "pc,memory-backend=m0", BACKEND.format("file", ",mem-path={directory}/m0"), [("m0", 64, "file")]
    ),
    "tmpfs": Layout(
        "pc,memory-backend=m0", BACKEND.format("file", ",share=on,mem-path=/dev/shm"), [("m0", 64, "shmem")]
    ),
    "mem-path": Layout("pc", "-m 64M -mem-path {directory}", [("pc.ram", 64, "file")]),
    "json": Layout(
        "q35,memory-backend=m0",
        '-m 64M -object {"qom-type":"memory-backend-memfd","id":"m0","size":67108864}',
        [("m0", 64, "memfd")],
    ),
    "dimm": Layout(
        "pc",
        "-m 64M,slots=2,maxmem=1G -object memory-backend-ram,id=d0,size=128M -device pc-dimm,memdev=d0"
        " -object memory-backend-ram,id=spare,size=32M",
        [("pc.ram", 64, "anonymous"), ("d0", 128, "anonymous")],
        certain=False,
    ),
    "virtio-mem": Layout(
        "q35",
        "-m 64M,maxmem=1G -object memory-backend-ram,id=vm,size=128M"
        " -device virtio-mem-pci,memdev=vm,requested-size=64M",
        [("pc.ram", 64, "anonymous"), ("vm", 128, "anonymous")],
        certain=False,
    ),
}


def start(layout: Layout, **more: Any) -> Guest:
    return Guest(how="plain", memory=0, machine=layout.machine, args=layout.args.split(), **more)


def hosts(guest: Guest) -> dict[str, int]:
    """Where each region of RAM is, as QEMU says."""
    result = {}
    for name, (address, offset) in regions(guest.monitor.human("info mtree -f")).items():
        answer = guest.monitor.human(f"gpa2hva {address:#x}")
        if " is " in answer:
            result[name] = int(answer.rsplit(" ", 1)[1], 16) - offset
    return result


def outside(guest: Guest, source: str, debug: Path = locate.DEBUG) -> Found:
    return locate.outside(procfs.read(guest.pid), source, debug=debug)


def check(
    guest: Guest,
    found: Found,
    blocks: Sequence[tuple[str, int, str]],
    page_size: int = 4096,
    where: dict[str, int] | None = None,
) -> None:
    """What was found is what QEMU says: names and sizes of `info ramblock`, addresses of the memory that is mapped."""
    where, sizes = where or hosts(guest), guest.blocks()
    if found.source == "maps":  # which of equal blocks is which cannot be told
        assert sorted((b.host, b.size, b.backing) for b in found.blocks) == sorted(
            (where[name], size * MIB, backing) for name, size, backing in blocks
        )
    else:
        names = {b.id.rsplit("/")[-1]: b for b in found.blocks}
        assert {n: (b.host, b.size, b.backing) for n, b in names.items()} == {
            name: (where[name], size * MIB, backing) for name, size, backing in blocks
        }
        assert all(sizes[block.id] == block.size for block in found.blocks)
        assert {block.id for block in (*found.blocks, *found.others) if block.id} == {
            name
            for name in sizes
            if not name.isdecimal()  # a backend that is not plugged in has no name there
        }
    assert {block.page_size for block in found.blocks} == {page_size}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout(name: str) -> None:
    layout = LAYOUTS[name]
    with start(layout) as guest:
        found = outside(guest, "symbols")
        assert found.certain, found
        check(guest, found, layout.blocks)
        assert [b.id for b in found.blocks if b.virtio_mem] == (["vm"] if name == "virtio-mem" else []) or found.blocks
        mapped = outside(guest, "maps") if name != "as-large-as-video" else None
        if mapped is None:
            with pytest.raises(NotLocated, match="2 mappings look like it"):
                outside(guest, "maps")
        else:
            assert mapped.certain == layout.certain, mapped
            check(guest, mapped, layout.blocks)
        assert outside(guest, "auto") == found


@pytest.mark.usefixtures("root")
def test_huge_pages(setting: Setting) -> None:
    pool = "/proc/sys/vm/nr_hugepages"
    setting(pool, "72")
    if int(Path(pool).read_text()) < 72:
        absent("this host has no huge pages left")
    args = BACKEND.format("memfd", ",hugetlb=on,hugetlbsize=2M")
    with start(Layout("pc,memory-backend=m0", args, [])) as guest:
        for source in ("symbols", "maps"):
            found = outside(guest, source)
            assert found.certain, found
            check(guest, found, [("m0", 64, "hugetlb")], HUGE)
    if not Path("/dev/hugepages").is_mount():
        return
    args = BACKEND.format("file", ",share=on,mem-path=/dev/hugepages")
    with start(Layout("pc,memory-backend=m0", args, [])) as guest:
        for source in ("symbols", "maps"):
            check(guest, outside(guest, source), [("m0", 64, "hugetlb")], HUGE)


def test_dimms_come_and_go() -> None:
    """What is plugged in is guest RAM; a backend that is not is none. By mappings alone that is only a guess."""
    ram = ("pc.ram", 64, "anonymous")
    with start(Layout("pc", "-m 64M,slots=4,maxmem=1G", [])) as guest:
        assert outside(guest, "maps").certain
        # Not by `info mtree`, which keeps QEMU 7.2 from ever unmapping what it has listed.
        here = {"pc.ram": host_of(guest, 0)}
        for backend, backing in (("memory-backend-ram", "anonymous"), ("memory-backend-memfd", "memfd")):
            guest.monitor.execute("object-add", {"qom-type": backend, "id": "m", "size": 128 * MIB})
            check(guest, outside(guest, "symbols"), [ram], where=here)
            assert not outside(guest, "maps").certain
            guest.monitor.execute("device_add", {"driver": "pc-dimm", "id": "d", "memdev": "m"})
            found = outside(guest, "auto")
            assert found.certain
            check(guest, found, [ram, ("m", 128, backing)], where={**here, "m": host_of(guest, ABOVE)})
            assert not outside(guest, "maps").certain
            unplug(guest, "d")
            check(guest, outside(guest, "symbols"), [ram], where=here)
            guest.monitor.execute("object-del", {"id": "m"})
            found = outside(guest, "auto")
            check(guest, found, [ram], where=here)
            deadline = time.monotonic() + 30
            while not outside(guest, "maps").certain:  # QEMU unmaps it a little later
                assert time.monotonic() < deadline
                time.sleep(0.02)


def test_what_other_devices_use_is_no_guest_ram() -> None:
    """An NVDIMM, memory shared between VMs: from the start and plugged in later, with the shim of one mind."""
    args = (
        "-m 64M,slots=4,maxmem=1G -object memory-backend-ram,id=n0,size=32M -device nvdimm,memdev=n0,id=d0"
        " -object memory-backend-ram,id=s0,size=32M,share=on -device ivshmem-plain,memdev=s0"
    )
    ram = ("pc.ram", 64, "anonymous")
    with start(Layout("pc,nvdimm=on", args, [])) as guest:
        here = {"pc.ram": host_of(guest, 0)}
        assert outside(guest, "maps").certain
        check(guest, outside(guest, "auto"), [ram], where=here)
        for name, device in (("n1", {"driver": "nvdimm"}), ("s1", {"driver": "ivshmem-plain"})):
            backend = {"qom-type": "memory-backend-ram", "id": name, "size": 32 * MIB, "share": True}
            guest.monitor.execute("object-add", backend)
            guest.monitor.execute("device_add", {**device, "id": f"d{name}", "memdev": name})
        found = outside(guest, "auto")
        assert found.certain
        check(guest, found, [ram], where=here)
        assert ramlock("inject", "--pid", guest.pid, "--guarantee", "all", timeout=60).returncode == 0
        assert truth.locked(guest.pid).ranges == (truth.Range(here["pc.ram"], here["pc.ram"] + 64 * MIB),)


def test_a_large_guest_among_many_mappings(need: Need) -> None:
    """1 TiB, mostly untouched, and 300 more mappings."""
    need(MICROVM, "qemu-system-x86")
    args = ["-m", "1T", "-object", "memory-backend-ram,id=m0,size=1T,reserve=off"]
    for at in range(60):
        args += ["-object", f"memory-backend-ram,id=x{at},size=4M,reserve=off"]
    machine = "microvm,memory-backend=m0"
    with Guest(how="plain", qemu=MICROVM, accel="qtest", machine=machine, memory=0, args=args) as guest:
        found = outside(guest, "maps")
        assert not found.certain  # those backends may have been plugged in since
        check(guest, found, [("m0", MIB, "anonymous")])
    args = ["-m", "1T", "-object", "memory-backend-ram,id=m0,size=1T,reserve=off"]
    with Guest(how="plain", machine="microvm,memory-backend=m0", memory=0, args=args) as guest:
        for at in range(150):
            guest.monitor.execute(
                "object-add", {"qom-type": "memory-backend-ram", "id": f"x{at}", "size": 2 * MIB, "reserve": False}
            )
        assert len(list(truth.mappings(guest.pid))) > 300
        found = outside(guest, "auto")
        assert found.source == "symbols"
        check(guest, found, [("m0", MIB, "anonymous")])
        assert outside(guest, "maps").blocks == [block._replace(id="m0") for block in found.blocks]


# ---- QEMUs without symbols ----


@pytest.fixture(scope="module")
def nameless(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return renamed(tmp_path_factory.mktemp("nameless"))


def without_symbols(qemu: Path) -> Guest:
    """A guest of 192 MiB with video RAM; the copy has to be told where its own files are."""
    return Guest(
        how="plain",
        qemu=str(qemu),
        memory=192 * MIB,
        args=["-device", "VGA", "-L", "/usr/share/seabios", "-L", "/usr/share/qemu"],
        env={"QEMU_MODULE_DIR": str(qemu.parent)},
    )


@pytest.fixture(scope="module")
def debug(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return debug_file(tmp_path_factory.mktemp("debug"))


@pytest.fixture(scope="module")
def plain(nameless: Path) -> Iterator[Guest]:
    with without_symbols(nameless) as guest:
        yield guest


def test_separate_debug_information(plain: Guest, debug: Path) -> None:
    with pytest.raises(NotLocated, match="has no symbols"):
        outside(plain, "symbols")
    found = outside(plain, "symbols", debug)
    assert found.certain
    check(plain, found, [("pc.ram", 192, "anonymous")])
    assert outside(plain, "auto", debug) == found
    mapped = outside(plain, "auto")
    assert (mapped.source, mapped.certain) == ("maps", True)
    check(plain, mapped, [("pc.ram", 192, "anonymous")])


def test_debug_information_of_another_build_is_not_believed(plain: Guest, debug: Path, tmp_path: Path) -> None:
    (file,) = debug.glob("*/*.debug")
    copy = tmp_path / file.relative_to(debug)
    copy.parent.mkdir()
    data = file.read_bytes()
    build_id = bytes.fromhex(file.parent.name + file.stem)
    assert data.count(build_id) == 1
    copy.write_bytes(data.replace(build_id, build_id[:-1] + bytes([build_id[-1] ^ 1])))
    with pytest.raises(NotLocated, match="has no symbols"):
        outside(plain, "symbols", tmp_path)


def test_inject_without_symbols(nameless: Path) -> None:
    """The shim is told where guest RAM is, locks exactly that, and is told again when it is asked for more."""
    with without_symbols(nameless) as guest:
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "64M", "--json", timeout=60)
        assert result.returncode == 0, result.stderr
        assert json.loads(result.stdout)["source"] == "controller"
        assert_holds(guest, 64 * MIB)
        for words in (["inject"], ["status"], ["set", "all"]):
            assert ramlock(*words, "--pid", guest.pid, timeout=60).returncode == 0
        held = assert_holds(guest, 192 * MIB)
        assert held.ranges == (guest.ram(),)
        guest.check_unharmed()


def test_a_guess_is_not_locked(need: Need) -> None:
    need(MICROVM, "qemu-system-x86")
    with Guest(how="plain", qemu=MICROVM, machine="microvm", accel="qtest", memory=128 * MIB) as guest:
        guest.monitor.execute("object-add", {"qom-type": "memory-backend-ram", "id": "spare", "size": 64 * MIB})
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "16M")
        assert_refused(result, 4)
        assert "only probably" in result.stderr
        assert "--allow-probable" in result.stderr
        assert truth.vm_lck(guest.pid) == 0
        result = ramlock("inject", "--pid", guest.pid, "--guarantee", "all", "--allow-probable", timeout=60)
        assert result.returncode == 0, result.stderr
        assert truth.locked(guest.pid).ranges == (guest.ram(),)
        # What was answered for once stays, and nothing is added to it.
        assert ramlock("set", "32M", "--pid", guest.pid, timeout=60).returncode == 0
        assert truth.vm_lck(guest.pid) == 32 * MIB


# ---- The command ----


def test_the_command() -> None:
    with Guest(memory=GIB // 4, args=["-name", "found", "-device", "VGA"]) as guest:
        guest.settle()
        answers = {}
        for source in ("auto", "qemu", "symbols", "maps"):
            result = ramlock("locate", "--pid", guest.pid, "--source", source, "--json")
            assert result.returncode == 0, result.stderr
            answers[source] = json.loads(result.stdout)
        block = {"id": "pc.ram", "host": guest.ram().start, "size": GIB // 4, "page-size": 4096, "backing": "anonymous"}
        for source, answer in answers.items():
            expected = "qemu" if source == "auto" else source
            assert answer == {"source": expected, "confidence": "certain", "blocks": [block]}
        result = ramlock("locate", "--vm", "found")
        assert result.returncode == 0
        assert f"{guest.ram().start:#018x}  {GIB // 4:#018x}" in result.stdout
        assert "certain" in result.stdout
    assert_refused(ramlock("locate", "--pid", guest.pid), 6)


def test_nothing_to_find() -> None:
    with Guest(how="plain", machine="none", memory=0, args=["-S"]) as guest:
        assert outside(guest, "symbols").blocks == []
        assert_refused(ramlock("locate", "--pid", guest.pid, "--source", "maps"), 4)


def test_a_confidential_guest_is_refused_with_its_reason(nameless: Path) -> None:
    """Its command line is enough: whether such a guest would start here does not matter."""
    with Guest(how="plain", memory=128 * MIB) as guest:
        process = procfs.read(guest.pid)
        words = (*process.cmdline, "-machine", "pc,confidential-guest-support=sev0")
        with pytest.raises(NotLocated, match=r"confidential guest"):
            locate.outside(process._replace(cmdline=words), "maps")
