#!/usr/bin/env python3
"""The demonstration (`make demo`): a Linux guest's memory guarantee goes up and down while it runs, and holds.

The commands on the screen are the ones that are run. What the kernel says comes from /proc, not from ramlock.
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from rich.console import Console
from rich.table import Table
from rich.text import Text
from tests.qemu import truth
from tests.qemu.guest import GIB, MIB, RAMLOCK, Guest, GuestError
from tests.qemu.silence import Silence

MEMORY = 2 * GIB
# What the shim may hold beyond the guarantee.
SLACK = 4 * MIB

console = Console(highlight=False, width=None if sys.stdout.isatty() else 100)


def mib(size: int) -> str:
    """A size as people read it."""
    return f"{size / MIB:,.1f} MiB"


def step(text: str) -> None:
    """A headline."""
    console.print()
    console.rule(Text(text, style="bold"), align="left", style="dim")


def typed(*words: str) -> None:
    """A command line, as one would type it."""
    console.print(Text.assemble(("$ ", "dim"), (" ".join(words), "bold cyan")))


def ramlock(*words: str) -> None:
    """Runs the ramlock command for all to see; it draws its own progress bar. Raises GuestError when it fails."""
    typed("ramlock", *words)
    code = subprocess.run([str(RAMLOCK), *words], stdin=subprocess.DEVNULL, timeout=120, check=False).returncode
    if code:
        raise GuestError(f"ramlock ended with {code}")


def status(guest: Guest) -> dict[str, Any]:
    """What `ramlock status --json` says."""
    command = [str(RAMLOCK), "status", "--pid", str(guest.pid), "--json"]
    output = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout
    reply: dict[str, Any] = json.loads(output)
    return reply


def compare(guest: Guest, asked: int) -> None:
    """Ramlock's word next to the kernel's. Raises GuestError where they do not agree."""
    said = status(guest)["locked"]
    held = truth.locked(guest.pid)
    rows = [
        ("asked for", "ramlock set", asked, None),
        ("ramlock says: locked", "ramlock status --json", said, asked <= said <= asked + SLACK),
        (
            "kernel says: locked",
            f"VmLck of /proc/{guest.pid}/status",
            held.vm_lck,
            asked <= held.vm_lck <= asked + SLACK,
        ),
        (
            "kernel says: locked and resident",
            "smaps, VmFlags lo: Rss",
            held.resident,
            asked <= held.resident <= asked + SLACK,
        ),
        ("kernel says: of these in swap", "smaps, VmFlags lo: Swap", held.swap, held.swap == 0),
    ]
    table = Table(box=None, padding=(0, 2), header_style="dim")
    for name in ("", "from", "amount", ""):
        table.add_column(name, justify="right" if name == "amount" else "left")
    for what, source, size, good in rows:
        mark = "" if good is None else "[green]✓[/]" if good else "[red]✗[/]"
        table.add_row(what, f"[dim]{source}[/]", mib(size), mark)
    console.print(table)
    if not all(good for *_, good in rows if good is not None):
        raise GuestError("ramlock and the kernel do not agree")


def retarget(guest: Guest, name: str) -> None:
    """Asks for much, and changes its mind before it is there."""
    much = ["set", "1792M", "--vm", name, "--no-wait"]
    typed("ramlock", *much)
    first = subprocess.Popen([str(RAMLOCK), *much], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 60
        while (held := truth.vm_lck(guest.pid)) < 300 * MIB:
            if time.monotonic() > deadline:
                raise GuestError("nothing was locked in time")
            time.sleep(0.002)
    finally:
        first.wait(60)
    console.print(f"  [dim]{mib(held)} of it are locked already, and another value comes:[/]")
    ramlock("set", "512M", "--vm", name)
    compare(guest, 512 * MIB)


def free_name() -> str:
    """A name that no VM here has."""
    for name in ("demo", f"demo-{os.getpid()}"):
        look = subprocess.run([str(RAMLOCK), "status", "--vm", name], capture_output=True, timeout=60, check=False)
        if look.returncode == 6:
            break
    return name


def may_lock() -> None:
    """Locking memory takes a right that an ordinary user has little of: get it by sudo, or say how. May exit."""
    _, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    capable = int(truth.status(os.getpid(), "CapEff"), 16) >> 14 & 1  # CAP_IPC_LOCK
    if capable or hard == resource.RLIM_INFINITY or hard >= MEMORY:
        return
    raise_it = ["sudo", "prlimit", "--pid", str(os.getpid()), f"--memlock={MEMORY}:{MEMORY}"]
    if shutil.which("sudo") and subprocess.run(raise_it, check=False).returncode == 0:
        return
    console.print(f"This user may lock {mib(hard)} only. As root: {' '.join(raise_it[1:3])} PID {raise_it[4]}")
    sys.exit(1)


def show(guest: Guest, name: str, booted: float) -> None:
    """The story, from the first uptime to the last."""
    began, first = time.monotonic(), guest.agent.uptime()
    guest.agent.ask(f"touch {512 * MIB}")
    console.print(
        f"  Linux is up after {booted:.1f} s, pid {guest.pid}, and has written a pattern into 512 MiB of its memory."
    )
    compare(guest, 0)

    with Silence(guest.monitor) as idle:
        time.sleep(3)
    with Silence(guest.monitor) as busy:
        step("Up: guarantee 1 GiB of its 2 GiB, while it runs")
        ramlock("set", "1G", "--vm", name)
        compare(guest, GIB)
        ramlock("status", "--vm", name)

        step("Down: 256 MiB")
        ramlock("set", "256M", "--vm", name)
        compare(guest, 256 * MIB)

        step("A change of mind in mid-flight: 1.75 GiB; no, 512 MiB")
        retarget(guest, name)

    step("And the guest?")
    last, passed = guest.agent.uptime(), time.monotonic() - began
    verified = int(guest.agent.ask("verify"))
    table = Table(box=None, padding=(0, 2), show_header=False)
    table.add_row("its uptime went on", f"{first:.1f} s → {last:.1f} s", f"[dim]{passed:.1f} s passed here[/]")
    table.add_row("its memory", f"{mib(verified)} verified", "[dim]every page as it was written[/]")
    table.add_row("QEMU's monitor answered", f"{busy.asked:,} questions", "[dim]while all this went on[/]")
    table.add_row(
        "the longest wait for an answer",
        f"{busy.longest * 1000:.1f} ms",
        f"[dim]{idle.longest * 1000:.1f} ms when nothing was done[/]",
    )
    console.print(table)


def terminated(_number: int, _frame: FrameType | None) -> NoReturn:
    """A polite end by a signal cleans up as well."""
    raise KeyboardInterrupt


def main() -> int:
    """Runs it; 0 when everything agreed."""
    signal.signal(signal.SIGTERM, terminated)
    may_lock()
    began = time.monotonic()
    name = free_name()
    console.print("[bold]ramlock[/]: a guaranteed amount of guest RAM, changed while the VM runs")
    try:
        guest = Guest(boot=True, memory=MEMORY, args=["-name", name, "-smp", "2"])
        step("Launch an unmodified QEMU: 2 GiB of memory, nothing guaranteed yet")
        typed("ramlock", "run", "--", "qemu-system-x86_64", "-accel tcg", "-m 2G", "-smp 2", f"-name {name}", "...")
        with console.status("booting Linux, without hardware acceleration"):
            guest.__enter__()
        try:
            show(guest, name, time.monotonic() - began)
        finally:
            guest.close()
    except KeyboardInterrupt:
        console.print("\nstopped; the VM is gone and nothing is left behind")
        return 130
    except (GuestError, OSError, subprocess.SubprocessError) as error:
        console.print(f"[red]failed[/]: {error}", markup=True)
        return 1
    console.print(f"\n[green]Done[/] in {time.monotonic() - began:.0f} s; the VM is gone and nothing is left behind.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
