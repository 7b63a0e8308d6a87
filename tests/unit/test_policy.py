"""A policy: what its file may say, which table counts for a VM, and what it comes to."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import threading
from pathlib import Path

import pytest

from ramlock import policy
from ramlock.errors import PolicyError, TooMuch
from ramlock.policy import Known, Policy, Rule, decide
from ramlock.sizes import Size

GIB = 1 << 30
UUID = "0c9f3bb2-5d0f-4a5f-9f1c-3f3f1f2a7b11"

GOOD = f"""
uids = [107, 1000]
host-reserve = "4G"

[vm."web-*"]
guarantee = "2G"
priority = 10

[vm.web-1]
guarantee = "25%"

[vm.'{UUID.upper()}']
guarantee = "all"

[vm."*"]
guarantee = 0
"""


def test_a_pipe(tmp_path: Path) -> None:
    """Whoever asks once may wait for one, as of <(...); the daemon would for ever."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(PolicyError, match="no regular file"):
        policy.load(pipe, regular=True)
    writer = threading.Thread(target=pipe.write_text, args=(GOOD,))
    writer.start()
    try:
        assert policy.load(pipe) == policy.parse(GOOD, str(pipe))
    finally:
        writer.join(10)


def test_a_good_one() -> None:
    rules = policy.parse(GOOD)
    assert rules.uids == {107, 1000}
    assert rules.host_reserve == 4 * GIB
    assert [(rule.size, rule.priority, rule.line) for rule in rules.rules] == [
        (Size("bytes", 2 * GIB), 10, 5),
        (Size("percent", 25), 0, 9),
        (Size("all"), 0, 12),
        (Size("bytes", 0), 0, 15),
    ]


@pytest.mark.parametrize(
    ("name", "uuid", "pattern"),
    [
        ("web-2", None, "web-*"),
        ("web-1", None, "web-1"),
        ("web-1", UUID, UUID.upper()),
        (None, UUID, UUID.upper()),
        ("db", None, "*"),
        ("WEB-2", None, "*"),
        (UUID, None, "*"),
    ],
)
def test_which_table_counts(name: str | None, uuid: str | None, pattern: str) -> None:
    rule = policy.parse(GOOD).match(name, uuid)
    assert rule is not None
    assert rule.pattern == pattern


def test_none_counts() -> None:
    rules = policy.parse('[vm.db]\nguarantee = "1G"\n')
    assert rules.match("web", None) is None
    assert rules.match(None, None) is None
    assert policy.parse("").match("db", UUID) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[vm.web\n", "line 1"),
        ('[vm.web]\nguarantee = "2G"\n[vm.web]\n', "line 3"),
        ("[vm.web]\n", 'line 1, [vm."web"] says no guarantee'),
        ('\n[vm.web]\nguarantee = "2GB"\n', "line 3, [vm.\"web\"]: '2GB' is ambiguous"),
        ("[vm.web]\nguarantee = 2048\n", "less than any guest"),
        ("[vm.web]\nguarantee = true\n", "is no size"),
        ("[vm.web]\nguarantee = [1]\n", "is no size"),
        ('[vm.web]\nguarantee = "1G"\npriority = "high"\n', "line 3"),
        ('[vm.web]\nguarantee = "1G"\npriority = true\n', "priority is no number"),
        ('[vm.web]\nguarante = "1G"\n', "line 2, [vm.\"web\"]: 'guarante' is unknown"),
        ('[vm.a.b]\nguarantee = "1G"\n', "has a table in it"),
        ("vm = 3\n", "line 1: vm is no table"),
        ("[vm]\nweb = 3\n", '[vm."web"] is no table'),
        ("[vms.web]\n", "'vms' is unknown"),
        ("uids = 3\n", "line 1: uids"),
        ("uids = [-1]\n", "uids"),
        ("uids = [true]\n", "uids"),
        ('host-reserve = "all"\n', "takes bytes"),
        ('[vm."e\\u001b[2J"]\n', "e\\x1b[2J"),
        ("[" * 100_000, "not TOML"),
        ("[vm.web]\nguarantee = " + "9" * 5000, "not TOML"),
    ],
)
def test_a_bad_one_names_its_place(text: str, says: str) -> None:
    with pytest.raises(PolicyError) as error:
        policy.parse(text, "p.toml")
    assert says in error.value.message
    assert error.value.message.startswith("p.toml")
    assert error.value.hint
    assert error.value.exit_code == 2
    assert error.value.message.isprintable()


def test_files(tmp_path: Path) -> None:
    file = tmp_path / "p.toml"
    for data in (None, b"\xff", b"#" * (1 << 21)):
        if data is not None:
            file.write_bytes(data)
        with pytest.raises(PolicyError):
            policy.load(file)
    with pytest.raises(PolicyError):
        policy.load(tmp_path)


def rule(size: str, priority: int = 0, pattern: str = "*") -> Rule:
    return Rule(pattern, policy.parse_size(size), priority)


def vm(pid: int, has: Rule | None, requested: int | None = 0, ram: int = 4 * GIB, **more: object) -> Known:
    return Known(pid, f"vm-{pid}", has, ram, requested, **more)  # type: ignore[arg-type]


def steps(*everyone: Known, limit: int | None = 100 * GIB, prune: bool = False) -> list[tuple[int, int, bool]]:
    plan = decide(Policy(()), everyone, limit, prune=prune)
    assert not plan.refused
    return [(step.vm.pid, step.want, step.done) for step in plan.steps]


def test_lowering_comes_first_then_priority() -> None:
    everyone = [vm(1, rule("2G", 1)), vm(2, rule("2G", 5)), vm(3, rule("1G", 0), 2 * GIB), vm(4, rule("50%"), 2 * GIB)]
    assert steps(*everyone) == [(3, GIB, False), (2, 2 * GIB, False), (1, 2 * GIB, False), (4, 2 * GIB, True)]


def test_what_is_so_already() -> None:
    assert steps(vm(1, rule("all"), 4 * GIB, all=True), vm(2, rule("0"), None)) == [(1, 4 * GIB, True), (2, 0, True)]
    assert steps(vm(1, rule("all"), 4 * GIB)) == [(1, 4 * GIB, False)]
    assert steps(vm(1, rule("4G"), 4 * GIB, all=True)) == [(1, 4 * GIB, False)]
    assert steps(vm(1, rule("33%"), 4 * GIB * 33 // 100 - 4095)) == [(1, 4 * GIB * 33 // 100, True)]


def test_prune() -> None:
    left = vm(1, None, GIB)
    assert steps(left) == []
    assert steps(left, vm(2, None, None), vm(3, None, 0), prune=True) == [(1, 0, False)]


def test_more_than_guest_ram_is_impossible() -> None:
    plan = decide(Policy(()), [vm(1, rule("5G")), vm(2, rule("1G"))], None)
    assert [step.vm.pid for step in plan.steps] == [2]
    (who, error), *_ = plan.refused
    assert who is not None
    assert who.pid == 1
    assert error.exit_code == 4
    assert "guest RAM" in error.message


def test_a_name_that_two_have() -> None:
    web = rule("1G", pattern="web")
    plan = decide(Policy(()), [vm(1, web), vm(2, web), vm(3, rule("1G"))], None)
    assert [step.vm.pid for step in plan.steps] == [3]
    assert all("1, 2" in error.message for _, error in plan.refused)


def test_memory_is_short_and_priority_decides() -> None:
    everyone = [vm(1, rule("4G", 10)), vm(2, rule("4G", 5)), vm(3, rule("2G", 5)), vm(4, rule("1G", 0))]
    plan = decide(Policy(()), everyone, 7 * GIB)
    assert not plan.refused
    wants = {step.vm.pid: (step.want, step.cut) for step in plan.steps}
    assert wants == {1: (4 * GIB, False), 2: (2 * GIB, True), 3: (GIB, True), 4: (0, True)}


def test_memory_is_short_and_nobody_has_priority() -> None:
    plan = decide(Policy(()), [vm(1, rule("4G")), vm(2, rule("4G"))], 7 * GIB)
    ((who, error),) = plan.refused
    assert who is None
    assert isinstance(error, TooMuch)
    assert (error.exit_code, error.never) == (4, True)
    assert len(error.details) == 2


def test_what_others_hold_counts() -> None:
    """By the kernel's word, also of VMs that are not ours or do not answer; huge pages are set aside already."""
    other, silent = vm(8, None, None, locked=2 * GIB), vm(9, rule("1G"), 0, locked=2 * GIB, trouble="no answer")
    assert decide(Policy(()), [vm(1, rule("4G")), other, silent], 7 * GIB).refused
    plan = decide(Policy(()), [vm(1, rule("4G")), other, silent], 8 * GIB)
    assert not plan.refused
    assert [one.pid for one in plan.waiting] == [9]
    assert steps(vm(1, rule("4G"), hugetlb=4 * GIB), vm(2, rule("1G")), limit=GIB) == [
        (1, 4 * GIB, False),
        (2, GIB, False),
    ]
