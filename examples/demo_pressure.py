#!/usr/bin/env python3
"""What a guarantee is worth (`make demo-pressure`): two guests share too little memory, one of them has a guarantee.

Both run in one memory cgroup that is smaller than what they use, with swap in compressed RAM, and do the same work
twice: without any guarantee, and with one for the first guest. With --plot the figures are drawn as well.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from tests.qemu import sharing
from tests.qemu.guest import MIB, RAMLOCK, Guest, GuestError
from tests.qemu.pressure import Confined, Zram, can_swap, hierarchy
from tests.qemu.sharing import Borne

MEMORY = 512 * MIB
WORKING_SET = 320 * MIB
LIMIT = 832 * MIB
SWAP = 2048 * MIB
SECONDS = 10.0
NAMES = ("gold", "other")
SIGNALS = (signal.SIGINT, signal.SIGTERM)

console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)

Figure = tuple[str, Callable[[Borne], float], str]
FIGURES: tuple[Figure, ...] = (
    ("major page faults", lambda b: b.faults, "{:,.0f}"),
    ("guest RAM in swap, MiB", lambda b: b.swapped / MIB, "{:,.0f}"),
    ("QEMU's own in swap, MiB", lambda b: b.others_swapped / MIB, "{:,.0f}"),
    ("page touch, p99, ms", lambda b: b.touch(99) * 1e3, "{:,.2f}"),
    ("page touch, p99.9, ms", lambda b: b.touch(99.9) * 1e3, "{:,.2f}"),
    ("page touch, longest, ms", lambda b: b.touch(100) * 1e3, "{:,.2f}"),
    ("rounds of work done", lambda b: b.rounds, "{:,.0f}"),
)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits while something is made that has to be put back."""
    former = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, former)


def interrupted(_number: int, _frame: FrameType | None) -> NoReturn:
    """The first Ctrl-C ends it; while everything is put back, others are for nothing."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def guarantee(name: str) -> None:
    """Guarantees all of a guest's RAM, while it runs. Raises GuestError."""
    words = ["set", "all", "--vm", name]
    console.print(f"\n[dim]$[/] [bold cyan]ramlock {' '.join(words)}[/]")
    code = subprocess.run([str(RAMLOCK), *words], stdin=subprocess.DEVNULL, timeout=120, check=False).returncode
    if code:
        raise GuestError(f"ramlock ended with {code}")


def show(before: list[Borne], after: list[Borne], kills: int) -> None:
    """All figures side by side."""
    table = Table(box=None, padding=(0, 2), header_style="bold")
    table.add_column("")
    for name in NAMES:
        table.add_column(f"{name}\n[dim]no guarantee[/]", justify="right")
    table.add_column(f"{NAMES[0]}\n[green]all guaranteed[/]", justify="right")
    table.add_column(f"{NAMES[1]}\n[dim]no guarantee[/]", justify="right")
    kept = (str(b.guaranteed_swapped) if b.guaranteed else "[dim]none guaranteed[/]" for b in (*before, *after))
    table.add_row("guaranteed bytes in swap", *kept)
    for what, value, form in FIGURES:
        table.add_row(what, *(form.format(value(borne)) for borne in (*before, *after)))
    console.print()
    console.print(table)
    console.print(f"\n{kills} processes killed for want of memory.")


def plot(before: list[Borne], after: list[Borne], path: Path) -> None:
    """The same as bars."""
    import matplotlib as mpl
    from matplotlib import pyplot as plt

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "ramlock"})
    shown = [
        ("major page faults", FIGURES[0][1], "{:,.0f}"),
        ("guest RAM in swap, MiB", FIGURES[1][1], "{:,.0f}"),
        ("page touch in the guest, p99.9, ms", FIGURES[4][1], "{:,.2f}"),
    ]
    figure, axes = plt.subplots(1, len(shown), figsize=(9, 3.2))
    for axis, (title, value, form) in zip(axes, shown, strict=True):
        for at, (name, colour) in enumerate(zip(NAMES, ("#2166ac", "#bbbbbb"), strict=True)):
            values = [value(before[at]), value(after[at])]
            bars = axis.bar([place + (at - 0.5) * 0.38 for place in (0, 1)], values, 0.36, color=colour, label=name)
            axis.bar_label(bars, [form.format(v) for v in values], fontsize=8, padding=2)
        axis.set_xticks((0, 1), ("no guarantee", f"all of {NAMES[0]}\nguaranteed"), fontsize=9)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        axis.margins(y=0.15)
    axes[2].set_yscale("log")
    axes[2].minorticks_off()
    axes[2].yaxis.set_major_formatter("{x:g}")
    axes[1].legend(frameon=False, fontsize=8, loc="upper left")
    figure.suptitle("Two guests that share too little memory, the same work before and after", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})
    path.write_text("\n".join(line.rstrip() for line in path.read_text().splitlines()) + "\n")


def run(stack: ExitStack) -> tuple[list[Borne], list[Borne], int]:
    """Both rounds, and how many processes were killed for want of memory."""
    with undisturbed():
        stack.enter_context(Zram(SWAP))
        group = stack.enter_context(Confined(LIMIT))
    console.print(
        f"Two guests of {MEMORY // MIB} MiB that use {WORKING_SET // MIB} MiB each, in one cgroup of "
        f"{LIMIT // MIB} MiB; swap in compressed RAM."
    )
    guests: list[Guest] = []
    for name in NAMES:
        with console.status(f"booting {name}, without hardware acceleration"):
            guests.append(stack.enter_context(sharing.guest_in(group, name, MEMORY)))
    with console.status("writing to all of it"):
        for guest in guests:
            sharing.fill(guest, WORKING_SET)
    with console.status("the same work for both, nothing guaranteed"):
        before = sharing.work(guests, SECONDS)
    guarantee(NAMES[0])
    with console.status(f"the same work for both, {NAMES[0]} has a guarantee"):
        after = sharing.work(guests, SECONDS)
    return before, after, group.kills()


def main() -> int:
    """Runs it; 0 when the guarantee was kept and nobody was killed."""
    parser = argparse.ArgumentParser(description="Two guests that share too little memory, one with a guarantee.")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the figures into this file")
    plot_to: Path | None = parser.parse_args().plot
    if not can_swap() or hierarchy() is None:
        console.print("This needs root, zram (modprobe zram) and a memory cgroup that it may make a child of.")
        return 1
    for number in SIGNALS:
        signal.signal(number, interrupted)
    began = time.monotonic()
    try:
        with ExitStack() as stack:
            before, after, kills = run(stack)
        show(before, after, kills)
        if plot_to:
            plot(before, after, plot_to)
    except KeyboardInterrupt:
        console.print("\nstopped; VMs, swap and cgroup are gone")
        return 130
    except (GuestError, OSError, subprocess.SubprocessError) as error:
        console.print("failed:", str(error), markup=False)
        return 1
    kept = after[0].guaranteed >= MEMORY and not after[0].guaranteed_swapped and not kills
    word = "[green]Kept[/]" if kept else "[red]Not kept[/]"
    console.print(f"{word}; {time.monotonic() - began:.0f} s; VMs, swap and cgroup are gone.")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
