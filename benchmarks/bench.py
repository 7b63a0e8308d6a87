"""What the benchmarks share: a VM whose memory is locked in one way or another, and everybody who may have to wait.

The VM has a little memory that Linux runs in, and a large DIMM that Linux is told not to use: that can be made cold
again between two measurements, so that all ways are measured in one VM, in turn.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import socket
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests.qemu import truth
from tests.qemu.guest import MIB, ROOT, SHIM, Guest
from tests.qemu.monitor import Monitor, connect
from tests.qemu.silence import Silence

BYSTANDER = ROOT / "build/bench/bystander.so"
LINUX = 512 * MIB
PAUSE = 0.02  # seconds of watching before the work, and after it: what begins or ends there counts, and little else
WATCHERS = ("QMP round trip", "guest clock gap", "guest page touch", "mmap in QEMU", "read of guest RAM")


@dataclass
class Samples:
    """Waits in seconds: how many there were, and the longest fiftieth of them, longest first."""

    n: int = 0
    tail: list[float] = field(default_factory=list)

    @classmethod
    def parse(cls, n: str, tail: str) -> Samples:
        return cls(int(n), [float(word) for word in tail.split(",") if word])

    @classmethod
    def of(cls, waits: list[float]) -> Samples:
        return cls(len(waits), sorted(waits, reverse=True)[: len(waits) // 50 + 1])

    @property
    def longest(self) -> float:
        return self.tail[0] if self.tail else 0.0

    def percentile(self, rank: float = 99.9) -> float:
        """The wait that this percentage of all waits did not exceed; at least 99."""
        at = int(self.n * (1 - rank / 100))
        return self.tail[min(at, len(self.tail) - 1)] if self.tail else 0.0


def pool(many: list[Samples]) -> Samples:
    """All rounds together."""
    return Samples(sum(s.n for s in many), sorted((wait for s in many for wait in s.tail), reverse=True))


@dataclass
class Measured:
    """One measurement: what the work took, in seconds, and who waited how long for what."""

    wall: float
    cpu: float
    waits: dict[str, Samples]
    grown: int = 0  # bytes of RSS
    unserved: float = 0.0  # seconds that the shim's threads were ready to run and had no processor

    @property
    def worst(self) -> float:
        """The longest wait of anybody."""
        return max((samples.longest for samples in self.waits.values()), default=0.0)


def measured_of(data: dict[str, Any]) -> Measured:
    """One as it was written by lock.py."""
    return Measured(**{**data, "waits": {name: Samples(**samples) for name, samples in data["waits"].items()}})


class Bystander:
    """The helper inside QEMU (bystander.c)."""

    def __init__(self, path: Path) -> None:
        self._socket: socket.socket = connect(path, 30)
        self._socket.settimeout(300)
        self._file = self._socket.makefile("rw")

    def tell(self, line: str) -> None:
        """Sends a line whose answer is fetched later."""
        self._file.write(line + "\n")
        self._file.flush()

    def answer(self) -> list[str]:
        text = self._file.readline().strip()
        if not text.startswith("ok"):
            raise RuntimeError(f"the helper in QEMU said {text!r}")
        return text.split()[1:]

    def ask(self, line: str) -> list[str]:
        self.tell(line)
        return self.answer()

    def close(self) -> None:
        self._file.close()
        self._socket.close()


class Vm:
    """A guest of one vCPU with the shim and the helper in it, both asleep, and a DIMM of `size` bytes, unused."""

    def __init__(self, size: int, accel: str = "tcg") -> None:
        self.size = size
        self._guest = Guest(
            how="plain",
            boot=True,
            memory=0,
            accel=accel,
            machine="pc,mem-merge=off,dump-guest-core=off",
            append="acpi_no_memhotplug",
            prepare=["sh", "-c", f'BYSTANDER_SOCKET="$0" LD_PRELOAD={BYSTANDER}:{SHIM} exec "$@"'],
            timeout=120,
        )
        command = self._guest.command
        command.insert(command.index("-c") + 2, str(self._guest.directory / "bystander"))
        command += ["-m", f"{LINUX // MIB}M,slots=2,maxmem=64G", "-smp", "1"]
        command += ["-object", f"memory-backend-ram,id=large,size={size}", "-device", "pc-dimm,memdev=large"]
        command += ["-qmp", f"unix:{self._guest.directory}/second,server=on,wait=off"]

    def __enter__(self) -> Vm:
        self._guest.__enter__()
        try:
            self.shim: Monitor = self._guest.shim(120)
            self.second = Monitor(self._guest.directory / "second", 300)
            self.helper = Bystander(self._guest.directory / "bystander")
            blocks = {block["id"]: block for block in self.shim.execute("query-ram-blocks")}
            self.large = next(b for name, b in blocks.items() if "large" in name)
            self.linux = next(b for name, b in blocks.items() if "large" not in name)
            words = self._guest.agent.ask("where").split()
            self._touched = [tuple(map(int, word.split("+"))) for word in words]
            self.helper.ask(f"look {self.linux['host'] + 16 * MIB}")
            self.do("populate", self.look_range())
        except BaseException:
            self._guest.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._guest.__exit__(kind, error, trace)

    @property
    def pid(self) -> int:
        return self._guest.pid

    @property
    def guest(self) -> Guest:
        return self._guest

    def look_range(self) -> list[tuple[int, int]]:
        return [(self.linux["host"] + 16 * MIB, 4096)]

    def dimm(self) -> list[tuple[int, int]]:
        return [(self.large["host"], self.size)]

    def whole(self) -> list[tuple[int, int]]:
        return [*self.dimm(), (self.linux["host"], LINUX)]

    def do(self, work: str, ranges: list[tuple[int, int]], where: str = "thread") -> tuple[float, float]:
        """Something done to ranges of QEMU's memory by the helper; returns what it took, and of that processor time."""
        self.choose(ranges)
        wall, cpu = self.helper.ask(f"do {work} {where}")
        return float(wall), float(cpu)

    def choose(self, ranges: list[tuple[int, int]]) -> None:
        self.helper.ask("forget")
        for start, size in ranges:
            self.helper.ask(f"range {start:#x} {size:#x}")

    def guarantee(self, size: int | str, **more: Any) -> tuple[float, float]:
        """Sets a guarantee and waits until it is held; returns what it took, and the lock threads' processor time."""
        cpu, begin = self.lock_cpu(), time.monotonic()
        wish = {"all": True} if size == "all" else {"size": size}
        self.shim.events.clear()
        self.shim.execute("set_ram_minguarantee", {**wish, **more})
        generation = self.shim.execute("query-ram-minguarantee")["generation"]
        while True:
            event = self.shim.wait_event("RAM_MINGUARANTEE_REACHED", "RAM_MINGUARANTEE_SHORT", timeout=300)
            if event["event"].endswith("SHORT"):
                raise RuntimeError(f"the guarantee is short: {event['data']}")
            if event["data"]["generation"] == generation:
                return time.monotonic() - begin, self.lock_cpu() - cpu

    def lock_cpu(self) -> float:
        """Processor time of all of the shim's threads, in seconds."""
        return self._schedstat(0)

    def unserved(self) -> float:
        """How long they were ready to run and had no processor."""
        return self._schedstat(1)

    def _schedstat(self, column: int) -> float:
        total = 0
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            with suppress(FileNotFoundError, ProcessLookupError):  # others of QEMU's threads come and go
                if (task / "comm").read_text().startswith("ramlock"):
                    total += int((task / "schedstat").read_text().split()[column])
        return total / 1e9

    def wakeups(self, seconds: float) -> int:
        """How often a thread of the shim ran within that time."""

        def count() -> int:
            threads = [
                t for t in Path(f"/proc/{self.pid}/task").iterdir() if (t / "comm").read_text().startswith("ramlock")
            ]
            return sum(truth.switches(self.pid, int(t.name)) for t in threads)

        time.sleep(1)  # what was just done comes to rest, which is counted too
        before = count()
        time.sleep(seconds)
        return count() - before

    def rss(self) -> int:
        return int(truth.status(self.pid, "VmRSS").split()[0]) * 1024

    def make(self, state: str) -> None:
        """Nothing is locked, and the DIMM is absent ("cold"), "resident" or "swapped"."""
        self.guarantee(0)
        self.do("unlock", self.whole())
        if state == "resident":
            self.do("populate", self.whole())
            return
        # Memory that lay free for seconds may have gone back to a hypervisor, and is many times slower at its next use:
        # this has nothing to do with how it is locked, so whatever is measured gets memory that was just in use.
        self.do("populate", self.dimm())
        self.do("discard", self.dimm())
        # The pages that the guest will touch; what they held is of no matter to it.
        self.do("discard", [(self.linux["host"] + first * 4096, count * 4096) for first, count in self._touched])
        if state == "swapped":
            self.do("fill", self.dimm())
            self.do("pageout", self.dimm())


class Watch:
    """Everybody who may have to wait, while it is entered; `waits` afterwards. Without `inside` only the guest.

    This process has real-time priority meanwhile: else the QMP client, once answered, waits for a processor.
    """

    def __init__(self, vm: Vm, inside: bool = True) -> None:
        self.waits: dict[str, Samples] = {}
        self._vm = vm
        self._inside = inside
        self._silence = Silence(vm.guest.monitor, 0.001)

    def __enter__(self) -> Watch:
        self._vm.guest.agent.ask("feel")
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))  # the client's thread inherits it
        if self._inside:
            self._vm.helper.ask("watch")
            self._silence.__enter__()
        time.sleep(PAUSE)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            time.sleep(PAUSE)
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
        if error is not None:
            return
        if self._inside:
            self._silence.__exit__(kind, error, trace)
            self.waits["QMP round trip"] = Samples.of(self._silence.waits)
            words = self._vm.helper.ask("watched")
            self.waits["mmap in QEMU"] = Samples.parse(words[0], words[1])
            self.waits["read of guest RAM"] = Samples.parse(words[2], words[3])
        words = self._vm.guest.agent.ask("felt").split()
        self.waits["guest clock gap"] = Samples.parse(words[0], words[1])
        self.waits["guest page touch"] = Samples.parse(words[2], words[3])
