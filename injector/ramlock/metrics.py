"""What Prometheus may know of every VM on this host; the only importer of prometheus_client.

A VM may be hostile: it makes up its name and what its shim answers. So labels are escaped and bounded, reasons are
those of docs/protocol.md or "other", and no more than VMS_MOST VMs are told of. All VMs are asked at once, by one
deadline (survey.py), and those who ask together get one answer.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from ramlock import host, procfs, survey
from ramlock.errors import NoPermission, RamlockError, UsageError
from ramlock.reply import State, StepTimes
from ramlock.text import printable

try:
    from prometheus_client import CollectorRegistry, generate_latest
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ImportError:
    raise RamlockError(
        "the Python library prometheus_client is not here, which ramlock metrics needs",
        "install it: pip install 'ramlock[metrics]', or apt install python3-prometheus-client",
    ) from None

VMS_MOST = 1000
REASONS = frozenset(
    ("rlimit", "cgroup", "host-memory", "numa-node", "map-count", "no-ram", "migration", "discarded", "kernel")
)
"""Why a guarantee can be short, by docs/protocol.md."""
_LABELS = ("name", "uuid", "pid")
_FRESH = 1.0
"""Seconds for which an answer is good for all who ask."""
_CLIENTS_MOST = 16
_CLIENT_TIME = 15.0
"""Seconds that one client has, from its connection to the last byte."""
_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class VmCollector:
    """Everything that is told of the VMs, looked at anew for each call."""

    def __init__(self, seconds: float, proc: Path = procfs.PROC) -> None:
        """Give all VMs together `seconds` to answer."""
        self.seconds = seconds
        self.proc = proc

    def collect(self) -> Iterator[Metric]:
        """Look, and yield the metrics, as prometheus_client asks."""
        began = time.monotonic()
        everyone = survey.survey(self.seconds, self.proc)
        yield from _of_vms(everyone[:VMS_MOST])
        yield GaugeMetricFamily("ramlock_vms", "QEMU processes on this host.", len(everyone))
        yield GaugeMetricFamily(
            "ramlock_vms_left_out",
            "QEMU processes not told of, as there are too many.",
            max(len(everyone) - VMS_MOST, 0),
        )
        yield from _of_host(self.proc)
        yield GaugeMetricFamily(
            "ramlock_survey_seconds", "How long it took to look at all VMs.", time.monotonic() - began
        )


def _of_vms(everyone: list[survey.Seen]) -> Iterator[Metric]:
    def gauge(name: str, text: str, labels: tuple[str, ...] = _LABELS) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"ramlock_{name}", text, labels=labels)

    shim = gauge("shim", "Whether there is a shim in the VM.")
    answers = gauge("answers", "Whether the shim in the VM answered in time.")
    resident = gauge("resident_bytes", "Memory of the QEMU process that is resident.")
    swapped = gauge("swapped_bytes", "Memory of the QEMU process that is in swap.")
    ram = gauge("guest_ram_bytes", "Guest RAM.")
    requested = gauge("requested_bytes", "Guest RAM that is guaranteed.")
    locked = gauge("locked_bytes", "Guest RAM that is locked and resident.")
    short = gauge("short", "1 while the guarantee is not held in full, by reason.", (*_LABELS, "reason"))
    lost = CounterMetricFamily(
        "ramlock_lost_bytes", "Locked guest RAM that was lost behind the shim's back.", labels=_LABELS
    )
    steps = HistogramMetricFamily(
        "ramlock_step_seconds", "How long single system calls on guest RAM took.", labels=_LABELS
    )
    for seen in everyone:
        labels = (seen.name or "", seen.uuid or "", str(seen.pid))
        for family, value in ((resident, seen.resident), (swapped, seen.swapped), (ram, seen.ram)):
            if value is not None:
                family.add_metric(labels, value)
        if seen.shim is not None:
            shim.add_metric(labels, float(seen.shim))
        if seen.shim:
            answers.add_metric(labels, float(seen.guarantee is not None))
        if (now := seen.guarantee) is None:
            continue
        requested.add_metric(labels, now.requested)
        locked.add_metric(labels, now.locked)
        lost.add_metric(labels, now.lost)
        if now.state is State.SHORT:
            reason = now.why.reason if now.why else "other"
            short.add_metric((*labels, reason if reason in REASONS else "other"), 1)
        if now.step_times is not None:
            steps.add_metric(labels, _buckets(now.step_times), now.step_times.sum_us / 1e6)
    yield from (shim, answers, resident, swapped, ram, requested, locked, short, lost, steps)


def _buckets(times: StepTimes) -> list[tuple[str, float]]:
    """Return (upper bound in seconds, steps up to it), the last one without a bound."""
    result: list[tuple[str, float]] = []
    total = 0
    for power, count in enumerate(times.buckets):
        total += count
        result.append((str(2**power / 1e6), total))
    return [*result, ("+Inf", times.steps)]


def _of_host(proc: Path) -> Iterator[Metric]:
    facts = host.memory(proc)
    if facts is None:
        return
    kept = host.reserve(facts.total, None)
    yield GaugeMetricFamily("ramlock_host_memory_bytes", "Memory of this host.", facts.total)
    yield GaugeMetricFamily("ramlock_host_available_bytes", "Memory of this host that is available.", facts.available)
    yield GaugeMetricFamily(
        "ramlock_host_headroom_bytes",
        "What guarantees may still allocate: what is available, less what is kept for the host.",
        max(facts.available - kept, 0),
    )
    yield GaugeMetricFamily("ramlock_host_swap_free_bytes", "Swap of this host that is free.", facts.swap_free)


def exposition(seconds: float, proc: Path = procfs.PROC) -> bytes:
    """Look at every VM, for `seconds` at most, and return it in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(VmCollector(seconds, proc))
    return bytes(generate_latest(registry))


def write(path: Path, content: bytes) -> None:
    """Put `content` into the file `path`, which has all of the old or all of the new at any time.

    Raises RamlockError when that fails; then the file is as it was.
    """
    shown = printable(str(path))
    temporary = None
    try:
        # Not ending in .prom, so that node_exporter does not read it.
        fd, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        with os.fdopen(fd, "wb") as file:
            file.write(content)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        if temporary is not None:
            with suppress(OSError):
                os.unlink(temporary)
        if not isinstance(error, OSError):
            raise
        kind = NoPermission if isinstance(error, PermissionError) else RamlockError
        raise kind(
            f"cannot write {shown}: {error.strerror}", "name a file in a folder that is there, with room and writable"
        ) from None


class _Answer:
    """The latest answer; one thread looks, and whoever asks meanwhile gets the same."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._lock = threading.Lock()
        self._content = b""
        self._until = 0.0

    def get(self) -> bytes:
        with self._lock:
            if time.monotonic() >= self._until:
                self._content = exposition(self._seconds)
                self._until = time.monotonic() + _FRESH
            return self._content


class Server(ThreadingHTTPServer):
    """Serves /metrics, to a bounded number of clients of which none can stay."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str, seconds: float) -> None:
        """Listen on `address`. Raises UsageError, NoPermission, or RamlockError when that cannot be."""
        where, port = parse_address(address)
        self.answer = _Answer(seconds)
        self._places = threading.BoundedSemaphore(_CLIENTS_MOST)
        self.address_family = socket.AF_INET6 if ":" in where else socket.AF_INET
        try:
            super().__init__((where, port), _Handler)
        except PermissionError:
            raise NoPermission(f"this user may not listen on {address}", "choose a port above 1023") from None
        except (OSError, OverflowError) as error:
            what = error.strerror if isinstance(error, OSError) else str(error)
            raise RamlockError(f"cannot listen on {address}: {what}", "choose another address or port") from None

    def server_bind(self) -> None:
        """Bind, without HTTPServer's look-up of our own name, which may take long."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])

    def process_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: object) -> None:
        """Serve one client by a thread, or hang up when all places are taken."""
        assert isinstance(request, socket.socket)
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # no more threads
            self._places.release()
            self.shutdown_request(request)

    def process_request_thread(
        self, request: socket.socket | tuple[bytes, socket.socket], client_address: object
    ) -> None:
        """Serve one client, for so long."""
        assert isinstance(request, socket.socket)
        timer = threading.Timer(_CLIENT_TIME, _hang_up, (request,))
        timer.daemon = True
        try:
            timer.start()
            super().process_request_thread(request, client_address)
        finally:
            timer.cancel()
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:
        """Say nothing of clients that hang up."""


def _hang_up(client: socket.socket) -> None:
    with suppress(OSError):
        client.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    server_version = "ramlock"
    sys_version = ""
    timeout = _CLIENT_TIME

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        path = self.path.partition("?")[0]
        if path == "/":
            self._send(HTTPStatus.OK, "text/plain", b"ramlock: see /metrics\n")
        elif path == "/metrics":
            self._send(HTTPStatus.OK, _CONTENT_TYPE, self.server.answer.get())
        else:
            self._send(HTTPStatus.NOT_FOUND, "text/plain", b"see /metrics\n")

    do_HEAD = do_GET

    def _send(self, status: HTTPStatus, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing: Prometheus asks every few seconds."""


def parse_address(text: str) -> tuple[str, int]:
    """Read ADDR:PORT, where an IPv6 address stands in brackets. Raises UsageError."""
    where, colon, port = text.rpartition(":")
    if where.startswith("[") and where.endswith("]"):
        where = where[1:-1]
    elif ":" in where:
        colon = ""
    if not colon or not where or not port.isdecimal() or int(port) > 65535:
        raise UsageError(
            f"'{printable(text, 80)}' is no address to listen on",
            "write it like 127.0.0.1:9911, 0.0.0.0:9911 or [::1]:9911",
        )
    return where, int(port)
