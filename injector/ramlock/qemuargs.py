"""What guest RAM a QEMU command line asks for: its blocks, and what may make the guess wrong.

Only what decides about memory is read. The forms are QEMU's: `key=value,...` with commas written twice and the first
key left out, or JSON (docs: qemu(1), "-m", "-object", "-numa", "-machine"). What is not understood is a doubt.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from ramlock.guestram import BLOCKS_MOST, Malformed
from ramlock.procfs import split_options

MIB = 1 << 20
_DEFAULT = 128 * MIB
_ROUND = 8192  # QEMU rounds machine RAM up to this
_SIZE = re.compile(r"(?:0x([0-9a-fA-F]{1,16})|([0-9]{1,19})(\.[0-9]{1,9})?)([bBkKmMgGtTpPeE]?)")
_UNITS = {"b": 0, "k": 10, "m": 20, "g": 30, "t": 40, "p": 50, "e": 60}
_WITH_VALUE = {
    *("append", "m", "machine", "M", "object", "numa", "device", "name", "mem-path", "readconfig", "set", "global"),
    *("drive", "blockdev", "kernel", "initrd", "bios", "netdev", "chardev", "qmp", "smbios", "fw_cfg", "D", "pidfile"),
}
"""Options whose value may begin with a dash: it is no option then."""
_RAM_NAMES = (("microvm", "microvm.ram"), ("virt", "mach-virt.ram"), ("pc", "pc.ram"), ("isapc", "pc.ram"))
_BACKENDS: dict[str, "Kind"] = {
    "memory-backend-ram": "anonymous",
    "memory-backend-memfd": "memfd",
    "memory-backend-file": "file",
}
_VIDEO = ("vgamem_mb", "vram_size_mb", "vram64_size_mb", "ram_size_mb")

MACHINE = "machine"
MAIN_MEMORY = ("pc-dimm", "virtio-mem")
"""Devices that make main memory of a backend; not nvdimm, virtio-pmem, ivshmem-plain, cxl-type3."""

Kind = Literal["anonymous", "memfd", "file"]


class Want(NamedTuple):
    """A block that the command line asks for; size in bytes."""

    id: str
    size: int
    kind: Kind
    shared: bool = False
    path: str = ""
    """Of kind file: the file, or a folder in which QEMU makes one."""
    huge: int | None = None
    """Page size of a hugetlb memfd, 0 for the host's usual one; None when it is not hugetlb."""
    virtio_mem: bool = False
    """Whether only the plugged part of it is guest RAM."""


@dataclass(slots=True)
class Wanted:
    """All that a command line says about memory."""

    blocks: list[Want] = field(default_factory=list)
    spare: list[Want] = field(default_factory=list)
    """Backends that nothing uses yet."""
    doubts: list[str] = field(default_factory=list)
    uses: dict[str, str] = field(default_factory=dict)
    """What uses a backend: "machine", or the driver of a device."""
    confidential: bool = False
    """Whether the guest's memory is kept from the host."""
    video: int = 16 * MIB
    """No block of a device's own, such as video RAM and flash memory, is larger, in bytes."""


def parse(cmdline: Sequence[str]) -> Wanted:
    """Read a command line, the program's name included. Raises Malformed when what it says of memory is no QEMU's."""
    state = _State()
    program = cmdline[0].rsplit("/", 1)[-1] if cmdline else ""
    for option, value in _options(cmdline[1:]):
        state.take(option, value)
    return state.finish(program)


def size(text: object, unit: int = 1) -> int:
    """Read a size as QEMU does; `unit` is what a bare number counts. Raises Malformed."""
    if type(text) is int and 0 <= text < 1 << 63:
        return text
    found = _SIZE.fullmatch(text) if isinstance(text, str) else None
    if found is None:
        raise Malformed("a size that is none")
    hexadecimal, whole, fraction, suffix = found.groups()
    scale = 1 << _UNITS[suffix.lower()] if suffix else unit
    result = int(hexadecimal, 16) * scale if hexadecimal else int(whole) * scale
    if fraction:
        result += int(fraction[1:]) * scale // 10 ** (len(fraction) - 1)
    if result >= 1 << 63:
        raise Malformed("a size that is none")
    return result


def _options(words: Sequence[str]) -> Iterator[tuple[str, str]]:
    index = 0
    while index < len(words):
        word = words[index]
        index += 1
        if not word.startswith("-") or word == "-":
            continue
        name = word[2:] if word.startswith("--") else word[1:]
        value = ""
        if index < len(words) and (name in _WITH_VALUE or not words[index].startswith("-")):
            value = words[index]
            index += 1
        yield name, value


def _pairs(value: str, first: str) -> dict[str, Any]:
    """Read `a,b=c` or JSON; `first` is the key of the first word without one."""
    if value.startswith("{"):
        try:
            data = json.loads(value)
        except (ValueError, RecursionError):
            raise Malformed("JSON that is none") from None
        if not isinstance(data, dict):
            raise Malformed("JSON that is none")
        return data
    result: dict[str, Any] = {}
    for index, part in enumerate(split_options(value)):
        key, equals, rest = part.partition("=")
        if equals:
            result[key] = rest
        elif index == 0:
            result[first] = part
        else:
            result[part] = "on"
    return result


def _on(value: object) -> bool:
    return value is True or value in ("on", "yes", "true", "y")


class _State:
    def __init__(self) -> None:
        self.memory: dict[str, Any] = {}
        self.machine: dict[str, Any] = {}
        self.objects: dict[str, dict[str, Any]] = {}
        self.nodes: list[str] = []
        self.devices: dict[str, str] = {}
        self.mem_path = ""
        self.out = Wanted()

    def take(self, option: str, value: str) -> None:
        if option == "m":
            self.memory.update(_pairs(value, "size"))
        elif option in ("machine", "M"):
            self.machine.update(_pairs(value, "type"))
        elif option == "object":
            self._object(_pairs(value, "qom-type"))
        elif option == "numa":
            pairs = _pairs(value, "type")
            if isinstance(memdev := pairs.get("memdev"), str):
                self.nodes.append(memdev)
        elif option == "device":
            self._device(_pairs(value, "driver"))
        elif option == "mem-path":
            self.mem_path = value
        elif option == "readconfig":
            self.out.doubts.append("a configuration file (-readconfig) may say more")
        elif option == "set" or (option == "global" and "memory-backend" in value):
            self.out.doubts.append(f"-{option} may change the memory backends")

    def _object(self, pairs: dict[str, Any]) -> None:
        kind, name = pairs.get("qom-type"), pairs.get("id")
        if not isinstance(kind, str) or not kind.startswith("memory-backend"):
            return
        if not isinstance(name, str) or not name or len(name) > 255 or name in self.objects:
            raise Malformed("a memory backend without a name of its own")
        if len(self.objects) == BLOCKS_MOST:
            raise Malformed("more memory backends than QEMU can have")
        self.objects[name] = pairs

    def _device(self, pairs: dict[str, Any]) -> None:
        driver = pairs.get("driver")
        if not isinstance(driver, str):
            return
        if isinstance(memdev := pairs.get("memdev"), str):
            self.devices[memdev] = driver
        if driver.startswith("qxl"):
            self.out.video = max(self.out.video, 64 * MIB)
        for key in _VIDEO:
            if (megabytes := pairs.get(key)) is not None:
                self.out.video = max(self.out.video, min(size(megabytes), 1 << 20) * MIB)

    def finish(self, program: str) -> Wanted:
        out = self.out
        if self.machine.get("confidential-guest-support") or self.machine.get("memory-encryption"):
            out.confidential = True
        machine_memdev = self.machine.get("memory-backend")
        kind = str(self.machine.get("type", ""))
        names = dict.fromkeys(self.nodes)  # and no list, in which to look is slow
        if isinstance(machine_memdev, str):
            names[machine_memdev] = None
        elif not names and kind != "none":
            self._machine_ram(kind, program)
        for name in names:
            self._use(name)
        out.uses = {**self.devices, **dict.fromkeys(names, MACHINE)}
        for name, driver in self.devices.items():
            if name in names:
                continue
            if not driver.startswith(MAIN_MEMORY):
                if name in self.objects and (want := self._want(name)) is not None:
                    out.spare.append(want)
                continue
            if driver.startswith("virtio-mem"):
                out.doubts.append(
                    f"only the plugged part of {name} (virtio-mem) is guest RAM, which mappings do not tell"
                )
            else:
                out.doubts.append(f"{name} ({driver}) may have been unplugged since")
            self._use(name, virtio_mem=driver.startswith("virtio-mem"))
        for name in self.objects:
            if name not in names and name not in self.devices:
                out.doubts.append(f"nothing uses the backend {name} at the start, it may have been plugged in since")
                if (want := self._want(name)) is not None:
                    out.spare.append(want)
        return out

    def _machine_ram(self, kind: str, program: str) -> None:
        wanted = self.machine.get("memory.size")
        amount = size(wanted) if wanted is not None else size(self.memory.get("size", "0") or "0", MIB)
        if amount == 0:
            amount = _DEFAULT
            if not re.match(r"\.?(qemu-system-(x86_64|i386)|kvm|qemu-kvm)", program):
                self.out.doubts.append("how much memory this machine has without -m")
        amount = -(-amount // _ROUND) * _ROUND
        name = next((ram for prefix, ram in _RAM_NAMES if kind.startswith(prefix)), "")
        name = name or ("microvm.ram" if "microvm" in program and not kind else "pc.ram")
        self.out.blocks.append(Want(name, amount, "file" if self.mem_path else "anonymous", path=self.mem_path))

    def _use(self, name: str, *, virtio_mem: bool = False) -> None:
        want = self._want(name) if name in self.objects else None
        if want is None:
            self.out.doubts.append(f"the backend {name} is not one that is understood")
        else:
            self.out.blocks.append(want._replace(virtio_mem=virtio_mem))

    def _want(self, name: str) -> Want | None:
        pairs = self.objects[name]
        kind = _BACKENDS.get(str(pairs["qom-type"]))
        if kind is None or "size" not in pairs:
            return None
        amount = size(pairs["size"])
        shared = _on(pairs["share"]) if "share" in pairs else kind == "memfd"
        path = pairs.get("mem-path", "") if kind == "file" else ""
        huge = None
        if kind == "memfd" and _on(pairs.get("hugetlb", False)):
            huge = size(pairs.get("hugetlbsize", 0))
        if amount == 0 or not isinstance(path, str):
            raise Malformed("a memory backend that cannot be")
        return Want(name, amount, kind, shared, path, huge)
