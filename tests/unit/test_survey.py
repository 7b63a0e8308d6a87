"""Every VM at once: one that hangs costs the others nothing, also when one looks again and again."""
# SPDX-License-Identifier: GPL-2.0-or-later

import threading
from pathlib import Path
from typing import Any

import pytest

from ramlock import survey
from ramlock.deadline import Deadline
from tests.unit.test_procfs import make

QEMU = "/usr/bin/qemu-system-x86_64"


def test_one_that_hangs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for pid in (5, 6):
        make(tmp_path, pid, QEMU, "-name", f"vm-{pid}", "-m", "1G")
    make(tmp_path, 7, "bash", exe="/bin/bash")
    look, released, begun = survey.look, threading.Event(), []

    def hanging(pid: int, deadline: Deadline, *more: Any, **options: Any) -> survey.Seen | None:
        if pid == 5:
            begun.append(pid)
            released.wait(60)
        return look(pid, deadline, *more, **options)

    monkeypatch.setattr(survey, "look", hanging)
    try:
        for _ in range(3):
            one, two = survey.survey(0.5, tmp_path)
            assert (one.pid, one.name, one.problem) == (5, None, "no answer")
            assert (two.pid, two.name, two.ram, two.shim, two.problem) == (6, "vm-6", 1 << 30, False, None)
        assert begun == [5]
    finally:
        released.set()
    end = Deadline(30)
    while (one := survey.survey(10, tmp_path)[0]).name is None and not end.expired:
        pass
    assert (one.name, one.shim, one.problem) == ("vm-5", False, None)


def test_one_that_has_ended_and_one_whose_memory_nobody_understands(tmp_path: Path) -> None:
    make(tmp_path, 5, QEMU, state="Z")
    make(tmp_path, 6, QEMU, "-m", "nonsense")
    (seen,) = survey.survey(10, tmp_path)
    assert (seen.pid, seen.ram) == (6, None)
