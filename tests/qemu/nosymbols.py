"""QEMUs that export no list of RAM blocks: a copy with other names, and its debug information apart from it."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection, SymbolTableSection

from tests.qemu.guest import QEMU

MODULES = Path("/usr/lib/x86_64-linux-gnu/qemu")
HIDDEN = ("ram_list", "qemu_ram_foreach_block")

# What debug information says of QEMU 4.2 to 8.1 (include/exec/ramblock.h), and of nothing else in it.
_SOURCE = """
struct RAMBlock {
    void *rcu[2];
    void *mr;
    unsigned char *host, *colo_cache;
    unsigned long offset, used_length, max_length;
    void (*resized)(void);
    unsigned flags;
    char idstr[256];
    struct { void *le_next, *le_prev; } next;
    void *ramblock_notifiers;
    int fd;
    unsigned long page_size;
};
char ram_list[SIZE];
struct RAMBlock *use_of_it;
int qemu_ram_foreach_block(struct RAMBlock *block) { return block->fd; }
"""


def renamed(folder: Path, hidden: Sequence[str] = HIDDEN) -> Path:
    """A copy of QEMU where these dynamic symbols have other names, with its modules, which use them."""
    path = folder / QEMU
    data = Path(shutil.which(QEMU) or QEMU).read_bytes()
    assert all(_word(name) in data for name in hidden)
    path.write_bytes(_rename(data, hidden))
    path.chmod(0o755)
    for module in MODULES.glob("accel-*.so"):
        (folder / module.name).write_bytes(_rename(module.read_bytes(), hidden))
    return path


def _rename(data: bytes, hidden: Sequence[str]) -> bytes:
    for name in hidden:
        data = data.replace(_word(name), b"\0X" + name.encode()[1:] + b"\0")
    return data


def _word(name: str) -> bytes:
    return b"\0" + name.encode() + b"\0"


def debug_file(folder: Path) -> Path:
    """Separate debug information, where it would be in /usr/lib/debug/.build-id; returns that folder."""
    with Path(shutil.which(QEMU) or QEMU).open("rb") as file:
        elf = ELFFile(file)
        address, size = _ram_list(elf, ".dynsym")
        section = elf.get_section_by_name(".note.gnu.build-id")
        assert isinstance(section, NoteSection)
        build_id = str(next(note["n_desc"] for note in section.iter_notes() if note["n_type"] == "NT_GNU_BUILD_ID"))
    source = folder / "debug.c"
    source.write_text(_SOURCE.replace("SIZE", str(size)))
    path = folder / "debug" / build_id[:2] / f"{build_id[2:]}.debug"
    path.parent.mkdir(parents=True)
    command = f"gcc -g -O0 -fdata-sections -nostdlib -static -Wl,-e,0 -Wl,--build-id=0x{build_id}"
    script = folder / "link.ld"
    script.write_text(f"SECTIONS {{ .list {address:#x} : {{ *(.bss.ram_list) }} }} INSERT AFTER .bss;")
    subprocess.run([*command.split(), f"-Wl,-T,{script}", "-o", str(path), str(source)], check=True)
    with path.open("rb") as file:
        assert _ram_list(ELFFile(file), ".symtab") == (address, size)
    return path.parents[1]


def _ram_list(elf: ELFFile, table: str) -> tuple[int, int]:
    section = elf.get_section_by_name(table)
    assert isinstance(section, SymbolTableSection)
    symbols = section.get_symbol_by_name("ram_list")
    assert symbols is not None
    symbol = symbols[0]
    return int(symbol["st_value"]), int(symbol["st_size"])


def regions(guest_says: str) -> dict[str, tuple[int, int]]:
    """Of `info mtree -f`: each region of RAM, with the guest's address of a part of it and that part's place in it."""
    result: dict[str, tuple[int, int]] = {}
    for line in guest_says.splitlines():
        if found := re.match(r"\s+([0-9a-f]{16})-[0-9a-f]{16} \(prio -?\d+, ram\): (\S+)(?: @([0-9a-f]+))?", line):
            result.setdefault(found[2], (int(found[1], 16), int(found[3] or "0", 16)))
    return result
