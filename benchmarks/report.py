#!/usr/bin/env python3
"""Makes docs/benchmarks.md, docs/stall.svg and docs/speed.svg of what lock.py measured last (`make bench`).

With --quick it makes them of a quick look (`make bench QUICK=1`), and in build/bench/quick.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib as mpl
from bench import WATCHERS, Measured, Samples, measured_of, pool
from lock import KINDS, QUICK, RESULTS
from matplotlib import pyplot as plt
from tests.qemu.guest import GIB, MIB, ROOT

mpl.use("svg")
mpl.rcParams["svg.fonttype"] = "none"

PAGE = ROOT / "docs/benchmarks.md"
BEGIN, END = "<!-- written by benchmarks/report.py: begin -->", "<!-- end -->"
LOCK_WATCHERS = ("mmap in QEMU", "read of guest RAM")
WAYS = ("main thread", "own thread", "ramlock", "spinner", "idle")
COLOURS = dict(zip(WAYS, ("#b2182b", "#ef8a62", "#2166ac", "#999999", "#cccccc"), strict=True))


class Run:
    """What was measured of one kind of memory."""

    def __init__(self, path: Path) -> None:
        data: dict[str, Any] = json.loads(path.read_text())
        self.kind: str = data["kind"]
        self.size: int = data["size"]
        self.rounds: int = data["rounds"]
        self.machine = f"{data['machine']}, {data['accel'].upper()}, {data['date']}"
        self.shim: str = data["shim"]
        self.wakeups: list[int] = data["wakeups"]
        self.events: dict[str, list[dict[str, int]]] = data["events"]
        self.measured = {name: [measured_of(m) for m in many] for name, many in data["measured"].items()}

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.size / GIB:.0f} GiB"

    def median(self, way: str, of: Callable[[Measured], float]) -> float:
        return statistics.median(of(m) for m in self.measured[way])

    def ratio(self, one: str, other: str, of: Callable[[Measured], float]) -> float:
        """Median over the measurements of what `one` had in it against what `other` had."""
        pairs = zip(self.measured[one], self.measured[other], strict=True)
        return statistics.median(of(a) / max(of(b), 1e-9) for a, b in pairs)

    def pooled(self, way: str, watcher: str) -> Samples:
        return pool([m.waits[watcher] for m in self.measured[way] if watcher in m.waits])

    def rate(self, way: str) -> float:
        """GiB/s: median over the rounds."""
        return self.size / GIB / self.median(way, wall)


def worst(m: Measured) -> float:
    return m.worst


def wall(m: Measured) -> float:
    return m.wall


def cpu(m: Measured) -> float:
    return m.cpu


def allocation_rate(m: Measured) -> float:
    """Bytes per second."""
    return m.grown / m.wall


def lock_wait(m: Measured) -> float:
    """The longest wait of those who need mmap_lock and nothing else."""
    return max(m.waits[watcher].longest for watcher in LOCK_WATCHERS)


def longest_of(watcher: str) -> Callable[[Measured], float]:
    return lambda m: m.waits[watcher].longest


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines.insert(1, "|" + "---|" * (lines[0].count("|") - 1))
    return "\n".join(lines) + "\n"


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.2g} ms"


def times(value: float) -> str:
    return f"{value:,.0f} x" if value >= 10 else f"{value:.2f} x"


def goals(run: Run) -> list[list[str]]:
    """Each goal, what it came to, whether it was met, and what would be the most that can be measured here."""
    rows: list[list[str]] = []

    def judge(
        text: str, value: float, met: bool, show: Callable[[float], str] = times, limit: tuple[str, float] | None = None
    ) -> None:
        best = f"{limit[0]}: {times(limit[1])}" if limit else ""
        rows.append([run.title, text, show(value), "yes" if met else "**no**", best])

    def tell(text: str, one: str, other: str) -> None:
        """What is no goal, but takes the machine's own noise out of one: only those who wait for mmap_lock count."""
        idle = "idle, lowering" if "lowering" in one else "idle"
        limit = f"idle: {times(run.ratio(one, idle, lock_wait))}"
        rows.append([run.title, text, times(run.ratio(one, other, lock_wait)), "", limit])

    for way, least, name in (
        ("main thread", 1000, "mlock on the main thread"),
        ("own thread", 100, "one mlock beside it"),
    ):
        value, limit = run.ratio(way, "ramlock", worst), run.ratio(way, "idle", worst)
        judge(f"worst stall against {name}: {least:,} x shorter", value, value >= least, limit=("idle", limit))
        tell("... counting those alone who wait for mmap_lock", way, "ramlock")
    for watcher in ("QMP round trip", "guest clock gap"):
        ours, spins, idle = (run.pooled(way, watcher).percentile() for way in ("ramlock", "spinner", "idle"))
        judge(
            f"{watcher}, p99.9, against a spinner: within 1.1 x",
            ours / spins,
            ours <= 1.1 * spins,
            times,
            ("idle", idle / spins),
        )
        ours, spins, idle = (run.pooled(way, watcher).percentile(99) for way in ("ramlock", "spinner", "idle"))
        rows.append([run.title, "... the same, p99", times(ours / spins), "", f"idle: {times(idle / spins)}"])
    # Nobody does better than a thread that touches no memory; where that was not measured, one mlock() tells as much.
    other = "spinner" if "spinner alone" in run.measured else "own thread"
    ours, theirs, idle = (
        run.pooled(way, "guest clock gap").percentile() for way in ("ramlock alone", f"{other} alone", "idle alone")
    )
    judge(
        "a processor to spare: guest clock gap, p99.9, against idle: within 1.5 x",
        ours / idle,
        ours <= 1.5 * idle,
        limit=(other, theirs / idle),
    )

    def watched(one: str, other: str) -> None:
        """Gaps are for those who wait; speed is judged where nobody does, so this says what it is where they do."""
        text = "... while everybody asks, maps and reads"
        rows.append([run.title, text, times(run.ratio(one, other, wall)), "", ""])

    value, limit = (
        run.ratio("own thread alone", "ramlock alone", wall),
        run.ratio("own thread alone", "ramlock alone", cpu),
    )
    judge("throughput against one mlock: 0.95 x", value, value >= 0.95, limit=("by processor time", limit))
    watched("own thread", "ramlock")
    if "idle guest: ramlock, 2 threads" in run.measured:
        # The rival has only the DIMM to do, the guarantee is for all of guest RAM: so what each allocated in a second.
        value = run.ratio("idle guest: ramlock, 2 threads", "idle guest: prealloc, 2 threads", allocation_rate)
        judge("2 threads against prealloc-threads=2: 0.95 x", value, value >= 0.95)
    if run.kind == "resident":
        grown = max(m.grown for m in run.measured["ramlock"]) / MIB
        judge("RSS grows by less than 16 MiB", grown, grown < 16, lambda v: f"{v:.1f} MiB")
        judge("at least 5 GiB/s", run.rate("ramlock alone"), run.rate("ramlock alone") >= 5, lambda v: f"{v:.1f} GiB/s")
    value = run.ratio("own thread alone, lowering", "ramlock alone, lowering", wall)
    limit = run.ratio("own thread alone, lowering", "ramlock alone, lowering", cpu)
    judge("lowering: speed against one munlock: 0.9 x", value, value >= 0.9, limit=("by processor time", limit))
    watched("own thread, lowering", "ramlock, lowering")
    value, limit = (
        run.ratio("own thread, lowering", "ramlock, lowering", worst),
        run.ratio("own thread, lowering", "idle, lowering", worst),
    )
    judge("lowering: worst stall 100 x shorter", value, value >= 100, limit=("idle", limit))
    tell("... counting those alone who wait for mmap_lock", "own thread, lowering", "ramlock, lowering")
    judge("wakeups in 10 s with guarantee 0: none", run.wakeups[0], not run.wakeups[0], lambda v: f"{v:.0f}")
    rows.append([run.title, "... with one that is held: its audit each 5 s", f"{run.wakeups[1]}", "", ""])
    return rows


def stalls(run: Run) -> str:
    rows = []
    for way in (*WAYS, "own thread, lowering", "ramlock, lowering"):
        waits = [run.median(way, longest_of(watcher)) for watcher in WATCHERS]
        rows.append([way, ms(run.median(way, worst)), *(ms(wait) for wait in waits), ms(run.median(way, wall))])
    text = table(["", "worst stall", *WATCHERS, "took"], rows)
    unserved = statistics.median(m.unserved / m.wall for m in run.measured["ramlock"])
    if unserved:
        text += f"\nFor {unserved:.0%} of its time ramlock's thread was ready to run and had no processor."
        text += f" The spinner burnt {run.ratio('spinner', 'ramlock', cpu):.0%} of ramlock's processor time.\n"
    rows = [[way, *(ms(run.pooled(way, watcher).percentile()) for watcher in WATCHERS)] for way in WAYS]
    return f"Longest waits, medians of {run.rounds} rounds:\n\n{text}\np99.9 over all rounds:\n\n" + table(
        ["", *WATCHERS], rows
    )


def under_kvm(run: Run) -> str:
    """KVM's own account, when there is one: what counted most, per round."""
    sums = {
        way: {name: statistics.median(e.get(name, 0) for e in many) for name in many[0]}
        for way, many in run.events.items()
        if many and many[0]
    }
    names = sorted({n for s in sums.values() for n in s}, key=lambda n: -max(s.get(n, 0) for s in sums.values()))[:12]
    if not names:
        return ""
    return "\nKVM's counters (exits, faults, MMU notifiers), medians:\n\n" + table(
        ["", *names], ([way, *(f"{s.get(n, 0):,.0f}" for n in names)] for way, s in sums.items() if way in WAYS)
    )


def plot_stalls(runs: list[Run], path: Path) -> None:
    """Worst stalls on a logarithmic scale: one panel for each kind of memory, a bar for each way."""
    figure, axes = plt.subplots(1, len(runs), figsize=(2.6 * len(runs) + 1, 3.4), sharey=True, squeeze=False)
    for axis, run in zip(axes[0], runs, strict=True):
        values = [run.median(way, worst) * 1e3 for way in WAYS]
        bars = axis.bar(range(len(WAYS)), values, color=[COLOURS[way] for way in WAYS], width=0.75)
        axis.bar_label(bars, [f"{v:,.0f}" if v >= 10 else f"{v:.1f}" for v in values], padding=2, fontsize=8)
        axis.set_xticks(range(len(WAYS)), WAYS, rotation=35, ha="right", fontsize=8)
        axis.set_title(run.title, fontsize=10)
        axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    axes[0][0].set_ylabel("worst stall, ms (log)")
    figure.suptitle("The longest that anybody had to wait while guest RAM was locked", fontsize=11)
    figure.tight_layout()
    save(figure, path)


def plot_speed(runs: list[Run], path: Path) -> None:
    """Throughput, up and down."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2))
    for axis, down in zip(axes, ("", ", lowering"), strict=True):
        for at, (way, colour) in enumerate((("own thread", COLOURS["own thread"]), ("ramlock", COLOURS["ramlock"]))):
            places = [number + (at - 0.5) * 0.38 for number in range(len(runs))]
            rates = [run.rate(f"{way} alone{down}") for run in runs]
            name = ("one munlock" if down else "one mlock") if way == "own thread" else way
            bars = axis.bar(places, rates, 0.36, color=colour, label=name)
            axis.bar_label(bars, [f"{rate:.1f}" for rate in rates], fontsize=8, padding=2)
        axis.set_xticks(range(len(runs)), [run.title for run in runs], fontsize=8)
        axis.set_title("lowering" if down else "raising", fontsize=10)
        axis.set_ylabel("GiB/s" + (" (log)" if down else ""))
        if down:
            axis.set_yscale("log")
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
        axis.legend(frameon=False, fontsize=8)
    figure.tight_layout()
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    """As SVG, and as PNG among the results."""
    mpl.rcParams["svg.hashsalt"] = "ramlock"
    figure.savefig(path, metadata={"Date": None})
    figure.savefig((QUICK if path.parent == QUICK else RESULTS) / path.with_suffix(".png").name, dpi=110)
    text = path.read_text()
    path.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


def main() -> None:
    """Writes page and plots."""
    results, docs = (QUICK, QUICK) if "--quick" in sys.argv[1:] else (RESULTS, PAGE.parent)
    runs = sorted(
        (Run(path) for path in results.glob("*.json")), key=lambda run: (list(KINDS).index(run.kind), run.size)
    )
    if not runs:
        sys.exit("Nothing was measured yet.\nRun make bench.")
    if len({run.shim for run in runs}) > 1:
        sys.exit(f"The results in {results} are of different shims.\nRemove the older ones.")
    plot_stalls(runs, docs / "stall.svg")
    plot_speed(runs, docs / "speed.svg")
    met = [row for run in runs for row in goals(run)]
    text = [
        "![The longest wait of anybody while guest RAM was locked](stall.svg)\n",
        "![Throughput](speed.svg)\n",
        f"{', '.join(sorted({run.machine for run in runs}))}; interleaved rounds: "
        f"{', '.join(f'{run.title}: {run.rounds}' for run in runs)}. "
        "Ratios are medians of the measurements' ratios; those of percentiles are of all measurements together.\n",
        table(["memory", "goal", "measured", "met", "limit here"], met),
        *(f"### {run.title}\n{stalls(run)}{under_kvm(run)}" for run in runs),
    ]
    page = PAGE.read_text()
    head, _, rest = page.partition(BEGIN)
    tail = rest.partition(END)[2]
    written = docs / PAGE.name
    written.write_text(f"{head}{BEGIN}\n" + "\n".join(text) + f"{END}{tail}")
    judged = [row for row in met if row[3]]
    print(f"{sum(row[3] == 'yes' for row in judged)} of {len(judged)} goals met: {written}")


if __name__ == "__main__":
    main()
