"""Which programs a shim can be preloaded into, judged on real files."""
# SPDX-License-Identifier: GPL-2.0-or-later

import ctypes
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from hypothesis import given
from hypothesis import strategies as st

from ramlock import elf
from ramlock.deadline import Deadline
from ramlock.errors import CannotPreload
from ramlock.memory import find_build_id
from tests.conftest import absent

PROGRAM = "int exported_one(void) { return 1; }\nint main(void) { return 0; }\n"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dynamic, an exporting, a static program and a library."""
    if shutil.which("gcc") is None:
        absent("gcc is not here", "gcc")
    folder = tmp_path_factory.mktemp("elf")
    (folder / "p.c").write_text(PROGRAM)
    kinds = {
        "dynamic": [],
        "exporting": ["-rdynamic"],
        "oldhash": ["-rdynamic", "-Wl,--hash-style=sysv"],
        "static": ["-static"],
        "library.so": ["-shared", "-fPIC"],
        "musl": ["-Wl,--dynamic-linker=/lib/ld-musl-x86_64.so.1"],
        "odd": ["-Wl,--dynamic-linker=/lib/my-loader"],
    }
    for name, flags in kinds.items():
        subprocess.run(["gcc", *flags, "-o", str(folder / name), str(folder / "p.c")], check=True)
    return folder


def test_a_dynamic_program_takes_a_library(built: Path) -> None:
    program, library = elf.read(built / "dynamic"), elf.read(built / "library.so")
    assert program.bits == struct.calcsize("P") * 8
    assert program.loader is not None
    assert library.loader is None
    elf.check_preload(program, library)


@pytest.mark.parametrize(
    ("name", "says"),
    [("static", "statically linked"), ("musl", "musl"), ("odd", "the loader /lib/my-loader")],
)
def test_loaders_that_do_not_preload(built: Path, name: str, says: str) -> None:
    with pytest.raises(CannotPreload, match=says) as error:
        elf.check_preload(elf.read(built / name), elf.read(built / "library.so"))
    assert error.value.exit_code == 4


def test_another_architecture(built: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.so"
    data = bytearray((built / "library.so").read_bytes())
    data[18:20] = struct.pack("<H", 243)  # EM_RISCV
    other.write_bytes(data)
    with pytest.raises(CannotPreload, match="RISCV"):
        elf.check_preload(elf.read(built / "dynamic"), elf.read(other))


@pytest.mark.parametrize("name", ["exporting", "oldhash"])
def test_exported_symbols(built: Path, name: str) -> None:
    wanted = ("exported_one", "main", "no_such_symbol", "__libc_start_main")
    assert elf.read(built / name, wanted).exported == {"exported_one", "main"}
    assert elf.read(built / "dynamic", wanted).exported == frozenset()


def test_a_script_says_who_runs_it(tmp_path: Path) -> None:
    script = tmp_path / "qemu"
    script.write_text("#!/bin/sh -e\nexec qemu-system-x86_64\n")
    with pytest.raises(CannotPreload, match=r"is a script \(run by /bin/sh -e\)"):
        elf.read(script)


@pytest.mark.parametrize("data", [b"", b"x", b"\x7fELF", b"\x7fELF" + b"\xff" * 60, b"MZ" * 100, os.urandom(4096)])
def test_no_elf_file(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "file").write_bytes(data)
    with pytest.raises(CannotPreload):
        elf.read(tmp_path / "file")


def test_damaged_files_are_refused_and_nothing_else(built: Path, tmp_path: Path) -> None:
    whole = (built / "exporting").read_bytes()
    damaged = tmp_path / "damaged"
    for place in range(0, 1024, 7):
        damaged.write_bytes(whole[:place] + b"\xff" + whole[place + 1 :])
        try:
            elf.read(damaged, ["exported_one"])
        except CannotPreload as error:
            assert error.hint
    for length in range(0, len(whole), 997):
        damaged.write_bytes(whole[:length])
        try:
            elf.read(damaged, ["exported_one"])
        except CannotPreload as error:
            assert error.hint


def test_not_there_and_not_ours(tmp_path: Path) -> None:
    with pytest.raises(CannotPreload, match="No such file"):
        elf.read(tmp_path / "nothing")
    with pytest.raises(CannotPreload, match="directory"):
        elf.read(tmp_path)


@pytest.fixture
def privileged(built: Path, tmp_path: Path) -> Path:
    """A program of root's in a place where setuid counts."""
    if os.getuid() != 0:
        absent("only root can make a file of another user")
    if os.statvfs(tmp_path).f_flag & os.ST_NOSUID:
        absent("the temporary folder is mounted nosuid")
    return Path(shutil.copy(built / "dynamic", tmp_path / "program"))


@pytest.mark.parametrize(("mode", "says"), [(0o4755, "is setuid"), (0o2755, "is setgid")])
def test_setuid_matters_when_it_changes_ids(privileged: Path, built: Path, mode: int, says: str) -> None:
    library = elf.read(built / "library.so")
    privileged.chmod(mode)
    elf.check_preload(elf.read(privileged), library)  # root's own: nothing changes
    os.chown(privileged, 65534, 65534)
    privileged.chmod(mode)
    with pytest.raises(CannotPreload, match=says):
        elf.check_preload(elf.read(privileged), library)
    privileged.chmod(0o2745 if mode == 0o2755 else 0o755)  # setgid without group execute is only a lock mark
    elf.check_preload(elf.read(privileged), library)


def test_the_kernel_agrees_about_file_capabilities(privileged: Path, built: Path) -> None:
    """To root they make no difference, to others they do: getauxval(AT_SECURE) says so."""
    # struct vfs_cap_data, revision 2: effective bit, cap_net_bind_service permitted.
    os.setxattr(privileged, "security.capability", struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0))
    library = elf.read(built / "library.so")
    elf.check_preload(elf.read(privileged), library)
    code = (
        "import os, sys; from pathlib import Path; from ramlock import elf\n"
        "program, library = (elf.read(Path(path)) for path in sys.argv[1:])\n"
        "os.setuid(65534)\n"
        "try: elf.check_preload(program, library)\n"
        "except elf.CannotPreload as error: print(error.message)\n"
    )
    for folder in (privileged.parent, *privileged.parents[1:4]):
        folder.chmod(folder.stat().st_mode | 0o011)
    said = subprocess.run(
        [sys.executable, "-c", code, str(privileged), str(built / "library.so")],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    ).stdout
    assert "has file capabilities" in said


def test_this_python_is_not_secure() -> None:
    """The premise of these tests."""
    at_secure = 23
    assert ctypes.CDLL(None).getauxval(at_secure) == 0


DEBUGGED = """
#include <stddef.h>
#include <stdio.h>
struct first { char name[3]; struct { void *next, *back; } links; long size; };
struct first one;
long my_ram_list[3], ram_list[7];
int near_it(struct first *f) { return f->name[0]; }
int main(void)
{
    printf("%zu %zu\\n", offsetof(struct first, links), offsetof(struct first, size));
    return near_it(&one);
}
"""


@pytest.fixture(scope="module")
def debugged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("debugged")
    (folder / "d.c").write_text(DEBUGGED)
    subprocess.run(["gcc", "-g", "-o", folder / "d", folder / "d.c", "-Wl,--build-id=0xabcdef01"], check=True)
    return folder / "d"


def test_symbols_of_the_symbol_table(debugged: Path) -> None:
    with debugged.open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        found = elf.symbols(file.fileno(), ("ram_list", "near_it", "nothing"))
        assert found.keys() == {"ram_list", "near_it"}
        for name, symbol in found.items():
            expected = (table.get_symbol_by_name(name) or [])[0]
            assert (symbol.address, symbol.size) == (expected["st_value"], expected["st_size"])
        assert found["ram_list"].size == 56
        assert "abcdef01" in map(find_build_id, elf.notes(file.fileno()))


def test_members_of_a_structure(debugged: Path) -> None:
    said = subprocess.run([debugged], stdout=subprocess.PIPE, text=True, check=False).stdout.split()
    with debugged.open("rb") as file:
        near = elf.symbols(file.fileno(), ["near_it"])["near_it"].address
        for address in (near, None):
            found = elf.members(file, "first", address, Deadline(10))
            assert (found["name"], found["links"], found["size"]) == (0, int(said[0]), int(said[1]))
        assert elf.members(file, "second", None, Deadline(10)) == {}
        assert elf.members(file, "first", near, Deadline(0)) == {}


@given(st.integers(0, 1 << 16), st.binary(min_size=1, max_size=16))
def test_a_damaged_file_has_no_symbols_or_some(debugged: Path, at: int, data: bytes) -> None:
    whole = bytearray(debugged.read_bytes())
    at %= len(whole)
    whole[at : at + len(data)] = data
    with tempfile.TemporaryFile() as file:
        file.write(whole)
        file.flush()
        try:
            elf.symbols(file.fileno(), ["ram_list"])
            elf.notes(file.fileno())
        except ValueError:
            return
        assert isinstance(elf.members(file, "first", None, Deadline(1)), dict)
