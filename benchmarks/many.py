"""How long `ramlock list` takes with many VMs: real QEMUs without a machine, the shim in each of them.

.venv/bin/python benchmarks/many.py --vms 200
"""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RAMLOCK = ROOT / ".venv/bin/ramlock"
SHIM = ROOT / "injector/ramlock/ramlock.so"
QEMU = ["qemu-system-x86_64", "-accel", "tcg", "-machine", "none", "-S"]
QEMU += ["-nodefaults", "-no-user-config", "-display", "none"]


def asked() -> tuple[float, list[dict[str, object]]]:
    """Seconds that one `ramlock list --json` takes, and what it says."""
    before = time.monotonic()
    out = subprocess.run([RAMLOCK, "list", "--json"], stdout=subprocess.PIPE, check=True, timeout=60).stdout
    return time.monotonic() - before, json.loads(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vms", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    directory = Path(tempfile.mkdtemp(prefix="ramlock-"))
    started = []
    try:
        for number in range(options.vms):
            environ = {**os.environ, "LD_PRELOAD": str(SHIM), "RAMLOCK_SOCKET": str(directory / f"{number}")}
            name = ["-name", f"many-{number}"]
            started.append(subprocess.Popen([*QEMU, *name], env=environ, stdin=subprocess.DEVNULL))
        ours = {process.pid for process in started}
        end = time.monotonic() + 300
        while sum(vm["pid"] in ours and vm["state"] is not None for vm in asked()[1]) < options.vms:
            if time.monotonic() > end:
                raise SystemExit("not all of them answer")
            time.sleep(1)
        rounds = []
        for _ in range(options.rounds):
            seconds, said = asked()
            answered = sum(vm["pid"] in ours and vm["state"] is not None for vm in said)
            rounds.append(seconds)
            print(f"{answered} of {options.vms} VMs answered, {len(said)} seen, in {seconds:.3f} s")
        print(f"median {sorted(rounds)[len(rounds) // 2]:.3f} s")
    finally:
        for process in started:
            process.kill()
        for process in started:
            process.wait()
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
