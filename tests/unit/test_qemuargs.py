"""QEMU's command line: what it asks for in memory, and what makes that doubtful."""
# SPDX-License-Identifier: GPL-2.0-or-later

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramlock import procfs, qemuargs
from ramlock.guestram import Malformed
from ramlock.qemuargs import MIB, Want, Wanted

GIB = 1024 * MIB


def parse(line: str, program: str = "qemu-system-x86_64") -> Wanted:
    return qemuargs.parse((program, *line.split()))


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("", 128 * MIB),
        ("-m 512", 512 * MIB),
        ("-m 2G", 2 * GIB),
        ("--m 2G", 2 * GIB),
        ("-m 0", 128 * MIB),
        ("-m 0x200", 512 * MIB),
        ("-m 1.5G", 1536 * MIB),
        ("-m size=1024M,slots=2,maxmem=4G", GIB),
        ("-m 1024M,slots=2 -m maxmem=4G", GIB),
        ("-m 1G -m 2G", 2 * GIB),
        ("-m 1048577B", MIB + 8192),
        ("-machine q35,memory.size=1G", GIB),
        ("-name -m -m 256M", 256 * MIB),
        ("-append -m -m 256M", 256 * MIB),
        ("-nodefaults -m 256M -S", 256 * MIB),
    ],
)
def test_machine_ram(line: str, size: int) -> None:
    wanted = parse(line)
    assert [want.size for want in wanted.blocks] == [size]
    assert wanted.doubts == []


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("", "pc.ram"),
        ("-M q35", "pc.ram"),
        ("-machine type=microvm,x=on", "microvm.ram"),
        ("-M virt", "mach-virt.ram"),
    ],
)
def test_its_name(line: str, name: str) -> None:
    assert [want.id for want in parse(line).blocks] == [name]
    assert parse("", "qemu-system-x86_64-microvm").blocks[0].id == "microvm.ram"


RAM = "-object memory-backend-ram,id=a,size=64M"


@pytest.mark.parametrize(
    ("line", "want"),
    [
        (f"{RAM} -machine pc,memory-backend=a", Want("a", 64 * MIB, "anonymous")),
        (f"{RAM},share=on -M memory-backend=a", Want("a", 64 * MIB, "anonymous", shared=True)),
        (f"{RAM} -numa node,memdev=a", Want("a", 64 * MIB, "anonymous")),
        (f"-machine memory-backend=a {RAM}", Want("a", 64 * MIB, "anonymous")),
        (
            "-object memory-backend-memfd,size=1048576,id=a -M memory-backend=a",
            Want("a", MIB, "memfd", shared=True),
        ),
        (
            "-object memory-backend-memfd,id=a,size=4M,hugetlb=on,hugetlbsize=2M,share=off -M memory-backend=a",
            Want("a", 4 * MIB, "memfd", huge=2 * MIB),
        ),
        (
            "-object memory-backend-file,id=a,size=4M,share=on,mem-path=/dev/x,,y -M memory-backend=a",
            Want("a", 4 * MIB, "file", shared=True, path="/dev/x,y"),
        ),
        (
            '-object {"qom-type":"memory-backend-ram","id":"a","size":1048576,"share":true} -M memory-backend=a',
            Want("a", MIB, "anonymous", shared=True),
        ),
        ("-mem-path /dev/hugepages -m 4M", Want("pc.ram", 4 * MIB, "file", path="/dev/hugepages")),
    ],
)
def test_backends(line: str, want: Want) -> None:
    wanted = parse(line)
    assert wanted.blocks == [want]
    assert wanted.doubts == []


@pytest.mark.parametrize(
    ("line", "says", "blocks"),
    [
        (RAM, "nothing uses the backend a", 1),
        (f"{RAM} -device pc-dimm,memdev=a", "unplugged", 2),
        (f'{RAM} -device {{"driver":"pc-dimm","memdev":"a"}}', "unplugged", 2),
        (f"{RAM} -device virtio-mem-pci,memdev=a", "only the plugged part", 2),
        ("-M memory-backend=b", "the backend b is not one", 0),
        ("-object memory-backend-shm,id=b,size=4M -M memory-backend=b", "the backend b is not one", 0),
        ("-readconfig /etc/vm.cfg", "a configuration file", 1),
        ("-global memory-backend-ram.size=1G", "-global may change", 1),
    ],
)
def test_doubts(line: str, says: str, blocks: int) -> None:
    wanted = parse(line)
    assert any(says in doubt for doubt in wanted.doubts), wanted
    assert len(wanted.blocks) == blocks


def test_devices_that_make_no_main_memory() -> None:
    for driver in ("nvdimm", "ivshmem-plain", "virtio-pmem-pci"):
        wanted = parse(f"{RAM} -device {driver},memdev=a")
        assert ([want.id for want in wanted.blocks], wanted.doubts) == (["pc.ram"], [])
        assert [want.id for want in wanted.spare] == ["a"]
        assert wanted.uses == {"a": driver}


def test_without_m_only_what_is_known_is_assumed() -> None:
    assert parse("", "qemu-system-ppc64").doubts
    assert not parse("-m 1G", "qemu-system-ppc64").doubts


def test_no_machine_no_memory() -> None:
    assert parse("-M none").blocks == []


def test_confidential_guests() -> None:
    assert parse("-machine q35,confidential-guest-support=tdx0").confidential
    assert parse("-M memory-encryption=sev0").confidential
    assert not parse("-M q35").confidential


def test_video_memory() -> None:
    assert parse("-device VGA,vgamem_mb=64").video == 64 * MIB
    assert parse("-device qxl-vga").video == 64 * MIB


@pytest.mark.parametrize(
    "line",
    [
        "-m lots",
        "-m -1",
        "-m 99999999999999999999",
        "-m 16E",
        f"{RAM} {RAM}",
        "-object memory-backend-ram,size=4M",
        "-object memory-backend-ram,id=a,size=0 -M memory-backend=a",
        '-object {"qom-type"',
        "-object " + "{" * 100000,
        '-object {"qom-type":"memory-backend-ram","id":"a","size":[]} -M memory-backend=a',
    ],
)
def test_nonsense(line: str) -> None:
    with pytest.raises(Malformed):
        parse(line)


WORDS = st.sampled_from(
    ["-m", "-object", "-numa", "-machine", "-device", "memory-backend-ram,id=a,size=", "node,memdev=a", "{", "pc-dimm"]
)


@given(st.lists(WORDS | st.text(max_size=40), max_size=12))
def test_garbage_is_read_or_refused(words: list[str]) -> None:
    try:
        wanted = qemuargs.parse(words)
    except Malformed:
        return
    assert all(0 < want.size < 1 << 63 for want in wanted.blocks)


def test_a_long_command_line_takes_no_longer_for_each_word() -> None:
    """The kernel takes megabytes of it, from anybody."""

    def seconds(count: int) -> float:
        words = ["qemu-system-x86_64"]
        for i in range(count):
            words += ["-numa", f"memdev=n{i}", "-device", f"pc-dimm,memdev=d{i}"]
        words += ["-name", "," * (10 * count)]
        began = time.process_time()
        qemuargs.parse(words)
        procfs.vm_name(tuple(words))
        return time.process_time() - began

    assert min(seconds(20_000) for _ in range(3)) < 8 * 4 * min(seconds(2_500) for _ in range(3))
