"""Why the kernel keeps us out of a process."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os

import pytest

from ramlock import procfs, rights
from ramlock.rights import Facts

ALL = (1 << 41) - 1
OURS = Facts(7, 1000, 0, (1000, 1000, 1000, 1000), 0, 1000, 0)


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        (OURS._replace(uids=(0, 0, 0, 0)), r"another user \(uid 0\)"),
        (OURS._replace(uids=(1000, 0, 0, 0)), r"another user \(uid 0\)"),
        (OURS._replace(owner=0), "not dumpable"),
        (OURS._replace(yama=1), "ptrace_scope is 1"),
        (OURS._replace(yama=2), "ptrace_scope is 2"),
        (OURS._replace(yama=3), "everybody"),
        (OURS._replace(uid=0, capabilities=ALL, yama=3), "everybody"),
        (OURS._replace(uid=0, capabilities=ALL & ~(1 << rights.CAP_SYS_PTRACE), yama=1), "lacks the capability"),
        (OURS._replace(permitted=1 << 12), "capabilities that this user lacks"),
        (OURS, "security module"),
        (OURS._replace(uid=0, capabilities=ALL), "security module"),
    ],
)
def test_each_rule_is_named(facts: Facts, says: str) -> None:
    error = rights.explain(facts)
    assert error.exit_code == 7
    assert "the kernel forbids to trace process 7: " in error.message
    with pytest.raises(type(error), match=says):
        raise error
    assert error.hint


def test_facts_of_our_own() -> None:
    found = rights.facts(procfs.read(os.getpid()))
    assert (found.pid, found.uid, found.owner) == (os.getpid(), os.geteuid(), os.geteuid())
    assert found.yama in range(4)
