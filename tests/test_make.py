"""The Makefile keeps its promises: explained, quick when there is nothing to do, honest about what is missing."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.qemu.guest import MIB, Guest

ROOT = Path(__file__).resolve().parents[1]


def make(*words: str, timeout: float = 180) -> subprocess.CompletedProcess[str]:
    """Runs make as from a shell, though these tests are run by make themselves."""
    env = {name: value for name, value in os.environ.items() if name not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    return subprocess.run(
        ["make", "-C", str(ROOT), *words], env=env, capture_output=True, text=True, timeout=timeout, check=True
    )


def test_help_explains_every_target() -> None:
    said = make("help").stdout
    for target in (
        "all",
        "bench",
        "deb",
        "dist",
        "wheel",
        "clean",
        "demo",
        "demo-pressure",
        "deps",
        "distclean",
        "facts",
        "guest",
        "install",
        "lint",
        "shim",
        "stress",
    ):
        assert re.search(rf"^  {target} +\S", said, re.MULTILINE), target
    assert re.search(r"^  test +\S", said, re.MULTILINE)


def test_nothing_is_done_twice() -> None:
    make()
    shim = ROOT / "injector/ramlock/ramlock.so"
    before = shim.stat().st_mtime_ns
    again = make()
    assert "gcc" not in again.stdout
    assert "installing" not in again.stdout + again.stderr
    assert shim.stat().st_mtime_ns == before


def test_install_works_where_it_is_put(tmp_path: Path) -> None:
    prefix = tmp_path / "prefix"
    make("install", f"PREFIX={prefix}")
    command = prefix / "bin/ramlock"
    assert (prefix / "lib/ramlock/ramlock.so").is_file()
    env = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    said = subprocess.run([str(command), "--version"], env=env, capture_output=True, text=True, timeout=60, check=True)
    assert "ramlock" in said.stdout
    # What it starts has its own shim, not this tree's.
    with Guest(how="plain", prepare=[str(command), "run", "--"], memory=64 * MIB) as guest:
        guest.query()
        assert str(prefix / "lib/ramlock/ramlock.so") in Path(f"/proc/{guest.pid}/maps").read_text()


def test_install_for_packagers(tmp_path: Path) -> None:
    make("install", f"DESTDIR={tmp_path}", "PREFIX=/opt/ramlock")
    assert (tmp_path / "opt/ramlock/lib/ramlock/ramlock.so").is_file()
    launcher = (tmp_path / "opt/ramlock/bin/ramlock").read_text()
    assert str(tmp_path) not in launcher
    # Nothing tells where it was built or put, so that it runs from PREFIX.
    for file in (path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()):
        content = file.read_bytes()
        assert os.fsencode(ROOT) not in content, file
        assert os.fsencode(tmp_path) not in content, file


def test_missing_things_are_named(tmp_path: Path) -> None:
    """On a machine without apt it says what to install, and stops."""
    for tool in ("bash", "grep", "env", "id", "cat", "gcc", "make", "pkg-config", "ldd"):
        if place := shutil.which(tool):
            (tmp_path / tool).symlink_to(place)
    result = subprocess.run(
        [str(ROOT / ".ci/deps"), "all"],
        env={"PATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 1
    for package in ("qemu-system-x86", "socat", "busybox-static", "cpio"):
        assert package in result.stderr


@pytest.mark.parametrize("script", [".ci/deps", ".ci/promtool", ".ci/run", "tests/guest/build", "tests/packaging/root"])
def test_scripts_parse(script: str) -> None:
    subprocess.run(["bash", "-n", str(ROOT / script)], check=True, timeout=60)
