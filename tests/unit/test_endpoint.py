"""Finding a shim's socket, and not being led to another."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

from ramlock import endpoint, procfs
from ramlock.deadline import Deadline
from ramlock.errors import NoAnswer, NoPermission, NotFound, NotOurs, UsageError
from tests.conftest import absent
from tests.unit.conftest import Serve, Shim
from tests.unit.test_procfs import make

LISTEN = "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print(); input()"


@contextmanager
def listener(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that listens."""
    process = subprocess.Popen([sys.executable, "-c", LISTEN, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        process.stdout.readline()
        yield process
    finally:
        process.kill()
        process.communicate()


def test_candidates(tmp_path: Path) -> None:
    make(tmp_path, 20, "qemu")  # 7 in its own pid namespace
    process = procfs.read(20, tmp_path)
    own = [
        "/run/ramlock/7.sock",
        "/run/user/1000/ramlock/7.sock",
        "/tmp/ramlock-1000/7.sock",
        "/run/user/1001/ramlock/7.sock",
        "/tmp/ramlock-1001/7.sock",
    ]
    outer = [path.replace("7.sock", "20.sock") for path in own]
    assert endpoint.candidates(process, None) == [*own, *outer, "/run/ramlock/20/sock"]
    environ = {"RAMLOCK_SOCKET": "/x/y", "XDG_RUNTIME_DIR": "/z"}
    assert endpoint.candidates(process, environ)[:3] == ["/x/y", "/run/ramlock/7.sock", "/z/ramlock/7.sock"]
    assert all(path.startswith("/") for path in endpoint.candidates(process, {"RAMLOCK_SOCKET": "relative"}))


def test_the_peer_is_who_listens(tmp_path: Path) -> None:
    with listener(tmp_path / "s") as process:
        sock = endpoint.connect(str(tmp_path / "s"), Deadline(5))
        assert endpoint.peer(sock) == endpoint.Peer(process.pid, os.getuid())
        sock.close()


def test_a_path_longer_than_an_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("x" * 100) / ("y" * 100)
    folder.mkdir(parents=True)
    monkeypatch.chdir(folder)
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("s")
        server.listen()
        endpoint.connect(str(folder / "s"), Deadline(5)).close()


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        endpoint.connect(str(tmp_path / "s"), Deadline(1))
    (tmp_path / "file").touch()
    with pytest.raises(FileNotFoundError):
        endpoint.connect(str(tmp_path / "file" / "s"), Deadline(1))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
    with pytest.raises(ConnectionRefusedError):
        endpoint.connect(str(tmp_path / "s"), Deadline(1))


def test_no_socket(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("fifo", "loop", "."):
        with pytest.raises(NotOurs):
            endpoint.connect(str(tmp_path / name), Deadline(1))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as server:
        server.bind(str(tmp_path / "datagrams"))
        with pytest.raises(NotOurs):
            endpoint.connect(str(tmp_path / "datagrams"), Deadline(1))


def test_a_full_queue_is_not_waited_for_without_end(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "s"))
        server.listen(0)
        waiting = []
        with pytest.raises(NoAnswer):
            for _ in range(10):
                waiting.append(endpoint.connect(str(tmp_path / "s"), Deadline(0.2)))
        for sock in waiting:
            sock.close()


def test_no_permission(tmp_path: Path) -> None:
    if os.getuid() != 0:
        absent("only root can become another user")
    tmp_path.chmod(0o700)
    code = (
        "import os, sys; from ramlock import deadline, endpoint, errors\n"
        "os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "try: endpoint.connect(sys.argv[1], deadline.Deadline(1))\n"
        "except errors.NoPermission as error: print(error.exit_code)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "s")], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert said == "7\n"


def test_the_process_itself_has_to_listen(tmp_path: Path, serve: Serve) -> None:
    """A socket in the right place that another process serves is not the VM's."""
    with listener(tmp_path / "own") as process:
        facts = procfs.read(process.pid)
        theirs = str(serve(Shim()))  # this very process listens there
        with pytest.raises(NotOurs, match=f"belongs to process {os.getpid()}"):
            endpoint.connect_process(facts, {"RAMLOCK_SOCKET": theirs}, Deadline(5))
        sock, path = endpoint.connect_process(facts, {"RAMLOCK_SOCKET": str(tmp_path / "own")}, Deadline(5))
        assert path == str(tmp_path / "own")
        sock.close()


def test_no_shim(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no ramlock shim"):
        endpoint.connect_process(procfs.read(os.getpid()), {"RAMLOCK_SOCKET": str(tmp_path / "x")}, Deadline(1))


@contextmanager
def never_answers(path: Path) -> Iterator[None]:
    """A socket whose queue is full."""
    with ExitStack() as stack:
        server = stack.enter_context(socket.socket(socket.AF_UNIX))
        server.bind(str(path))
        server.listen(0)
        with suppress(BlockingIOError):
            while True:
                client = stack.enter_context(socket.socket(socket.AF_UNIX))
                client.setblocking(False)
                client.connect(str(path))
        yield


def test_who_never_answers_does_not_hide_the_shim(tmp_path: Path) -> None:
    with never_answers(tmp_path / "s"), listener_of_its_own(tmp_path) as (process, runtime):
        begun = time.monotonic()
        environ = {"RAMLOCK_SOCKET": str(tmp_path / "s"), "XDG_RUNTIME_DIR": str(runtime)}
        sock, path = endpoint.connect_process(procfs.read(process.pid), environ, Deadline(10))
        sock.close()
        assert path == f"{runtime}/ramlock/{process.pid}.sock"
        assert time.monotonic() - begun < 3


def test_only_who_never_answers(tmp_path: Path) -> None:
    with never_answers(tmp_path / "s"), pytest.raises(NoAnswer):
        endpoint.connect_process(procfs.read(os.getpid()), {"RAMLOCK_SOCKET": str(tmp_path / "s")}, Deadline(10))


@contextmanager
def listener_of_its_own(folder: Path) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A process that listens in its usual place below a runtime folder."""
    code = (
        "import os, socket, sys; s = socket.socket(socket.AF_UNIX)\n"
        "s.bind(f'{sys.argv[1]}/{os.getpid()}.sock'); s.listen(); print(flush=True); input()"
    )
    (folder / "ramlock").mkdir()
    with subprocess.Popen(
        [sys.executable, "-c", code, str(folder / "ramlock")], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield process, folder
        process.kill()


@pytest.mark.parametrize("mode", [0o755, 0o777])
def test_a_folder_that_others_made(mode: int) -> None:
    """Anybody can make a user's folder in /tmp before that user does; what is in there is not even tried."""
    if os.getuid() != 0:
        absent("only root can become another user")
    uid = 3_000_000 + os.getpid()
    folder = Path(f"/tmp/ramlock-{uid}")
    with subprocess.Popen(["sleep", "60"], user=uid, group=uid) as process:
        folder.mkdir()
        try:
            folder.chmod(mode)
            os.chown(folder, uid if mode == 0o777 else uid + 1, -1)
            with never_answers(folder / f"{process.pid}.sock"):
                begun = time.monotonic()
                with pytest.raises(NotFound, match="no ramlock shim"):
                    endpoint.connect_process(procfs.read(process.pid), None, Deadline(10))
                assert time.monotonic() - begun < 0.9
        finally:
            shutil.rmtree(folder)
            process.kill()


@pytest.fixture
def root(tmp_path: Path) -> Iterator[tuple[Path, int]]:
    """A folder that stands for another root, and its descriptor."""
    folder = tmp_path / "root"
    (folder / "run").mkdir(parents=True)
    fd = os.open(folder, os.O_PATH | os.O_DIRECTORY)
    yield folder, fd
    os.close(fd)


def test_a_path_inside_another_root(root: tuple[Path, int]) -> None:
    folder, fd = root
    with listener(folder / "run" / "s") as process:
        (folder / "link").symlink_to("/run/s")  # absolute, as the VM sees it
        for path in ("/run/s", "/../../run/s", "/link"):
            sock = endpoint.connect(path, Deadline(5), fd)
            assert endpoint.peer(sock).pid == process.pid
            sock.close()


def test_links_do_not_lead_out_of_another_root(root: tuple[Path, int], tmp_path: Path) -> None:
    folder, fd = root
    with listener(tmp_path / "outside"):
        (folder / "run" / "absolute").symlink_to(tmp_path / "outside")
        (folder / "run" / "relative").symlink_to("../../../outside")
        (folder / "run" / "magic").symlink_to("/proc/self/root")
        for name in ("absolute", "relative", f"magic{tmp_path}/outside"):
            with pytest.raises((FileNotFoundError, NotOurs)):
                endpoint.connect(f"/run/{name}", Deadline(1), fd)


def test_a_vm_in_another_mount_namespace(tmp_path: Path) -> None:
    """The same path is another file there, and the VM's is the one that is reached."""
    if os.getuid() != 0:
        absent("only root can make a mount namespace")
    for name in ("own", "hidden"):
        (tmp_path / name).mkdir()
    script = 'mount --bind "$1" "$2" && shift 2 && exec "$@"'
    place = tmp_path / "own" / "s"
    process = subprocess.Popen(
        ["unshare", "--mount", "sh", "-c", script, "sh", tmp_path / "hidden", tmp_path / "own",
         sys.executable, "-c", LISTEN, str(place)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        if not process.stdout.readline():
            absent("no mount namespace can be made here")
        assert not place.exists()
        assert not procfs.same_root(process.pid)
        sock, _ = endpoint.connect_process(procfs.read(process.pid), {"RAMLOCK_SOCKET": str(place)}, Deadline(5))
        assert endpoint.peer(sock).pid == process.pid
        sock.close()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("option", [("-chroot", "x"), ("-run-with", "async-teardown=on,chroot=x"), ()])
def test_a_vm_that_changed_its_root(tmp_path: Path, option: tuple[str, ...]) -> None:
    """With -chroot the socket was made before, and stays where we see it; otherwise it is not sought there."""
    if os.getuid() != 0:
        absent("only root can change the root")
    (tmp_path / "jail").mkdir()
    code = LISTEN.replace("print()", "import os; os.chroot(sys.argv[2]); print()")
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "s"), str(tmp_path / "jail"), *option],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert not procfs.same_root(process.pid)
        environ = {"RAMLOCK_SOCKET": str(tmp_path / "s")}
        if option:
            sock, _ = endpoint.connect_process(procfs.read(process.pid), environ, Deadline(5))
            assert endpoint.peer(sock).pid == process.pid
            sock.close()
        else:
            with pytest.raises(NotFound, match="no ramlock shim"):
                endpoint.connect_process(procfs.read(process.pid), environ, Deadline(5))
    finally:
        process.kill()
        process.communicate()


def test_the_errors_have_their_exit_codes() -> None:
    assert [kind("", "").exit_code for kind in (NotFound, NotOurs, NoPermission, NoAnswer)] == [6, 6, 7, 1]


def test_who_cannot_enter_is_not_said_to_be_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """An ordinary user's usual place is closed to others."""
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    for allowed, socket_path in ((None, None), (0, None), (1000, None), (4711, "/run/x/sock")):
        endpoint.check_allowed(allowed, socket_path)
    with pytest.raises(UsageError, match="would let nobody in") as error:
        endpoint.check_allowed(4711, None)
    assert "--socket" in error.value.hint
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    endpoint.check_allowed(4711, None)
