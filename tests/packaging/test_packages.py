"""Wheel, source distribution, Debian package and `make install`: built, checked, and run in a clean root."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection

from ramlock import __version__
from tests.conftest import Need, absent
from tests.qemu.guest import MIB, ROOT, Guest
from tests.test_make import make

CLEAN = ROOT / ".cache/packaging/root"
QEMU_ROOT = ROOT / ".cache/release/trixie"
QEMU = "/usr/bin/qemu-system-x86_64"
NEWEST_GLIBC = (2, 28)

pytestmark = [pytest.mark.usefixtures("root"), pytest.mark.deadline(600)]


@pytest.fixture
def root() -> None:
    """Skips unless run as root."""
    if os.geteuid() != 0:
        absent("only root can install into a root")


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that `make dist` builds."""
    if not shutil.which("dpkg-buildpackage"):
        absent("dpkg-buildpackage is not here", "dpkg-dev")
    folder = tmp_path_factory.mktemp("dist")
    make("dist", f"DIST={folder}", timeout=900)
    return folder


def one(folder: Path, pattern: str) -> Path:
    found = list(folder.glob(pattern))
    assert len(found) == 1, (pattern, found)
    return found[0]


class Root:
    """A clean root of its own, with QEMU: what is written into it is gone with the test."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def enter(self) -> list[str]:
        mounts = "; ".join(f"mount --rbind /{name} '{self.path}/{name}'" for name in ("proc", "sys", "dev", "tmp"))
        return ["unshare", "-m", "sh", "-ec", f"{mounts}; exec chroot '{self.path}' \"$@\"", "sh"]

    def run(self, *words: object, code: int = 0) -> str:
        result = subprocess.run(
            [*self.enter(), *map(str, words)],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
            env={"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/root", "LANG": "C.UTF-8"},
        )
        assert result.returncode == code, result.stdout + result.stderr
        return result.stdout

    def put(self, file: Path) -> str:
        """Copies a file into it, and returns where it is there."""
        shutil.copy(file, self.path / "opt" / file.name)
        return f"/opt/{file.name}"


@pytest.fixture
def clean(tmp_path: Path) -> Iterator[Root]:
    for folder, how in ((CLEAN, "tests/packaging/root"), (QEMU_ROOT, "tests/guest/release trixie")):
        if not folder.is_dir():
            absent(f"{folder} is not there: {how} makes it, from Debian's packages")
    top, work, path = (tmp_path / name for name in ("top", "work", "root"))
    for folder in (top, work, path):
        folder.mkdir()
    options = f"lowerdir={CLEAN}:{QEMU_ROOT},upperdir={top},workdir={work}"
    subprocess.run(["mount", "-t", "overlay", "overlay", "-o", options, str(path)], check=True)
    try:
        yield Root(path)
    finally:
        subprocess.run(["umount", str(path)], check=True)


def check_runs(root: Root, command: str, shim: str) -> None:
    """The installed command says its version, finds its shim, and guarantees a real VM its memory."""
    assert root.run(command, "--version") == f"ramlock {__version__}\n"
    report = json.loads(root.run(command, "doctor", "--json", code=0))
    levels = {finding["name"]: finding for finding in report["findings"]}
    assert levels["shim"]["level"] == "ok", levels["shim"]
    assert levels["shim"]["found"] == shim
    assert levels["qemu"]["found"] == f"{QEMU}, symbols exported"
    prepare = [*root.enter(), command, "run", "--guarantee", "64M", "--"]
    with Guest(how="plain", qemu=QEMU, prepare=prepare, memory=256 * MIB, timeout=120) as guest:
        said = json.loads(root.run(command, "set", "96M", "--pid", guest.pid, "--json"))
        assert said["requested"] == said["locked"] == 96 * MIB
        assert "/ramlock/ramlock.so\n" in Path(f"/proc/{guest.pid}/maps").read_text()
    with Guest(how="plain", qemu=QEMU, prepare=root.enter(), memory=256 * MIB, timeout=120) as guest:
        root.run(command, "inject", "--pid", guest.pid, "--guarantee", "32M")
        assert json.loads(root.run(command, "status", "--pid", guest.pid, "--json"))["locked"] >= 32 * MIB


def glibc_needs(shim: Path) -> set[tuple[int, ...]]:
    with shim.open("rb") as file:
        needs = ELFFile(file).get_section_by_name(".gnu.version_r")
        assert isinstance(needs, GNUVerNeedSection)
        names = {(need.name, aux.name) for need, auxes in needs.iter_versions() for aux in auxes}
    assert {library for library, _ in names} <= {"libc.so.6", "ld-linux-x86-64.so.2"}
    return {tuple(map(int, name.removeprefix("GLIBC_").split("."))) for _, name in names}


def test_wheel(dist: Path, clean: Root, tmp_path: Path) -> None:
    wheel = one(dist, "*.whl")
    assert wheel.name == f"ramlock-{__version__}-py3-none-manylinux_2_28_x86_64.whl"
    with zipfile.ZipFile(wheel) as file:
        assert not [name for name in file.namelist() if ".libs/" in name], "nothing had to be grafted"
        shim = Path(file.extract("ramlock/ramlock.so", tmp_path))
        assert max(glibc_needs(shim)) <= NEWEST_GLIBC
        assert os.fsencode(ROOT) not in shim.read_bytes()
    shown = subprocess.run(
        [str(ROOT / ".venv/bin/auditwheel"), "show", str(wheel)], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    platform = re.search(r'platform tag:\s*"manylinux_2_(\d+)_x86_64"', " ".join(shown.split()))
    assert platform, shown
    assert int(platform[1]) <= NEWEST_GLIBC[1]
    clean.run("python3", "-m", "venv", "--system-site-packages", "/opt/venv")
    clean.run("/opt/venv/bin/pip", "install", "--quiet", "--no-index", clean.put(wheel))
    python = one(clean.path / "opt/venv/lib", "python3*").name
    check_runs(clean, "/opt/venv/bin/ramlock", f"/opt/venv/lib/{python}/site-packages/ramlock/ramlock.so")


def test_source_distribution(dist: Path) -> None:
    """The wheel and the Debian package are built out of it; what they need not is not in it."""
    with tarfile.open(one(dist, "*.tar.gz")) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"Makefile", "setup.py", "shim/shim.c", "LICENSE", "debian/control", "packaging/man.py"} <= names
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith(("tests/", ".venv"))]


def test_debian_package(dist: Path, clean: Root, need: Need) -> None:
    package = one(dist, "*.deb")
    need("lintian", "lintian")
    said = subprocess.run(
        ["lintian", "--allow-root", "--fail-on", "error,warning", str(package)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert said.returncode == 0, said.stdout + said.stderr
    clean.run("dpkg", "--install", clean.put(package))
    shim = "/usr/lib/ramlock/ramlock.so"
    assert max(glibc_needs(clean.path / shim[1:])) <= NEWEST_GLIBC
    check_runs(clean, "ramlock", shim)
    check_docs(clean, clean.path / "usr", "share/zsh/vendor-completions")
    clean.run("dpkg", "--purge", "ramlock")
    assert not (clean.path / "usr/lib/ramlock").exists()
    assert not list((clean.path / "usr/lib/python3/dist-packages").glob("ramlock*"))


def test_make_install(clean: Root) -> None:
    make("install", f"DESTDIR={clean.path}", "PREFIX=/usr/local", "INTERPRETER=/usr/bin/python3")
    check_runs(clean, "ramlock", "/usr/local/lib/ramlock/python/ramlock/ramlock.so")
    check_docs(clean, clean.path / "usr/local", "share/zsh/site-functions")


def check_docs(clean: Root, prefix: Path, zsh: str) -> None:
    """man finds the pages, and the shells the completion."""
    assert "ramlock inject" in clean.run("man", "-P", "cat", "1", "ramlock")
    assert "query-ram-minguarantee" in clean.run("man", "-P", "cat", "7", "ramlock-protocol")
    for place in ("share/bash-completion/completions/ramlock", f"{zsh}/_ramlock",
                  "share/fish/vendor_completions.d/ramlock.fish"):  # fmt: skip
        assert (prefix / place).is_file()


def test_the_packages_version_is_the_commands() -> None:
    assert (ROOT / "debian/changelog").read_text().startswith(f"ramlock ({__version__}) ")


@pytest.fixture(scope="module")
def docs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Man pages and completion, as they are made for installing."""
    if not shutil.which("lowdown"):
        absent("lowdown is not here", "lowdown")
    folder = tmp_path_factory.mktemp("docs")
    make("install-docs", f"DESTDIR={folder}", "PREFIX=")
    return folder / "share"


@pytest.mark.parametrize("page", ["man1/ramlock.1", "man7/ramlock-protocol.7"])
def test_man_pages_have_no_faults(docs: Path, need: Need, page: str) -> None:
    need("mandoc", "mandoc")
    need("man", "man-db")
    for command in (["mandoc", "-T", "lint", "-W", "warning"], ["man", "--warnings", "--local-file"]):
        said = subprocess.run(
            [*command, str(docs / "man" / page)], capture_output=True, text=True, timeout=60, check=False
        )
        assert said.returncode == 0, said.stdout
        assert said.stderr == ""
    assert "WARNING" not in said.stdout


def test_the_man_page_has_every_verb_and_option(docs: Path) -> None:
    from ramlock.commands import VERBS

    page = (docs / "man/man1/ramlock.1").read_text()
    for verb in VERBS:
        assert f".SS ramlock {verb}\n" in page
    for word in (r"\fB--hold-budget US\fR", r"\fB--textfile FILE\fR", "EXIT STATUS"):
        assert word in page


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion(docs: Path, need: Need, shell: str) -> None:
    """bash completes for real; of the others the files are read by their shells."""
    need(shell, shell)
    place = {"bash": "bash-completion/completions/ramlock", "zsh": "zsh/site-functions/_ramlock",
             "fish": "fish/vendor_completions.d/ramlock.fish"}[shell]  # fmt: skip
    subprocess.run([shell, "-n", str(docs / place)], check=True, timeout=60)
    if shell != "bash":
        return
    script = (
        f'source "{docs / place}"; COMP_WORDS=(ramlock "$1"); COMP_CWORD=1; _ramlock_completion ramlock "$1" ramlock; '
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    env = {**os.environ, "PATH": f"{ROOT / '.venv/bin'}:{os.environ['PATH']}"}
    said = subprocess.run(
        ["bash", "-c", script, "bash", "l"], env=env, capture_output=True, text=True, timeout=60, check=True
    )
    assert said.stdout.split() == ["list", "locate"]
