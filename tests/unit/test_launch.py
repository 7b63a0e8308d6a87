"""What is checked and changed before ramlock becomes QEMU."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ramlock import launch
from ramlock.errors import CannotPreload, UsageError
from ramlock.launch import Options
from ramlock.sizes import parse_size
from tests.conftest import absent

LIBRARY = Path("/opt/ramlock.so")


def test_the_shim_stands_in_front() -> None:
    assert launch.shim_environ({}, LIBRARY, Options())["LD_PRELOAD"] == str(LIBRARY)
    for before in ("/a.so /b.so", "/a.so:/b.so", f"/a.so:{LIBRARY}:/b.so"):
        environ = launch.shim_environ({"LD_PRELOAD": before}, LIBRARY, Options())
        assert environ["LD_PRELOAD"] == f"{LIBRARY}:/a.so:/b.so"


def test_options_go_into_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    options = Options(parse_size("1G"), "address", False, Path("s"), 1000, 250, 4, follow_discards=True, monitor=True)
    environ = launch.shim_environ({"A": "b"}, LIBRARY, options)
    assert environ == {
        "A": "b",
        "LD_PRELOAD": str(LIBRARY),
        "RAMLOCK_GUARANTEE": f"{1 << 30}B",
        "RAMLOCK_ORDER": "address",
        "RAMLOCK_PREFAULT": "0",
        "RAMLOCK_SOCKET": str(tmp_path / "s"),
        "RAMLOCK_ALLOW_UID": "1000",
        "RAMLOCK_HOLD_BUDGET": "250",
        "RAMLOCK_THREADS": "4",
        "RAMLOCK_FOLLOW_DISCARDS": "1",
        "RAMLOCK_MONITOR": "1",
    }


def test_options_not_given_leave_the_environment() -> None:
    before = {"RAMLOCK_GUARANTEE": "all", "RAMLOCK_PREFAULT": "0B"}
    assert launch.shim_environ(before, LIBRARY, Options()) == {**before, "LD_PRELOAD": str(LIBRARY)}


def test_a_socket_path_that_is_too_long() -> None:
    with pytest.raises(UsageError):
        launch.shim_environ({}, LIBRARY, Options(socket=Path("/" + "x" * 107)))
    launch.shim_environ({}, LIBRARY, Options(socket=Path("/" + "x" * 106)))


def test_finding_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "qemu").touch()
    (tmp_path / "b" / "qemu").chmod(0o755)
    path = f"{tmp_path}/none:{tmp_path}/a:{tmp_path}/b"
    assert launch.resolve("qemu", path) == tmp_path / "b" / "qemu"
    monkeypatch.chdir(tmp_path)
    assert launch.resolve("b/qemu", "") == Path("b/qemu")
    with pytest.raises(CannotPreload, match="no program"):
        launch.resolve("no-such-program", path)
    with pytest.raises(CannotPreload, match="not executable"):
        launch.resolve("a/qemu", path)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody whom a folder is closed to")
def test_a_closed_folder_on_the_way(tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0)
    os.seteuid(65534)
    try:
        assert launch.resolve("sh", f"{tmp_path}/closed:/bin") == Path("/bin/sh")
    finally:
        os.seteuid(0)


@pytest.fixture
def shim(tmp_path: Path) -> Path:
    """A preloadable library that says so."""
    if shutil.which("gcc") is None:
        absent("gcc is not here", "gcc")
    source = tmp_path / "shim.c"
    source.write_text(
        '#include <stdio.h>\n__attribute__((constructor)) static void hello(void) { puts("hello"); fflush(stdout); }\n'
    )
    library = tmp_path / "shim.so"
    subprocess.run(["gcc", "-shared", "-fPIC", "-o", str(library), str(source)], check=True)
    return library


def qemu(folder: Path) -> str:
    """A program that is named as QEMU is, and is a shell."""
    program = folder / "qemu-system-test"
    shutil.copy("/bin/bash", program)
    return str(program)


def run(shim: Path, *words: str, prepare: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    command = [*prepare, sys.executable, "-m", "ramlock", "run", *words]
    environ = {**os.environ, "RAMLOCK_SHIM": str(shim)}
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environ)


def test_a_guarantee_that_cannot_fit(shim: Path, tmp_path: Path) -> None:
    """It is refused before QEMU starts, as by `set`; what is known only later is left to the shim."""
    program = [qemu(tmp_path), "-c", "echo started", "qemu"]
    for size, command in (("1000T", program), ("all", [*program, "-m", "1000T"]), ("50%", [*program, "-m", "1000T"])):
        result = run(shim, "--guarantee", size, "--", *command)
        assert result.returncode == 4, result.stderr
        assert "started" not in result.stdout
        assert "of this host that can be guaranteed" in result.stderr
        assert "--force" in result.stderr
        result = run(shim, "--guarantee", size, "--force", "--", *command)
        assert result.returncode == 0, result.stderr
        assert "started" in result.stdout
    for words in (["-m", "nonsense"], ["-m", "64M"]):
        result = run(shim, "--guarantee", "all", "--", *program, *words)
        assert "started" in result.stdout, result.stderr


def test_the_process_becomes_the_program(shim: Path, tmp_path: Path) -> None:
    script = 'echo $$; trap "" HUP; grep -E "^Sig(Ign|Blk)" /proc/$$/status; ulimit -Sl; ulimit -Hl; echo "$0" "$@"'
    command = [sys.executable, "-m", "ramlock", "run", "--", qemu(tmp_path), "-c", script, "qemu", "-m", "--json", "64"]
    environ = {**os.environ, "RAMLOCK_SHIM": str(shim)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ)
    out, err = process.communicate(timeout=60)
    lines = [line for line in out.splitlines() if line != "hello"]
    assert out.startswith("hello")
    assert int(lines[0]) == process.pid
    ignored = int(lines[2].split()[1], 16)
    sigpipe, sigxfsz = 13, 25
    assert not ignored & (1 << (sigpipe - 1) | 1 << (sigxfsz - 1)), "Python's own dispositions do not stay"
    soft, hard = lines[3:5]
    assert soft == hard
    assert lines[5] == "qemu -m --json 64"
    assert err.startswith("ramlock: ")
    assert "does not export its symbols" in err


def test_without_the_dashes_the_rest_is_still_the_programs(shim: Path, tmp_path: Path) -> None:
    result = run(shim, "--order", "address", qemu(tmp_path), "-c", 'echo "$RAMLOCK_ORDER" "$@"', "--", "--order", "x")
    assert result.stdout.splitlines()[-1] == "address --order x"


def test_python_leaves_no_locale_behind(shim: Path, tmp_path: Path) -> None:
    words = ("--", qemu(tmp_path), "-c", "export -p")
    result = run(shim, *words, prepare=("env", "-i", "PATH=/usr/bin:/bin", f"RAMLOCK_SHIM={shim}"))
    assert "LD_PRELOAD=" in result.stdout
    assert "LC_CTYPE" not in result.stdout


def test_a_limit_that_cannot_suffice(shim: Path, tmp_path: Path) -> None:
    # Without the capabilities in the bounding set, root is bound by the limit as anyone is.
    drop = ("setpriv", "--bounding-set=-ipc_lock,-sys_resource", "--") if os.getuid() == 0 else ()
    if drop and shutil.which("setpriv") is None:
        absent("setpriv is not here", "util-linux")
    limited = (*drop, "bash", "-c", 'ulimit -l 1024 && exec "$@"', "bash")
    program = ("--", qemu(tmp_path), "-c", "true")
    result = run(shim, "--guarantee", "2M", *program, prepare=limited)
    assert result.returncode == 4, result.stderr
    assert "1 MiB is below the guarantee of 2 MiB" in result.stderr
    assert "hello" not in result.stdout
    assert run(shim, "--guarantee", "1M", *program, prepare=limited).returncode == 0
    assert run(shim, "--guarantee", "all", *program, prepare=limited).returncode == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["--guarantee", "5GB", "--", "true"], 2),
        (["--order", "random", "--", "true"], 2),
        (["--unknown", "--", "true"], 2),
        (["--", "no-such-program-here"], 4),
        (["--", __file__], 4),
        (["--", "/etc"], 4),
        (["--", "true"], 4),
        (["--", "/bin/true"], 4),
        (["--", "env", "true"], 4),
    ],
)
def test_refusals(shim: Path, words: list[str], code: int) -> None:
    result = run(shim, *words)
    assert result.returncode == code
    assert result.stdout == ""
    what, hint = result.stderr.splitlines()
    assert what.startswith("ramlock: ")
    assert hint.startswith("hint: ")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_not_left_to_the_next_file(shim: Path, tmp_path: Path, closed: str) -> None:
    """A QEMU without stderr would print its warnings into the first disk image that it opens."""
    seen = tmp_path / "seen"
    look = "readlink /proc/$$/fd/$fd >&9 || echo closed >&9"
    script = f'unset LD_PRELOAD; exec 9>"{seen}"; for fd in 0 1 2 3 4; do {look}; done'
    command = [sys.executable, "-m", "ramlock", "run", "--", qemu(tmp_path), "-c", script]
    shell = ["bash", "-c", f'"$@" {closed}', "bash", *command]
    environ = {**os.environ, "RAMLOCK_SHIM": str(shim)}
    subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=True, env=environ)
    streams = seen.read_text().splitlines()
    for number, word in enumerate(("<&-", ">&-", "2>&-")):
        if word in closed.split():
            assert streams[number] == os.devnull
    assert streams[3:] == ["closed", "closed"], "nothing that ramlock opened stays"


def test_a_program_that_only_starts_qemu(shim: Path, tmp_path: Path) -> None:
    result = run(shim, "--", "env", qemu(tmp_path), "-c", "echo started")
    assert result.returncode == 4
    assert "is no QEMU system emulator" in result.stderr
    assert "ramlock run -- qemu-system-x86_64" in result.stderr
    assert result.stdout == ""


def test_qemu_by_another_name(shim: Path, tmp_path: Path) -> None:
    """A link to it has its name, and what exports its symbols is one whatever it is called."""
    link = tmp_path / "vm"
    link.symlink_to(qemu(tmp_path))
    result = run(shim, "--", str(link), "-c", "echo started")
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "started")
    assert "does not export its symbols" in result.stderr
    source = tmp_path / "vm.c"
    source.write_text(
        '#include <stdio.h>\nint ram_list[4];\nint main(void) { return ram_list[0] + puts("started") < 0; }\n'
    )
    program = tmp_path / "my-own-build"
    subprocess.run(["gcc", "-rdynamic", "-o", str(program), str(source)], check=True)
    result = run(shim, "--", str(program))
    assert (result.returncode, result.stdout.splitlines()[-1]) == (0, "started")
