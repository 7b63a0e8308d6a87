"""A low CPU priority while ramlock looks, and the usual one in a hurry; each in a process of its own."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import os, resource, sys
from pathlib import Path
from ramlock import priority
proc, capabilities, niceness = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
(proc / str(os.getpid())).mkdir()
(proc / str(os.getpid()) / "status").write_text(f"CapEff:\\t{capabilities}\\n")
resource.setrlimit(resource.RLIMIT_NICE, (0, 0))
def nice():
    return os.getpriority(os.PRIO_PROCESS, 0)
os.setpriority(os.PRIO_PROCESS, 0, niceness)
priority.give_way(proc)
priority.give_way(proc)
looking = nice()
with priority.hurry():
    urgent = nice()
print(looking, urgent, nice())
"""
SYS_NICE = "0000000000800000"


def run(proc: Path, capabilities: str, niceness: int) -> list[int]:
    """The priority while looking, in a hurry, and afterwards; with these effective capabilities as /proc says."""
    words = [sys.executable, "-c", SCRIPT, str(proc), capabilities, str(niceness)]
    return [int(word) for word in subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()]


def test_gives_way_and_comes_back_for_a_moment(tmp_path: Path) -> None:
    usual = max(os.getpriority(os.PRIO_PROCESS, 0), 0)
    assert usual < 10, "these tests are run at a low priority already"
    looking, urgent, after = run(tmp_path, SYS_NICE, usual)
    assert looking == after == usual + 10
    # An ordinary user's tests only say that they have the right.
    assert urgent == (usual if os.geteuid() == 0 else looking)


def test_who_could_not_come_back_does_not_give_way(tmp_path: Path) -> None:
    assert run(tmp_path, "0", 3) == [3] * 3


def test_who_is_low_already_stays_there(tmp_path: Path) -> None:
    assert run(tmp_path, SYS_NICE, 12) == [12] * 3
