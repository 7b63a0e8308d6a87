"""Injection into real QEMUs that run: every kind of them, killed at every step, again and again."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from ramlock import __version__, eject, guarantee, guestram, install, kept, loaded, locate, memory, procfs, tell
from ramlock.commands.inject import command
from ramlock.deadline import Deadline
from ramlock.errors import CannotInject, CommandError, ControlError, GuestRamMismatch, NotFound, Refused, Short
from ramlock.teststeps import STEPS
from tests.conftest import Need
from tests.qemu import truth
from tests.qemu.conftest import assert_holds, assert_refused, ramlock
from tests.qemu.guest import MIB, ROOT, SHIM, Guest

pytestmark = pytest.mark.usefixtures("lockable", "root")

SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
NOBODY = 65534
SIZE = 6 * MIB
"""A guarantee that fits into the usual limit of those who are not root."""
HIDE = ("unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {ROOT}/injector && exec "$@"', "sh")
"""Puts QEMU into a mount namespace where the shim's file does not exist."""


def inject(guest: Guest, *args: object, env: dict[str, str] | None = None) -> dict[str, Any]:
    """Injects, and returns what was printed."""
    result = ramlock("inject", "--pid", guest.pid, "--json", *args, env=env)
    assert result.returncode == 0, result.stderr
    reply: dict[str, Any] = json.loads(result.stdout)
    return reply


def shim_threads(guest: Guest) -> list[str]:
    """The names of ramlock's threads in QEMU."""
    names = [path.read_text().strip() for path in Path(f"/proc/{guest.pid}/task").glob("*/comm")]
    return sorted(name for name in names if name.startswith("ramlock"))


def requested(guest: Guest) -> int:
    result = ramlock("status", "--pid", guest.pid, "--json")
    assert result.returncode == 0, result.stderr
    return int(json.loads(result.stdout)["requested"])


def check_injected(guest: Guest, *, running: bool = True) -> dict[str, Any]:
    """The shim comes, locks what it is told, and is found again; the VM answers all the while."""
    reply = inject(guest, "--guarantee", SIZE)
    assert not reply["already"]
    assert reply["version"] == __version__
    assert reply["source"] == "qemu"
    assert reply["attempts"] >= 1
    assert 0 < reply["stopped-us"] < 10_000_000
    assert reply["traced-us"] > 0
    assert SIZE <= truth.locked(guest.pid).resident <= SIZE + 4 * MIB
    assert Path(reply["socket"]).is_socket()
    assert reply["guarantee"]["requested"] == requested(guest) == SIZE
    assert inject(guest)["already"]
    if running:
        guest.check_unharmed()
    else:
        assert guest.monitor.execute("query-status")["running"] is False
    return reply


@pytest.mark.parametrize(
    "args",
    [[], ["-sandbox", SANDBOX], ["-daemonize"], ["-runas", "nobody"], ["-smp", "16"]],
    ids=["plain", "sandbox", "daemonize", "runas", "many-vcpus"],
)
def test_inject(args: Sequence[str]) -> None:
    with Guest(how="plain", args=args) as guest:
        check_injected(guest)


def test_a_booted_guest_in_a_sandbox() -> None:
    """Its memory is what it was, and it is guaranteed what was asked for."""
    with Guest(how="plain", boot=True, args=["-sandbox", SANDBOX, "-smp", "4"]) as guest:
        guest.agent.ask(f"touch {64 * MIB}")
        inject(guest, "--guarantee", "96M")
        assert_holds(guest, 96 * MIB)
        assert ramlock("set", "32M", "--pid", guest.pid).returncode == 0
        assert_holds(guest, 32 * MIB)
        guest.agent.ask("verify")
        guest.check_unharmed()


def test_another_user() -> None:
    with Guest(how="plain", user=NOBODY) as guest:
        reply = check_injected(guest)
        folder = Path(f"/run/ramlock/{guest.pid}")
        assert (folder.stat().st_uid, folder.stat().st_mode & 0o777) == (NOBODY, 0o700)
        assert Path(reply["socket"]).resolve() == folder / "sock"


def test_another_mount_namespace() -> None:
    """The shim comes by a memory file, and the next one by the same."""
    with Guest(how="plain", prepare=HIDE) as guest:
        assert guest.pid
        check_injected(guest)
        files = [os.readlink(fd) for fd in Path(f"/proc/{guest.pid}/fd").iterdir()]
        assert len([name for name in files if name.startswith("/memfd:ramlock-")]) == 1
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        check_injected(guest)
        files = [os.readlink(fd) for fd in Path(f"/proc/{guest.pid}/fd").iterdir()]
        assert len([name for name in files if name.startswith("/memfd:ramlock-")]) == 1


def test_another_user_in_another_mount_namespace() -> None:
    drop = ("setpriv", "--reuid", str(NOBODY), "--regid", str(NOBODY), "--clear-groups")
    guest = Guest(how="plain", prepare=(*HIDE, *drop))
    os.chown(guest.directory, NOBODY, NOBODY)
    with guest:
        check_injected(guest)


def test_a_file_that_the_user_may_not_read(tmp_path: Path) -> None:
    """Other doors are not needed: the memory file is the user's own."""
    shim = tmp_path / "ramlock.so"
    shim.write_bytes(SHIM.read_bytes())
    shim.chmod(0o600)
    with Guest(how="plain", user=NOBODY) as guest:
        assert not inject(guest, env={"RAMLOCK_SHIM": str(shim)})["already"]
        guest.check_unharmed()


def test_chroot_without_proc(tmp_path: Path) -> None:
    with Guest(how="plain", args=["-chroot", str(tmp_path)]) as guest:
        result = ramlock("inject", "--pid", guest.pid)
        assert_refused(result, 4)
        assert "/proc is not mounted" in result.stderr
        guest.check_unharmed()
        assert list(tmp_path.iterdir()) == []


def test_chroot_with_proc(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    mount = ("unshare", "--mount", "sh", "-c", f'mount -t proc proc {tmp_path}/proc && exec "$@"', "sh")
    with Guest(how="plain", args=["-chroot", str(tmp_path)], prepare=mount) as guest:
        reply = inject(guest)
        assert Path(reply["socket"]).is_socket()
        assert (tmp_path / f"run/ramlock/{guest.pid}/sock").is_socket()
        assert requested(guest) == 0
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        assert not (tmp_path / f"run/ramlock/{guest.pid}").exists()
        guest.check_unharmed()


class Inner(Guest):
    """A QEMU in a pid namespace of its own: its pid file says 1, which is nobody of ours."""

    def __init__(self) -> None:
        super().__init__(how="plain", prepare=("unshare", "--pid", "--fork", "--kill-child"))

    def start(self) -> None:
        super().start()
        assert self._process is not None
        unshare = self._process.pid
        (child,) = Path(f"/proc/{unshare}/task/{unshare}/children").read_text().split()
        self.pid = int(child)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait(30)


def test_a_pid_namespace(need: Need) -> None:
    """QEMU knows itself by another pid; its socket is named by ours."""
    need("unshare", "util-linux")
    with Inner() as guest:
        check_injected(guest)
        assert Path(f"/run/ramlock/{guest.pid}/sock").is_socket()
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        guest.check_unharmed()


def test_a_stopped_vm() -> None:
    with Guest(how="plain") as guest:
        guest.monitor.execute("stop")
        check_injected(guest, running=False)
        guest.monitor.execute("cont")
        guest.check_unharmed()


def test_incoming_migration() -> None:
    with Guest(how="plain", args=["-incoming", "defer"]) as guest:
        check_injected(guest, running=False)


def test_before_the_machine_is_configured() -> None:
    with Guest(how="plain", args=["-preconfig"]) as guest:
        assert inject(guest)["source"] == "none"
        guest.monitor.execute("x-exit-preconfig")
        assert inject(guest, "--guarantee", SIZE)["source"] == "qemu"
        assert_holds(guest, SIZE)


def test_by_name_and_for_people() -> None:
    with Guest(how="plain", args=["-name", "inject-me"]) as guest:
        result = ramlock("inject", "--vm", "inject-me", "--guarantee", SIZE)
        assert result.returncode == 0, result.stderr
        assert "main thread was away for" in result.stdout
        assert f"/run/ramlock/{guest.pid}.sock" in result.stdout
        assert "6 MiB locked" in result.stdout
        result = ramlock("inject", "--vm", "inject-me")
        assert f"ramlock {__version__} is in it already" in result.stdout


def test_what_is_short_is_told_with_what_was_done(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shim is in, and where its socket is does not get lost."""

    def never(session: Any, wish: Any, *_: object, **__: object) -> None:
        error = Short("little of it can be locked now", "free memory")
        error.guarantee = guarantee.query(session.vm.client, Deadline(10))
        raise error

    with Guest(how="plain") as guest:
        monkeypatch.setattr("ramlock.commands.set.place_and_follow", never)
        with pytest.raises(Short):
            command.main(["--pid", str(guest.pid), "--guarantee", "6M", "--json"], standalone_mode=False)
        reply = json.loads(capsys.readouterr().out)
        assert Path(reply["socket"]).is_socket()
        assert reply["guarantee"]["requested"] == 0
        with pytest.raises(Short):
            command.main(["--pid", str(guest.pid), "--guarantee", "6M"], standalone_mode=False)
        assert "is in it already" in capsys.readouterr().out
        guest.check_unharmed()


def test_a_socket_elsewhere(tmp_path: Path) -> None:
    place = tmp_path / "here.sock"
    with Guest(how="plain") as guest:
        inject(guest, "--socket", str(place), "--allow-uid", "4711")
        assert place.is_socket()
        assert requested(guest) == 0  # found without being told
        assert inject(guest)["already"]
        assert ramlock("status", "--socket", place).returncode == 0
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        assert not place.exists()
        assert not Path(f"/run/ramlock/{guest.pid}.sock").is_symlink()


@pytest.mark.parametrize("place", ["relative.sock", "/" + "x" * 200])
def test_a_socket_that_cannot_be(place: str) -> None:
    with Guest(how="plain") as guest:
        assert_refused(ramlock("inject", "--pid", guest.pid, "--socket", place), 4)
        assert not shim_threads(guest)


def test_after_run_it_is_there_already() -> None:
    with Guest() as guest:
        assert inject(guest)["already"]
        assert_refused(ramlock("inject", "--pid", guest.pid, "--guarantee", "100G"), 4)
        guest.check_unharmed()


def killed_at(guest: Guest, step: str, *args: object) -> None:
    """Injects, and is killed at `step`; the VM must not notice."""
    result = ramlock(
        "inject", "--pid", guest.pid, "--guarantee", SIZE, *args, env={"RAMLOCK_TEST_KILL_AT": step}, timeout=60
    )
    assert result.returncode == -signal.SIGKILL, f"{step} was never passed: {result.stdout}{result.stderr}"
    guest.check_unharmed()


def check_next(guest: Guest) -> None:
    """The next injection succeeds, and everything can be taken back."""
    inject(guest, "--guarantee", SIZE)
    assert requested(guest) == SIZE
    result = ramlock("eject", "--pid", guest.pid)
    assert result.returncode == 0, result.stderr
    assert truth.vm_lck(guest.pid) == 0
    guest.check_unharmed()


def listed(step: str) -> bool:
    return not step.startswith(("fill-memfd", "hand-over", "adopt"))


def test_the_steps_are_listed() -> None:
    assert ramlock("inject", "--list-steps").stdout.split() == list(STEPS)


def test_killed_at_every_step() -> None:
    with Guest(how="plain") as guest:
        for step in filter(listed, STEPS):
            killed_at(guest, step)
            check_next(guest)


def test_killed_at_every_step_with_a_memory_file() -> None:
    for only in ("begin", "ptrace-setregs-done", "fill-memfd", "fill-memfd-done"):
        with Guest(how="plain", prepare=HIDE) as guest:
            killed_at(guest, only)
            check_next(guest)
    with Guest(how="plain", prepare=HIDE) as guest:
        for step in filter(listed, STEPS):
            killed_at(guest, step)
            check_next(guest)


def test_the_vm_ends_meanwhile() -> None:
    """A plain error says so, and nothing is left behind."""
    steps = ("begin", "ptrace-seize", "ptrace-getregs", "write-code", "ptrace-setregs", "ptrace-setregs-done")
    for step in (*steps, "ptrace-detach-done", "wait-socket", "compare", "set-guarantee"):
        with Guest(how="plain", memory=16 * MIB) as guest:
            command = [str(ROOT / ".venv/bin/ramlock"), "inject", "--pid", str(guest.pid), "--guarantee", "1M"]
            env = {**os.environ, "RAMLOCK_TEST_STOP_AT": step}
            process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            try:
                wait_stopped(process)
                os.kill(guest.pid, signal.SIGKILL)
                process.send_signal(signal.SIGCONT)
                out, err = process.communicate(timeout=60)
            finally:
                process.kill()
                process.wait(30)
            assert process.returncode == 6, (step, out, err)
            assert err.count("\n") <= 2, (step, err)
            assert "Traceback" not in err
            guest.kill()
            # Of what the VM leaves when it is killed, the socket is its own.
            assert {path.name for path in Path("/run/ramlock").glob(f"{guest.pid}*")} <= {f"{guest.pid}.sock"}, step


def wait_stopped(process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 60
    while not truth.status(process.pid, "State").startswith("T"):
        assert process.poll() is None, "the step was never passed"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_killed_at_random(need: Need) -> None:
    """At some instants between the steps too."""
    with Guest(how="plain") as guest:
        for delay in range(20, 260, 12):
            command = [str(ROOT / ".venv/bin/ramlock"), "inject", "--pid", str(guest.pid), "--guarantee", str(SIZE)]
            process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(delay / 1000)
            except subprocess.TimeoutExpired:
                process.kill()
            process.wait(30)
            guest.check_unharmed()
            check_next(guest)


def left(guest: Guest) -> tuple[list[str], int, int]:
    """What could pile up in QEMU: our threads, open files, mappings of our file."""
    with memory.Memory(guest.pid) as target:
        mapped = [m for m in target.maps() if "ramlock" in m.path]
    return shim_threads(guest), len(list(Path(f"/proc/{guest.pid}/fd").iterdir())), len(mapped)


def test_twenty_rounds() -> None:
    """After the first round nothing grows."""
    with Guest(how="plain") as guest:
        first = None
        for _ in range(20):
            inject(guest, "--guarantee", SIZE)
            during = left(guest)
            assert ramlock("eject", "--pid", guest.pid).returncode == 0
            after = left(guest)
            first = first or (during, after)
            assert (during, after) == first
        guest.check_unharmed()


def test_upgrade_keeps_what_is_locked(other: Path) -> None:
    with Guest(how="plain") as guest:
        inject(guest, "--guarantee", "64M", env={"RAMLOCK_SHIM": str(other)})
        held = assert_holds(guest, 64 * MIB)
        reply = inject(guest, "--upgrade")
        assert reply["replaced"] == __version__
        assert assert_holds(guest, 64 * MIB).ranges == held.ranges
        assert inject(guest, "--upgrade")["already"]
        guest.check_unharmed()
        assert ramlock("set", "0", "--pid", guest.pid).returncode == 0
        assert truth.vm_lck(guest.pid) == 0


def test_upgrade_with_as_much_as_the_books_hold(other: Path) -> None:
    """Of an old shim's locked memory every other page is another one's now: over a thousand ranges to hand over."""
    page = 4096
    with Guest(how="plain", memory=32 * MIB) as guest:
        inject(guest, "--guarantee", "all", env={"RAMLOCK_SHIM": str(other)})
        with guest.shim() as shim:
            handed = shim.execute("ramlock-eject", {"keep": True})
        ((start, size),) = handed["books"]["held"]
        assert size == guest.memory
        ranges = [[start + 2 * n * page, page] for n in range(1022)]
        handed["books"]["held"] = handed["books"]["on-fault"] = ranges
        handed["wish"].update(size=len(ranges) * page, all=False, prefault=False)
        eject.wait_gone(guest.pid, 20)
        inject(guest, env={"RAMLOCK_SHIM": str(other)})
        with guest.shim() as shim:
            shim.execute("ramlock-adopt", handed)
        assert guest.query()["armed"] == len(ranges) * page
        reply = inject(guest, "--upgrade")
        assert reply["replaced"] == __version__
        assert "unadopted" not in reply
        assert guest.query()["armed"] == len(ranges) * page
        assert truth.vm_lck(guest.pid) == guest.memory
        guest.check_unharmed()
        assert ramlock("set", "0", "--pid", guest.pid).returncode == 0
        assert truth.vm_lck(guest.pid) == guest.memory - len(ranges) * page


def test_upgrade_of_a_file_replaced_at_its_path(other: Path) -> None:
    """The loader would hand back the former object for the same path."""
    former = {"RAMLOCK_SHIM": str(other)}
    with Guest(how="plain") as guest:
        inject(guest, "--guarantee", "32M", env=former)
        fresh = other.with_name("new")
        fresh.write_bytes(SHIM.read_bytes())
        fresh.rename(other)
        assert inject(guest, "--upgrade", env=former)["replaced"] == __version__
        with memory.Memory(guest.pid) as target:
            maps = target.maps()
            program = memory.Object(target, loaded.executable(target, maps).start)
            shims = loaded.shims(target, program, maps)
        assert len({shim.build_id for shim in shims}) == len(shims) == 2
        assert_holds(guest, 32 * MIB)


def test_upgrade_of_a_preloaded_shim(other: Path) -> None:
    with Guest(how="env", env={"RAMLOCK_GUARANTEE": "48M"}) as guest:
        guest.settle()
        assert inject(guest, "--upgrade", env={"RAMLOCK_SHIM": str(other)})["replaced"] == __version__
        assert_holds(guest, 48 * MIB)


@pytest.mark.parametrize("step", ["hand-over", "ptrace-setregs", "wait-socket", "adopt"])
def test_killed_during_an_upgrade(other: Path, step: str) -> None:
    """What is locked stays locked, and whoever comes next takes it over."""
    with Guest(how="plain") as guest:
        inject(guest, "--guarantee", "32M", env={"RAMLOCK_SHIM": str(other)})
        held = assert_holds(guest, 32 * MIB)
        result = ramlock("inject", "--pid", guest.pid, "--upgrade", env={"RAMLOCK_TEST_KILL_AT": step})
        assert result.returncode == -signal.SIGKILL, step
        guest.check_unharmed()
        assert truth.locked(guest.pid).ranges == held.ranges
        inject(guest)
        assert assert_holds(guest, 32 * MIB).ranges == held.ranges
        assert ramlock("set", "0", "--pid", guest.pid).returncode == 0
        assert truth.vm_lck(guest.pid) == 0
        assert not Path(f"/run/ramlock/{guest.pid}.books").exists()


def test_a_failed_upgrade_brings_the_former_one_back(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Guest(how="plain") as guest:
        inject(guest, "--guarantee", "32M")
        compare = tell.check

        def disagree(vm: Any, process: Any, outside: Any, *, allow_probable: bool) -> str:
            monkeypatch.setattr(tell, "check", compare)
            raise GuestRamMismatch("made up", "by this test")

        monkeypatch.setattr(tell, "check", disagree)
        environ = {**os.environ, "RAMLOCK_SHIM": str(other)}
        with pytest.raises(GuestRamMismatch), install.installed(guest.pid, install.Options(upgrade=True), environ):
            pass
        assert requested(guest) == 32 * MIB
        assert_holds(guest, 32 * MIB)
        guest.check_unharmed()


def test_a_disagreement_locks_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shim that takes other memory for guest RAM than what is seen from outside is sent away."""
    with Guest(how="plain") as guest:

        def liar(reply: object) -> list[guestram.Block]:
            return [guestram.Block(block.id, block.host + 4096, block.size) for block in honest(reply)]

        honest = guestram.parse_reply
        monkeypatch.setattr(guestram, "parse_reply", liar)
        with (
            pytest.raises(GuestRamMismatch, match=r"pc.ram.*from outside there is pc.ram"),
            install.installed(guest.pid, install.Options(), os.environ),
        ):
            pass
        assert truth.vm_lck(guest.pid) == 0
        assert not shim_threads(guest)
        guest.check_unharmed()


def test_a_loader_that_does_not_take_it(tmp_path: Path) -> None:
    """A file that only looks like the shim: it is said at once, and QEMU is unharmed."""
    shim = tmp_path / "ramlock.so"
    data = bytearray(SHIM.read_bytes())
    data[16:18] = b"\x01\x00"  # e_type: an object file, which the loader refuses
    shim.write_bytes(data)
    with Guest(how="plain") as guest:
        with (
            pytest.raises(CannotInject, match="did not take"),
            install.installed(guest.pid, install.Options(), {**os.environ, "RAMLOCK_SHIM": str(shim)}),
        ):
            pass
        guest.check_unharmed()
        assert not inject(guest)["already"]


def in_the_middle(monkeypatch: pytest.MonkeyPatch, name: str, act: Callable[[], None]) -> None:
    """Does something once, when the injection passes a step of tracee.py."""

    def at(passed: str) -> None:
        if passed == name:
            monkeypatch.undo()
            act()

    monkeypatch.setattr("ramlock.tracee.step", at)


def test_interrupted_after_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim comes all the same, so its folder stays."""
    with Guest(how="plain", user=NOBODY) as guest:
        in_the_middle(monkeypatch, "ptrace-setregs-done", lambda: os.kill(os.getpid(), signal.SIGINT))
        with pytest.raises(KeyboardInterrupt), install.installed(guest.pid, install.Options(), os.environ):
            pass
        assert Path(f"/run/ramlock/{guest.pid}").is_dir()
        guest.check_unharmed()
        inject(guest, "--guarantee", SIZE)
        assert requested(guest) == SIZE


def test_stopped_by_a_signal_after_it_was_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    with Guest(how="plain") as guest:
        in_the_middle(monkeypatch, "ptrace-setregs-done", lambda: os.kill(guest.pid, signal.SIGSTOP))
        begun = time.monotonic()
        with (
            pytest.raises(ControlError, match="stopped by a signal"),
            install.installed(guest.pid, install.Options(), os.environ),
        ):
            pass
        assert time.monotonic() - begun < 5
        os.kill(guest.pid, signal.SIGCONT)
        guest.check_unharmed()
        inject(guest, "--guarantee", SIZE)
        assert requested(guest) == SIZE


@pytest.mark.parametrize("step", ["ptrace-interrupt", "ptrace-getregs", "ptrace-setregs", "ptrace-setregs-done"])
def test_the_vm_is_killed_meanwhile(monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    with Guest(how="plain") as guest:

        def kill() -> None:
            os.kill(guest.pid, signal.SIGKILL)
            time.sleep(0.05)

        in_the_middle(monkeypatch, step, kill)
        with (
            pytest.raises(NotFound) as error,
            install.installed(guest.pid, install.Options(), os.environ),
        ):
            pass
        assert "nothing was changed" not in error.value.hint


def test_a_shim_that_leaves_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It cannot make its socket; it is said at once, and the next one works."""
    with Guest(how="plain") as guest:
        config = b"RAMLOCK_OWNER_UID=0\nRAMLOCK_SOCKET=/nonexistent/folder/sock\n"
        monkeypatch.setattr(install, "_config", lambda *_: config)
        begun = time.monotonic()
        with (
            pytest.raises(CannotInject, match="could not make its socket"),
            install.installed(guest.pid, install.Options(), os.environ),
        ):
            pass
        assert time.monotonic() - begun < 5
        guest.check_unharmed()
        inject(guest, "--guarantee", SIZE)
        assert requested(guest) == SIZE


def test_books_that_no_shim_takes_are_kept() -> None:
    with Guest(how="plain") as guest:
        file = Path(f"/run/ramlock/{guest.pid}.books")
        books = {"held": [[4096, 8192]], "foreign": [], "on-fault": []}
        wish = {"size": 8192, "all": False, "order": "low", "prefault": True}
        with kept.Room(procfs.read(guest.pid)) as room:
            room.fill({"books": books, "wish": wish})
        assert "unadopted" in inject(guest)
        assert file.exists()
        assert ramlock("eject", "--pid", guest.pid).returncode == 0
        assert file.exists()
        file.unlink()
        assert "unadopted" not in inject(guest)


def test_a_new_shim_that_takes_no_books(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It stays, what was locked stays locked, and the next one who comes has it adopted."""
    with Guest(how="plain") as guest:
        inject(guest, "--guarantee", "32M")
        adopt = install._adopt

        def refuse(vm: Any, handed: Any) -> None:
            monkeypatch.setattr(install, "_adopt", adopt)
            raise CommandError("[range] made up", reason="range")

        monkeypatch.setattr(install, "_adopt", refuse)
        environ = {**os.environ, "RAMLOCK_SHIM": str(other)}
        with (
            pytest.raises(ControlError, match="does not take over"),
            install.installed(guest.pid, install.Options(upgrade=True), environ),
        ):
            pass
        assert Path(f"/run/ramlock/{guest.pid}.books").exists()
        inject(guest)
        assert not Path(f"/run/ramlock/{guest.pid}.books").exists()
        assert_holds(guest, 32 * MIB)


def test_no_upgrade_where_nothing_can_be_kept(other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Guest(how="plain") as guest:
        inject(guest, "--guarantee", "32M")
        room = kept.Room
        monkeypatch.setattr(kept, "Room", lambda process: room(process, other))
        environ = {**os.environ, "RAMLOCK_SHIM": str(other)}
        with (
            pytest.raises(Refused, match="cannot be written down"),
            install.installed(guest.pid, install.Options(upgrade=True), environ),
        ):
            pass
        assert requested(guest) == 32 * MIB
        assert_holds(guest, 32 * MIB)


def test_the_outside_list_is_qemus() -> None:
    with Guest(how="plain", args=["-device", "virtio-net-pci", "-m", "512M,slots=2,maxmem=2G"], memory=0) as guest:
        for backend in (None, "memory-backend-ram", "memory-backend-memfd"):
            if backend:
                guest.monitor.execute("object-add", {"qom-type": backend, "id": backend, "size": 64 * MIB})
            found = locate.outside(procfs.read(guest.pid), "symbols")
            blocks = [*found.blocks, *found.others]
            lines = guest.monitor.human("info ramblock").splitlines()[1:]
            assert sorted(block.size for block in blocks) == sorted(int(line.split()[-2], 16) for line in lines)
            # A backend that is not plugged in has no name yet.
            named = {block.id: block.size for block in blocks if block.id}
            assert named.items() <= guest.blocks().items()
            assert named["pc.ram"] == 512 * MIB
            assert [block.id for block in found.blocks] == ["pc.ram"]
