"""A module imports only from the floors below it, and one module alone knows each foreign library."""
# SPDX-License-Identifier: GPL-2.0-or-later

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

TOP = Path(__file__).parents[2]
PACKAGE = TOP / "injector" / "ramlock"
SHIM = TOP / "shim"
ARCHITECTURE = (TOP / "docs" / "architecture.md").read_text()
FLOORS = [
    {"errors", "notify", "streams", "text", "teststeps"},
    {"deadline", "evictable", "sizes"},
    {"procfs", "confined", "elf", "control", "policy", "reply", "shim", "tracee"},
    {"host", "cgroups", "inside", "memory", "priority", "qom", "rights", "x86_64"},
    {"endpoint", "guestram", "kernel", "loaded", "room"},
    {"qemuargs"},
    {"launch", "guarantee", "detour", "place", "road", "ramlist"},
    {"admission", "vms", "inject", "kept", "memfd", "mapsource"},
    {"locate"},
    {"eject", "monitor", "preflight", "tell"},
    {"doctor", "install", "survey"},
    {"api", "metrics"},
    {"reconcile"},
    {"daemon"},
    {"commands"},
    {"__main__"},
]
FOREIGN = {
    "elftools": {"elf"},
    "ptrace": {"tracee"},
    "prometheus_client": {"metrics"},
    "click": {"commands"},
    "rich": {"commands"},
}

MODULES = sorted(PACKAGE.rglob("*.py"))


def module(path: Path) -> str:
    """The name under which the floors know a file: commands are one."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def floor(name: str) -> int:
    return next(number for number, names in enumerate(FLOORS) if name in names)


def imports(path: Path) -> Iterator[str]:
    """All dotted names that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from ramlock import vms` imports the module, `from ramlock.vms import session` something in it.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_imports_only_from_the_floors_below(path: Path) -> None:
    own = module(path)
    if own == "__init__":  # what it offers is loaded when it is used
        return
    for name in imports(path):
        top, _, rest = name.partition(".")
        if top != "ramlock":
            continue
        other = rest.partition(".")[0]
        if other == own or other == "__version__":
            continue
        assert floor(other) < floor(own), f"{own} (floor {floor(own)}) imports {other} (floor {floor(other)})"


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_foreign_libraries_have_one_importer(path: Path) -> None:
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "ramlock" or top in sys.stdlib_module_names:
            continue
        assert module(path) in FOREIGN.get(top, set()), f"{module(path)} imports {top}"


def test_importing_the_package_loads_nothing() -> None:
    code = "import sys; before = set(sys.modules); import ramlock; print(sorted(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.strip() == "['ramlock']"


def test_every_module_has_a_floor() -> None:
    assert {module(path) for path in MODULES} - {"__init__"} == set().union(*FLOORS)


def test_the_architecture_page_has_every_module_on_its_floor() -> None:
    rows = re.findall(r"^\| (\d+) \| (.*) \|$", ARCHITECTURE, re.MULTILINE)
    table = {int(number): set(re.findall(r"`(\w+)(?:\.py|/)`", text)) for number, text in rows}
    assert table == {number: names for number, names in enumerate(FLOORS) if names != {"__main__"}}


def test_the_architecture_page_has_every_file_of_the_shim() -> None:
    table = ARCHITECTURE[ARCHITECTURE.index("## The shim") : ARCHITECTURE.index("### Life of a preloaded shim")]
    named = set()
    for name, suffix in re.findall(r"`(\w+)\.(\[ch\]|c|h|S)`", table):
        named |= {f"{name}.c", f"{name}.h"} if suffix == "[ch]" else {f"{name}.{suffix}"}
    assert named == {path.name for path in SHIM.iterdir() if path.suffix in (".c", ".h", ".S")}
