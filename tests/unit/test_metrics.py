"""What Prometheus is told: escaped, bounded, served to many at once, written in one piece."""
# SPDX-License-Identifier: GPL-2.0-or-later

import http.client
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ramlock import metrics, survey
from ramlock.errors import NoPermission, RamlockError, UsageError
from ramlock.reply import parse
from tests.unit.conftest import reply

RAMLOCK = [sys.executable, "-m", "ramlock"]
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(text: str) -> Samples:
    """All samples, read by prometheus_client's own parser; no series is there twice."""
    result: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in result, key
            result[key] = sample.value
    return result


def told(*everyone: survey.Seen) -> Samples:
    registry = metrics.CollectorRegistry()

    class Collector:
        def collect(self) -> Iterator[metrics.Metric]:
            return metrics._of_vms(list(everyone))

    registry.register(Collector())  # type: ignore[arg-type]
    return read(metrics.generate_latest(registry).decode())


def value(samples: Samples, name: str, **labels: str) -> float:
    found = [number for (key, has), number in samples.items() if key == name and labels.items() <= dict(has).items()]
    assert len(found) == 1, (name, labels, found)
    return found[0]


def test_one_vm() -> None:
    times = {"count": 7, "sum-us": 3500, "buckets": [1, 2, 3]}
    now = parse(reply(requested=1 << 30, locked=1 << 29, lost=4096, step_times=times))
    samples = told(survey.Seen(7, None, 2 << 30, 3 << 30, 0, True, now))
    assert value(samples, "ramlock_requested_bytes") == 1 << 30
    assert value(samples, "ramlock_locked_bytes") == 1 << 29
    assert value(samples, "ramlock_guest_ram_bytes", pid="7") == 2 << 30
    assert value(samples, "ramlock_swapped_bytes") == 0
    assert value(samples, "ramlock_lost_bytes_total") == 4096
    assert value(samples, "ramlock_step_seconds_count") == 7
    assert value(samples, "ramlock_step_seconds_sum") == 0.0035
    assert value(samples, "ramlock_step_seconds_bucket", le="2e-06") == 3
    assert value(samples, "ramlock_step_seconds_bucket", le="4e-06") == 6
    assert value(samples, "ramlock_step_seconds_bucket", le="+Inf") == 7
    assert not [name for name, _ in samples if name == "ramlock_short"]


def test_what_is_unknown_is_left_out() -> None:
    samples = told(survey.Seen(7, problem="no answer"), survey.Seen(8, None, 1, 2, None, True, None, "stopped"))
    assert {dict(labels)["pid"] for _, labels in samples} == {"8"}
    assert value(samples, "ramlock_answers") == 0
    assert not [name for name, _ in samples if "swapped" in name or "requested" in name]


@pytest.mark.parametrize(("reason", "said"), [("cgroup", "cgroup"), ('x"} 1\nfake_metric 1', "other")])
def test_why_a_guarantee_is_short(reason: str, said: str) -> None:
    """A hostile shim cannot make new series by new reasons."""
    now = parse(reply(state="short", short={"reason": reason, "desc": ""}))
    assert value(told(survey.Seen(7, None, 1, 1, 0, True, now)), "ramlock_short", reason=said) == 1


@pytest.mark.parametrize("times", [None, {"count": 1, "sum-us": 1, "buckets": [1] * 1000}, {"count": 0, "sum-us": 0,
                                   "buckets": [5]}, {"count": 1, "sum-us": 1, "buckets": [-1]}])  # fmt: skip
def test_step_times_that_are_none(times: object) -> None:
    with pytest.raises(RamlockError, match=r"step-times|buckets"):
        parse(reply(step_times=times))


@pytest.fixture
def impostor(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that calls itself QEMU, with a name that is none."""
    program = tmp_path / "qemu-system-x86_64"
    shutil.copy(shutil.which("bash") or "/bin/bash", program)
    name = 'guest=evil"} 1\nfake_metric{x="\\' + "\x1b[2J" + "A" * 5000
    process = subprocess.Popen(
        [str(program), "-c", "echo; read", "-name", name], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    process.stdout.readline()
    yield process
    process.communicate(b"\n")


def test_a_hostile_name(impostor: subprocess.Popen[bytes]) -> None:
    text = metrics.exposition(3.0).decode()
    samples = read(text)
    assert "fake_metric" not in {name for name, _ in samples}
    assert "\x1b" not in text
    mine = [dict(labels) for name, labels in samples if dict(labels).get("pid") == str(impostor.pid)]
    assert mine
    assert all(labels["name"].startswith('evil"}') and len(labels["name"]) < 300 for labels in mine)


def test_too_many_vms(monkeypatch: pytest.MonkeyPatch) -> None:
    many = [survey.Seen(pid, None, 1, 1, 1, False) for pid in range(1, metrics.VMS_MOST + 100)]
    monkeypatch.setattr(survey, "survey", lambda *_: many)
    samples = read(metrics.exposition(1.0).decode())
    assert len([name for name, _ in samples if name == "ramlock_shim"]) == metrics.VMS_MOST
    assert value(samples, "ramlock_vms_left_out") == 99


def test_a_survey_that_hangs_loses_no_more_than_one_thread(
    impostor: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck = threading.Event()
    look = survey.look
    monkeypatch.setattr(
        survey, "look", lambda pid, *a, **k: stuck.wait(60) and None if pid == impostor.pid else look(pid, *a, **k)
    )
    try:
        before = threading.active_count()
        for _ in range(3):
            found = {seen.pid: seen for seen in survey.survey(0.3)}
            assert found[impostor.pid].problem == "no answer"
        assert threading.active_count() <= before + 1
    finally:
        stuck.set()


def test_a_text_file_has_all_of_the_old_or_all_of_the_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "ramlock.prom"
    metrics.write(place, b"old\n")
    assert place.stat().st_mode & 0o777 == 0o644
    inode = place.stat().st_ino
    metrics.write(place, b"new\n")
    assert place.read_bytes() == b"new\n"
    assert place.stat().st_ino != inode
    assert list(tmp_path.iterdir()) == [place]
    with pytest.raises(RamlockError, match="cannot write"):
        metrics.write(tmp_path / "nowhere" / "x.prom", b"")
    with pytest.raises(RamlockError):
        metrics.write(tmp_path, b"")  # a folder
    assert list(tmp_path.iterdir()) == [place]

    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        metrics.write(place, b"half\n")
    assert list(tmp_path.iterdir()) == [place]
    assert place.read_bytes() == b"new\n"


@pytest.mark.parametrize(
    ("text", "address"), [("127.0.0.1:9911", ("127.0.0.1", 9911)), ("[::1]:0", ("::1", 0)), ("host:80", ("host", 80))]
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert metrics.parse_address(text) == address


@pytest.mark.parametrize("text", ["", "9911", ":9911", "::1:9911", "a:b", "a:65536", "a:-1"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(UsageError, match="no address"):
        metrics.parse_address(text)


@pytest.fixture
def server() -> Iterator[metrics.Server]:
    made = metrics.Server("127.0.0.1:0", 3.0)
    thread = threading.Thread(target=made.serve_forever, args=(0.05,))
    thread.start()
    yield made
    made.shutdown()
    thread.join(10)
    made.server_close()


def get(server: metrics.Server, path: str = "/metrics") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=30)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read()


def test_many_at_once_get_one_answer(server: metrics.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []
    real = survey.survey
    monkeypatch.setattr(survey, "survey", lambda *words: looked.append(1) or real(*words))
    monkeypatch.setattr(metrics, "_FRESH", 60.0)
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda _: get(server), range(8)))
    assert {status for status, _ in answers} == {200}
    assert len({content for _, content in answers}) == 1
    assert len(looked) == 1
    assert "ramlock_vms" in {name for name, _ in read(answers[0][1].decode())}
    assert get(server, "/nothing")[0] == 404
    assert get(server, "/")[0] == 200


def test_clients_that_say_nothing_keep_nobody_out(server: metrics.Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_CLIENT_TIME", 0.5)
    address = ("127.0.0.1", server.server_port)
    silent = [socket.create_connection(address) for _ in range(metrics._CLIENTS_MOST + 8)]
    deadline = time.monotonic() + 30
    while True:
        try:
            assert get(server)[0] == 200
            break
        except (OSError, http.client.HTTPException):
            assert time.monotonic() < deadline
            time.sleep(0.1)
    for one in silent:
        one.settimeout(30)
        assert one.recv(1) == b""  # it was hung up on
        one.close()


def test_the_address_is_taken(server: metrics.Server) -> None:
    with pytest.raises(RamlockError, match="cannot listen") as error:
        metrics.Server(f"127.0.0.1:{server.server_port}", 1.0)
    assert not isinstance(error.value, NoPermission)


def test_the_command(tmp_path: Path) -> None:
    """Once to stdout, once to a file, and as a server that ends when it is told to."""
    printed = subprocess.run([*RAMLOCK, "metrics"], capture_output=True, text=True, timeout=60, check=True).stdout
    assert "ramlock_vms" in {name for name, _ in read(printed)}
    place = tmp_path / "x.prom"
    subprocess.run([*RAMLOCK, "metrics", "--textfile", str(place)], timeout=60, check=True)
    assert "ramlock_vms" in {name for name, _ in read(place.read_text())}
    for words in (["--listen", "127.0.0.1:0", "--textfile", "x"], ["--listen", "nonsense"]):
        refused = subprocess.run([*RAMLOCK, "metrics", *words], capture_output=True, text=True, timeout=60, check=False)
        assert refused.returncode == 2
        assert "hint: " in refused.stderr
    for number, code in ((signal.SIGTERM, 0), (signal.SIGINT, 0)):
        process = subprocess.Popen([*RAMLOCK, "metrics", "--listen", "127.0.0.1:0"], stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            assert "http://127.0.0.1:" in process.stderr.readline()
            process.send_signal(number)
            assert process.wait(30) == code
            assert process.stderr.read() == ""
        finally:
            process.kill()
            process.communicate()


def test_without_the_library(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); from ramlock.commands import main; main(['metrics'])"
    refused = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert refused.returncode == 1
    assert "prometheus_client" in refused.stderr
    assert "ramlock[metrics]" in refused.stderr
    assert "Traceback" not in refused.stderr
