"""The command line: output, exit codes, two lines for every failure."""
# SPDX-License-Identifier: GPL-2.0-or-later

import fcntl
import importlib
import json
import os
import pty
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from ramlock import __version__, commands
from ramlock.commands import status
from ramlock.reply import parse
from tests.unit.conftest import Serve, Shim, reply

GIB = 1 << 30
RAMLOCK = [sys.executable, "-m", "ramlock"]


class Result:
    """What a command did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    def failed(self, code: int, *says: str) -> None:
        """It failed so, and said so in two lines."""
        assert self.code == code, self.err
        what, hint = self.err.splitlines()
        assert what.startswith("ramlock: ")
        assert hint.startswith("hint: ")
        for text in says:
            assert text in self.err


class Run:
    """Runs the command line in this process."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd

    def __call__(self, *words: object) -> Result:
        self.capfd.readouterr()
        code = commands._run([str(word) for word in words])
        return Result(code, *self.capfd.readouterr())


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    # What the tests after these start would have the low priority, too.
    monkeypatch.setattr(commands, "give_way", lambda: None)
    return Run(capfd)


def test_help_and_version(run: Run) -> None:
    result = run("--help")
    assert result.code == 0
    assert "ramlock set 3G --vm web" in result.out
    assert run("--version").out == f"ramlock {__version__}\n"
    nothing = run()
    assert nothing.code == 2
    assert nothing.out == ""
    assert "Usage:" in nothing.err


@pytest.mark.parametrize("verb", commands.VERBS)
def test_every_verb_has_the_help_that_the_list_says(run: Run, verb: str) -> None:
    module = importlib.import_module(f"ramlock.commands.{verb}")
    assert module.command.help.splitlines()[0] == commands.VERBS[verb]
    result = run(verb, "--help")
    assert result.code == 0
    assert f"ramlock {verb} " in result.out


def test_every_module_is_a_verb() -> None:
    modules = {path.stem for path in Path(commands.__path__[0]).glob("*.py")}
    assert modules == {*commands.VERBS, "__init__", "common", "screen"}


def test_help_loads_no_verb() -> None:
    code = (
        "import sys; from ramlock import commands; commands._run(['--help'])\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('rich', 'elftools', 'asyncio')])\n"
        "print([name for name in sys.modules if name.startswith('ramlock.commands.')])\n"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.splitlines()[-2:] == ["[]", "[]"]


def test_ctrl_c_while_libraries_are_loaded(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("import time\nprint('loading', flush=True)\ntime.sleep(60)\n")
    command = [sys.executable, "-m", "ramlock", "status"]
    environ = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "loading\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines() == ["ramlock: interrupted before anything was changed", "hint: run it again"]


def test_status_loads_neither_rich_nor_elftools(serve: Serve) -> None:
    code = (
        "import sys; from ramlock import commands; commands._run(['status', '--socket', sys.argv[1]])\n"
        "print([name for name in sys.modules if name.split('.')[0] in ('rich', 'elftools', 'asyncio')])\n"
    )
    command = [sys.executable, "-c", code, str(serve(Shim()))]
    out = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    assert out.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["set"],
        ["set", "1G"],
        ["set", "1G", "--pid", "1", "--vm", "x"],
        ["set", "-1", "--pid", "1"],
        ["set", "--pid", "1", "--", "-1"],
        ["set", "--pid", "1", "--", "abc"],
        ["set", "--pid", "1", "10" * 30],
        ["set", "1G", "--pid", "0"],
        ["set", "1G", "--pid", "-5"],
        ["set", "1G", "--pid", "99999999999"],
        ["set", "1G", "--pid", "x"],
        ["set", "1G", "--pid", "1", "--timeout", "0"],
        ["set", "1G", "--pid", "1", "--timeout", "-1"],
        ["set", "1G", "--pid", "1", "--timeout", "nan"],
        ["set", "1G", "--pid", "1", "--timeout", "inf"],
        ["set", "1G", "--pid", "1", "--order", "random"],
        ["status"],
        ["status", "--json"],
        ["status", "surplus", "--pid", "1"],
        ["run"],
        ["run", "--socket", "", "--", "no-such-program"],
        ["set", "1G", "--socket", ""],
        ["set", "1G", "--socket", "", "--pid", "1"],
        ["status", "--socket", ""],
    ],
    ids=" ".join,
)
def test_usage(run: Run, words: list[str]) -> None:
    run(*words).failed(2)


def test_not_found(run: Run, tmp_path: Path) -> None:
    run("status", "--vm", "no-such-vm\x1b[2J").failed(6, "no-such-vm\\x1b[2J")
    run("status", "--pid", os.getpid()).failed(6)
    run("status", "--pid", 2**31 - 1).failed(6)
    run("set", "1G", "--socket", tmp_path / "nothing").failed(6)


def said(raw: dict[str, object]) -> dict[str, object]:
    """What --json prints of a reply: also which process it is, here this one."""
    return {**raw, "pid": os.getpid(), "name": None, "uuid": None}


def test_status_for_programs(run: Run, serve: Serve) -> None:
    raw = reply(requested=GIB, new_member=[1, {"a": None}])
    result = run("status", "--socket", serve(Shim(raw)), "--json")
    assert (result.code, result.err) == (0, "")
    assert json.loads(result.out) == said(raw)
    assert result.out.count("\n") == 1


def test_status_for_people(run: Run, serve: Serve) -> None:
    result = run("status", "--socket", serve(Shim(reply(requested=GIB, locked=GIB // 2, state="locking", eta_s=3))))
    assert (result.code, result.err) == (0, "")
    assert "1 GiB of 2 GiB guest RAM" in result.out
    assert "512 MiB" in result.out
    assert "50 %" in result.out
    assert "3 s left" in result.out
    assert "pc.ram" in result.out
    assert "\x1b" not in result.out


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "nothing guaranteed"),
        ({"requested": GIB, "locked": GIB}, "held"),
        ({"requested": GIB, "locked": GIB - 1}, "99 %"),
        ({"requested": GIB, "all": True}, "1 GiB (all) of 2 GiB"),
        ({"armed": 4096}, "armed"),
        ({"foreign": 4096}, "foreign"),
        ({"memlock_limit": 8 << 20}, "8 MiB (RLIMIT_MEMLOCK)"),
        ({"state": "unlocking", "rate": GIB}, "unlocking at 1 GiB/s"),
        ({"state": "short", "short": {"reason": "cgroup", "desc": "full"}}, "short: full"),
        ({"state": "waiting", "waiting": {"reason": "starting", "desc": ""}}, "waiting: starting"),
        ({"state": "waiting"}, "waiting"),
        (
            {"launch_error": "4 GiB is more than guest RAM"},
            "at launch     \x1b[31mnot set: 4 GiB is more than guest RAM",
        ),
        ({"prefault": False}, "on fault"),
        ({"blocks": []}, "state"),
    ],
    ids=str,
)
def test_what_status_says(changes: dict[str, object], says: str) -> None:
    assert says in "\n".join(status.lines(parse(reply(**changes))))


def test_set(run: Run, serve: Serve) -> None:
    shim = Shim(reply(), reply(generation=1, requested=GIB, state="locking"), reply(generation=1, requested=GIB))
    how = ("--order", "address", "--no-prefault", "--hold-budget", "250", "--threads", "2", "--host-reserve", "3G")
    result = run("set", "50%", "--socket", serve(shim), *how)
    assert result.code == 0
    assert "1 GiB guaranteed" in result.out
    assert result.err == ""
    assert shim.arguments() == {
        "size": GIB,
        "order": "address",
        "prefault": False,
        "hold-budget": 250,
        "threads": 2,
        "host-reserve": 3 * GIB,
    }


def test_set_for_programs(run: Run, serve: Serve) -> None:
    end = reply(generation=1, requested=GIB, locked=GIB)
    result = run("set", "1G", "--socket", serve(Shim(reply(), end)), "--json")
    assert (result.code, json.loads(result.out)) == (0, said(end))


def test_set_without_waiting(run: Run, serve: Serve) -> None:
    shim = Shim(reply(), reply(generation=1, requested=GIB, state="locking"))
    assert run("set", "1G", "--socket", serve(shim), "--no-wait").code == 0
    assert [seen["execute"] for seen in shim.seen[-2:]] == ["set_ram_minguarantee", "query-ram-minguarantee"]


def test_set_that_stays_short_says_so_and_still_prints_the_reply(run: Run, serve: Serve) -> None:
    short = reply(generation=1, requested=GIB, state="short", short={"reason": "cgroup", "desc": "the cgroup is full"})
    result = run("set", "1G", "--socket", serve(Shim(reply(), short)), "--json")
    result.failed(5, "the cgroup is full")
    assert json.loads(result.out) == said(short)


def test_set_that_times_out(run: Run, serve: Serve) -> None:
    locking = reply(generation=1, requested=GIB, state="locking")
    result = run("set", "1G", "--socket", serve(Shim(reply(), locking)), "--json", "--timeout", "0.3")
    result.failed(3, "the guarantee stays set")
    assert json.loads(result.out) == said(locking)


def test_set_that_is_refused(run: Run, serve: Serve) -> None:
    run("set", "4G", "--socket", serve(Shim(refuse="[range] x"))).failed(4, "4 GiB", "2 GiB")


def test_interrupted(serve: Serve) -> None:
    shim = Shim(reply(), reply(generation=1, requested=GIB, state="locking"))
    path = serve(shim)
    process = subprocess.Popen(
        [*RAMLOCK, "set", "1G", "--socket", path, "--force"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    end = time.monotonic() + 30
    while len(shim.seen) < 5 and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    Result(process.returncode, out, err).failed(130, "the guarantee is set and stays at 1 GiB")


@pytest.mark.parametrize("form", [[], ["--json"], ["--no-wait"]], ids=str)
def test_interrupted_while_it_prints(serve: Serve, form: list[str]) -> None:
    """Then the guarantee is set, and the end is not waited for."""
    shim = Shim(reply(), reply(generation=1, requested=GIB))
    read, write = os.pipe()
    try:
        os.set_blocking(write, False)
        with suppress(BlockingIOError):
            while True:
                os.write(write, b"x" * 4096)
        os.set_blocking(write, True)
        command = [*RAMLOCK, "set", "1G", "--socket", str(serve(shim)), *form]
        process = subprocess.Popen(command, stdout=write, stderr=subprocess.PIPE, text=True)
        end = time.monotonic() + 30
        while "pipe_write" not in Path(f"/proc/{process.pid}/wchan").read_text() and time.monotonic() < end:
            if len(shim.seen) >= 4 and time.monotonic() > end - 28:
                break  # a kernel that does not say where a process waits
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=30)
    finally:
        os.close(read)
        os.close(write)
    Result(process.returncode, "", err).failed(130, "the guarantee is set and stays at 1 GiB")


def test_a_reader_that_has_seen_enough(serve: Serve) -> None:
    read, write = os.pipe()
    os.close(read)
    command = [*RAMLOCK, "status", "--socket", str(serve(Shim()))]
    result = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    os.close(write)
    assert (result.returncode, result.stderr) == (1, "")


def test_a_full_disk(serve: Serve) -> None:
    command = [*RAMLOCK, "status", "--socket", str(serve(Shim()))]
    with Path("/dev/full").open("w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60, check=False)
    Result(result.returncode, "", result.stderr).failed(1, "No space left")


def test_a_fault_of_our_own(run: Run, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(now: object) -> list[str]:
        raise ZeroDivisionError("oops")

    monkeypatch.setattr(status, "lines", broken)
    path = serve(Shim())
    run("status", "--socket", path).failed(1, "unexpected ZeroDivisionError: oops", "RAMLOCK_DEBUG")
    monkeypatch.setenv("RAMLOCK_DEBUG", "1")
    assert "Traceback" in run("status", "--socket", path).err


def on_a_terminal(words: list[str], **environ: str) -> str:
    """What a command writes when stdout and stderr are a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, 0x5414, b"\x18\x00\x64\x00\x00\x00\x00\x00")  # TIOCSWINSZ: 24 lines of 100
    with os.fdopen(ours, "rb", buffering=0) as screen:
        clean = {key: value for key, value in os.environ.items() if key != "NO_COLOR"}
        process = subprocess.Popen(
            [*RAMLOCK, *words], stdout=theirs, stderr=theirs, env={**clean, "TERM": "xterm", **environ}
        )
        os.close(theirs)
        shown = b""
        try:
            while data := screen.read(65536):
                shown += data
        except OSError:
            pass  # a terminal that nobody has open any more
        process.wait(60)
    return shown.decode()


def test_colours_only_when_wanted(serve: Serve) -> None:
    path = str(serve(Shim()))
    assert "\x1b[" in on_a_terminal(["status", "--socket", path])
    assert "\x1b[" not in on_a_terminal(["status", "--socket", path], NO_COLOR="1")
    assert "\x1b[" in on_a_terminal(["status", "--socket", path + "x"])
    assert "\x1b[" not in on_a_terminal(["status", "--socket", path + "x"], NO_COLOR="1")


def test_a_bar_on_a_terminal(serve: Serve) -> None:
    steps = [reply(generation=1, requested=GIB, state="locking", locked=share * GIB // 4) for share in range(4)]
    shim = Shim(reply(), *steps, reply(generation=1, requested=GIB, locked=GIB), events=("SOMETHING",) * 4)
    shown = on_a_terminal(["set", "1G", "--socket", str(serve(shim))])
    assert "512 MiB of 1 GiB" in shown
    assert "━" in shown
    assert "1 GiB guaranteed, 1 GiB locked" in shown


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("words", [("set", "1G"), ("status",), ("status", "--json")], ids=" ".join)
def test_closed_streams(serve: Serve, closed: str, words: tuple[str, ...]) -> None:
    """What was asked is done; what cannot be said is not said, and nothing of ours takes the stream's number."""
    shim = Shim(reply(), reply(generation=1, requested=GIB)) if words[0] == "set" else Shim()
    command = [*RAMLOCK, *words, "--socket", str(serve(shim))]
    shell = ["bash", "-c", f'"$@" {closed}', "bash", *command]
    result = subprocess.run(shell, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    assert bool(result.stdout) is (">&-" not in closed.split())
    assert len(shim.seen) == (4 if words[0] == "set" else 2)


def test_a_failure_with_closed_streams_still_has_its_exit_code(tmp_path: Path) -> None:
    shell = ["bash", "-c", '"$@" >&- 2>&-', "bash", *RAMLOCK, "status", "--socket", str(tmp_path / "nothing")]
    assert subprocess.run(shell, timeout=60, check=False).returncode == 6


@pytest.mark.parametrize(
    ("encoding", "bar"), [("latin-1", "###"), ("ascii", "###"), ("utf-8", "███"), ("utf-8:strict", "███")]
)
def test_a_stdout_that_knows_few_characters(serve: Serve, encoding: str, bar: str) -> None:
    command = [*RAMLOCK, "status", "--socket", str(serve(Shim(reply(requested=GIB, locked=GIB // 2))))]
    environ = {**os.environ, "PYTHONIOENCODING": encoding}
    result = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environ)
    assert (result.returncode, result.stderr) == (0, b"")
    assert bar in result.stdout.decode()


def test_a_name_that_stdout_cannot_say(serve: Serve) -> None:
    command = [*RAMLOCK, "status", "--socket", str(serve(Shim(reply(order="größe ␀"))))]
    environ = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(command, capture_output=True, timeout=60, check=False, env=environ)
    assert (result.returncode, result.stderr) == (0, b"")
    assert "größe ?" in result.stdout.decode("latin-1")


@pytest.mark.parametrize("silent_from", range(5))
def test_a_timeout_bounds_the_whole_command(run: Run, serve: Serve, silent_from: int) -> None:
    """Whatever the shim stops to answer, be it as early as the greeting."""
    shim = Shim(reply(), reply(generation=1, requested=GIB, state="locking"), silent_from=silent_from)
    start = time.monotonic()
    result = run("set", "1G", "--socket", serve(shim), "--timeout", "0.5", "--json")
    assert time.monotonic() - start < 4
    if silent_from < 4:
        result.failed(1, "does not answer")
    else:
        result.failed(3, "the guarantee is set")


def test_a_timeout_bounds_connecting(run: Run, tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server, socket.socket(socket.AF_UNIX) as waiting:
        server.bind(str(tmp_path / "full"))
        server.listen(0)
        waiting.connect(str(tmp_path / "full"))
        start = time.monotonic()
        run("set", "1G", "--socket", tmp_path / "full", "--timeout", "0.5").failed(1, "does not answer")
        assert time.monotonic() - start < 4


def test_a_timeout_bounds_the_last_look(run: Run, serve: Serve) -> None:
    """A VM that is stopped while it is waited for."""
    locking = reply(generation=1, requested=GIB, state="locking")
    start = time.monotonic()
    result = run("set", "1G", "--socket", serve(Shim(reply(), locking, silent_from=5)), "--timeout", "0.5", "--json")
    assert time.monotonic() - start < 4
    result.failed(3, "the guarantee stays set")


@pytest.mark.parametrize("verb", commands.VERBS)
def test_help_teaches_by_examples(run: Run, verb: str) -> None:
    said = run(verb, "--help")
    assert said.code == 0
    examples = said.out.split("Examples:", 1)[1]
    assert f"  ramlock {verb}" in examples
