#!/usr/bin/env python3
"""How long is a VM's main thread away when a library is loaded into it? (`make bench`): ramlock inject against gdb.

Each round boots a VM, does nothing with it, injects, and lets gdb call dlopen(), one after another: a second injection
into one VM would be shorter than the first, since the shim is mapped by then. The guest measures its own clock gaps
meanwhile: gdb stops the vCPUs too, ramlock does not. What the monitor's silence says beyond noise is told by
a spinner: a process that burns as much CPU time as the command did and touches nothing.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import resource
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from tests.qemu.guest import RAMLOCK, Guest
from tests.qemu.silence import Silence

ROUNDS = 7
CLOCK_GAP_S = 1.5
SPINNER = "as much CPU time, elsewhere"


@dataclass(frozen=True)
class Result:
    """One measurement; times in ms."""

    silence: float
    """The longest that QEMU's monitor took to answer."""
    gap: float
    """The longest gap between two looks at the guest's clock."""
    away: float | None = None
    """The main thread away, by ramlock's own account."""
    cpu: float | None = None
    """CPU time of the whole command."""


def command(*words: object) -> tuple[str, float]:
    """Runs a command; returns its output and its CPU time in ms."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, timeout=120, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done.stdout, 1e3 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def measure(guest: Guest, do: Callable[[], tuple[float | None, float | None]]) -> Result:
    """Runs `do` while the monitor is asked and the guest looks at its clock."""
    guest.agent.tell(f"clockgap {CLOCK_GAP_S}")
    with Silence(guest.monitor) as silence:
        time.sleep(0.2)
        away, cpu = do()
        time.sleep(0.2)
    words = guest.agent.answer().split()
    return Result(1e3 * silence.longest, 1e3 * float(words[0]), away, cpu)


def nothing() -> tuple[None, None]:
    """Idle."""
    time.sleep(0.5)
    return None, None


def spin(milliseconds: float) -> tuple[None, float]:
    """Burns that much CPU time in another process, which knows nothing of the VM."""
    code = f"import time\nwhile time.process_time() < {milliseconds / 1e3}: pass"
    return None, command(sys.executable, "-c", code)[1]


def main() -> None:
    """Measures and prints the table."""
    if not shutil.which("gdb"):
        sys.exit("gdb is not here: apt-get install gdb")
    results: dict[str, list[Result]] = {"idle": [], SPINNER: [], "ramlock inject": [], "gdb call dlopen": []}
    for number in range(ROUNDS):
        with Guest(how="plain", boot=True, args=["-smp", "2"]) as guest:
            pid = guest.pid

            def inject(pid: int = pid) -> tuple[float, float]:
                text, cpu = command(RAMLOCK, "inject", "--pid", pid, "--json")
                return json.loads(text)["stopped-us"] / 1e3, cpu

            def gdb(pid: int = pid) -> tuple[None, float]:
                call = 'call (void *)dlopen("libBrokenLocale.so.1", 2)'
                return None, command("gdb", "-p", pid, "-batch", "-nx", "-ex", call)[1]

            results["idle"].append(measure(guest, nothing))
            results["ramlock inject"].append(measure(guest, inject))
            spent = results["ramlock inject"][-1].cpu or 0
            results[SPINNER].append(measure(guest, partial(spin, spent)))
            results["gdb call dlopen"].append(measure(guest, gdb))
        print(f"round {number + 1} of {ROUNDS}", file=sys.stderr)
    show(results)


def show(results: dict[str, list[Result]]) -> None:
    """Prints the medians."""

    def median(name: str, field: str) -> float | None:
        values = [value for result in results[name] if (value := getattr(result, field)) is not None]
        return statistics.median(values) if values else None

    table = Table(title=f"a VM of 2 vCPUs, emulated, medians of {ROUNDS} rounds")
    for column in ("", "main thread away", "monitor silent", "guest clock gap", "CPU time"):
        table.add_column(column, justify="left" if not column else "right")
    for name in results:
        figures = [median(name, field) for field in ("away", "silence", "gap", "cpu")]
        table.add_row(name, *("" if figure is None else f"{figure:.2f} ms" for figure in figures))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)
    console.print(table)
    away, silence, noise = (
        median("ramlock inject", "away"),
        median("gdb call dlopen", "silence"),
        median("idle", "silence"),
    )
    ours = median("ramlock inject", "silence")
    assert away and silence and noise and ours
    console.print(f"gdb's silence is {silence / away:.0f} times as long as ramlock has the main thread away.")
    spun = median(SPINNER, "silence") or noise
    for name, floor in (("idle noise", noise), ("the spinner's", spun)):
        ours_above, gdbs_above = ours - floor, silence - floor
        ratio = f"{gdbs_above / ours_above:.0f} times as long" if ours_above > 0 else "and ramlock's is not longer"
        console.print(
            f"Above {name} the monitor was silent {ours_above:.2f} ms, with gdb {gdbs_above:.0f} ms: {ratio}."
        )


if __name__ == "__main__":
    main()
