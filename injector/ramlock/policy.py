"""The policy of a host: which VM is guaranteed how much, and what that comes to. Pure: no process is looked at here.

A policy is a TOML file (docs/policy.md). For a VM counts the table of its UUID, else that of its name, else the first
one in the file whose pattern fits its name.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import difflib
import fnmatch
import os
import re
import stat
import tomllib
from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from ramlock.errors import PolicyError, RamlockError, Refused, SizeError, TooMuch
from ramlock.sizes import MIB, Size, format_apart, format_size, parse_size
from ramlock.text import printable

_FILE_MOST = 1 << 20
_TOP = ("vm", "uids", "host-reserve")
_TABLE = ("guarantee", "priority")
_PRIORITY_MOST = 1_000_000
_EXAMPLE = 'such as:  [vm."web-*"]  guarantee = "2G"'


class Rule(NamedTuple):
    """One table of the file."""

    pattern: str
    size: Size
    priority: int = 0
    line: int = 0

    @property
    def exact(self) -> bool:
        """Whether it names one VM."""
        return not any(char in self.pattern for char in "*?[")

    def __str__(self) -> str:
        return f'[vm."{printable(self.pattern, 80)}"]' + (f" (line {self.line})" if self.line else "")


class Policy(NamedTuple):
    """What a file says."""

    rules: tuple[Rule, ...]
    uids: frozenset[int] = frozenset()
    """Users whose VMs count, besides root's, the caller's and libvirt's."""
    host_reserve: int | None = None
    """Bytes that are left for the host; None: the default."""

    def match(self, name: str | None, uuid: str | None) -> Rule | None:
        """Return the table that counts for a VM, or None."""
        for rule in self.rules:
            if uuid is not None and rule.pattern.lower() == uuid:
                return rule
        if name is None:
            return None
        for rule in self.rules:
            if rule.exact and rule.pattern == name:
                return rule
        return next((r for r in self.rules if not r.exact and fnmatch.fnmatchcase(name, r.pattern)), None)


def load(path: Path, *, regular: bool = False) -> Policy:
    """Read a file. Raises PolicyError, which names the line.

    With `regular` nothing else will do: of a pipe one may wait for ever.
    """
    shown = printable(str(path))
    try:
        with open(os.open(path, os.O_RDONLY | os.O_CLOEXEC | (os.O_NONBLOCK if regular else 0)), "rb") as file:
            if regular and not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise PolicyError(f"{shown} is no regular file", "give the path of a TOML file")
            data = file.read(_FILE_MOST + 1)
        if len(data) > _FILE_MOST:
            raise PolicyError(f"{shown} is larger than any policy", "is it the right file?")
        return parse(data.decode("utf-8"), shown)
    except OSError as error:
        raise PolicyError(f"cannot read the policy {shown}: {error.strerror}", "give the path of a TOML file") from None
    except UnicodeDecodeError:
        raise PolicyError(f"{shown} is not UTF-8 text", f"a policy is a TOML file, {_EXAMPLE}") from None


def parse(text: str, where: str = "the policy") -> Policy:
    """Read a policy. Raises PolicyError, which names the line."""
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # also of a number with thousands of digits
        what = printable(str(error), 200)
        raise PolicyError(f"{where} is not TOML: {what}", f"mend that place; a table is {_EXAMPLE}") from None
    _known(data, _TOP, where, text, None)
    uids = data.get("uids", [])
    if not isinstance(uids, list) or not all(type(uid) is int and 0 <= uid < 2**32 - 1 for uid in uids):
        raise PolicyError(f"{_at(where, text, None, 'uids')}: uids is no list of user ids", "write it as uids = [107]")
    tables = data.get("vm", {})
    if not isinstance(tables, dict):
        raise PolicyError(f"{_at(where, text, None, 'vm')}: vm is no table", f"write {_EXAMPLE}")
    rules = tuple(_rule(pattern, table, where, text) for pattern, table in tables.items())
    reserve = data.get("host-reserve")
    if reserve is not None:
        reserve = _size(reserve, "host-reserve", _at(where, text, None, "host-reserve"))
        if reserve.kind != "bytes" or not reserve.value:
            raise PolicyError(
                f"{_at(where, text, None, 'host-reserve')}: it takes bytes", 'such as host-reserve = "4G"'
            )
    return Policy(rules, frozenset(uids), reserve.value if reserve is not None else None)


def _rule(pattern: str, table: object, where: str, text: str) -> Rule:
    at = _at(where, text, pattern)
    if not isinstance(table, dict):
        raise PolicyError(f"{at} is no table", f"write {_EXAMPLE}")
    if any(isinstance(value, dict) for value in table.values()):
        raise PolicyError(f"{at} has a table in it", f"put a name with a dot in quotes, {_EXAMPLE}")
    _known(table, _TABLE, where, text, pattern)
    if "guarantee" not in table:
        raise PolicyError(f"{at} says no guarantee", 'add  guarantee = "2G"  (or "25%", "all", "0")')
    priority = table.get("priority", 0)
    if type(priority) is not int or abs(priority) > _PRIORITY_MOST:
        place = _at(where, text, pattern, "priority")
        raise PolicyError(f"{place}: priority is no number that can be compared", "write it as priority = 10")
    size = _size(table["guarantee"], "guarantee", _at(where, text, pattern, "guarantee"))
    return Rule(pattern, size, priority, _line(text, pattern, None))


def _size(value: object, key: str, at: str) -> Size:
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PolicyError(f"{at}: {key} is no size", f'write it in quotes, as {key} = "2G"')
    try:
        return parse_size(str(value))
    except SizeError as error:
        raise PolicyError(f"{at}: {error.message}", error.hint) from None


def _known(table: dict[str, Any], keys: tuple[str, ...], where: str, text: str, pattern: str | None) -> None:
    for key in table:
        if key not in keys:
            close = difflib.get_close_matches(key, keys, 1)
            at = _at(where, text, pattern, key)
            known = f"did you mean {close[0]}?" if close else f"what it can have: {', '.join(keys)}"
            raise PolicyError(f"{at}: '{printable(key, 40)}' is unknown", known)


def _at(where: str, text: str, pattern: str | None, key: str | None = None) -> str:
    line = _line(text, pattern, key)
    table = "" if pattern is None else f', [vm."{printable(pattern, 80)}"]'
    return f"{where}{f' line {line}' if line else ''}{table}"


def _line(text: str, pattern: str | None, key: str | None) -> int:
    """Find a table's or a key's line, as tomllib tells none; 0 when it is written in a way not looked for."""
    inside, at = pattern is None, 0
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[\s*vm\s*\.\s*(.+?)\s*\]\s*(#.*)?$", line):
            inside = pattern is not None and header[1] in (f'"{pattern}"', f"'{pattern}'", pattern)
            at = number if inside else at
        elif inside and key is not None and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return number
    return at


class Known(NamedTuple):
    """What is known of one VM; sizes in bytes."""

    pid: int
    label: str
    """What messages call it."""
    rule: Rule | None
    ram: int | None
    """Guest RAM."""
    requested: int | None
    """What is guaranteed now; None without a shim."""
    all: bool = False
    locked: int = 0
    """By the kernel's word (VmLck)."""
    hugetlb: int = 0
    """Guest RAM that is on huge pages: these are set aside already."""
    page: int = 4096
    """The largest page of its memory: guarantees that differ by less are the same."""
    trouble: str | None = None
    """Why it cannot be changed now."""


class Step(NamedTuple):
    """What is to become of one VM."""

    vm: Known
    want: int
    """Bytes."""
    size: Size
    """What is asked of the shim."""
    cut: bool = False
    """Whether that is less than its table says, as memory is short and others have priority."""

    @property
    def had(self) -> int:
        """Bytes that are guaranteed now."""
        return self.vm.requested or 0

    @property
    def done(self) -> bool:
        """Whether it is so already."""
        if self.vm.requested is None:
            return self.want == 0
        if (self.size.kind == "all") != self.vm.all:
            return False
        return self.size.kind == "all" or abs(self.want - self.vm.requested) < self.vm.page

    @property
    def lowers(self) -> bool:
        """Whether it gives memory back."""
        return not self.done and self.want < self.had


class Plan(NamedTuple):
    """What is to be done: first what lowers, then the rest, by priority."""

    steps: tuple[Step, ...]
    waiting: tuple[Known, ...]
    """VMs that cannot be changed now, and why is in `trouble`."""
    refused: tuple[tuple[Known | None, RamlockError], ...]
    """What is impossible, of one VM or of all."""


def decide(policy: Policy, everyone: Iterable[Known], limit: int | None, *, prune: bool = False) -> Plan:
    """Make a plan. `everyone` are all VMs, those with a rule are ours; `limit` is what the host can guarantee at all.

    Where the sum of all does not fit, those of a higher priority have theirs in full, and those of the first that does
    not fit share what is left. Where that is the highest, nobody has said who is to lose, and it is impossible.
    """
    everyone = list(everyone)
    refused: list[tuple[Known | None, RamlockError]] = list(_doubles(everyone))
    doubled = {vm.pid for vm, _ in refused if vm is not None}
    steps, waiting, others = [], [], 0
    for vm in everyone:
        rule = vm.rule or (Rule("", Size("bytes", 0)) if prune and vm.requested else None)
        if rule is None or vm.trouble is not None or vm.pid in doubled:
            others += vm.locked
            if rule is not None and vm.trouble is not None:
                waiting.append(vm)
            continue
        want = rule.size.resolve(vm.ram or 0)
        if vm.ram is not None and want > vm.ram:
            asked, ram = format_apart(want, vm.ram)
            what = f"{vm.label}: {asked} is more than its guest RAM of {ram}"
            refused.append((vm, Refused(what, f"ask for less, or all, in {rule}")))
            others += vm.locked
            continue
        steps.append(Step(vm, want, rule.size))
    if limit is not None:
        steps, error = _share(steps, limit, others)
        refused += [(None, error)] if error else []
    steps.sort(key=lambda step: (not step.lowers, -_priority(step), step.vm.pid))
    return Plan(tuple(steps), tuple(waiting), tuple(refused))


def _doubles(everyone: list[Known]) -> Iterable[tuple[Known, Refused]]:
    """Several VMs of one name that a table names: which is meant is not for us to guess."""
    ours = [vm for vm in everyone if vm.rule is not None and vm.rule.exact]
    for vm in ours:
        assert vm.rule is not None
        pids = [other.pid for other in ours if other.rule == vm.rule]
        if len(pids) > 1:
            what = f"{len(pids)} VMs are meant by {vm.rule}: pids {', '.join(map(str, pids))}"
            yield vm, Refused(what, "name them by UUID, or, if all are meant, by a pattern such as 'web*'")


def _priority(step: Step) -> int:
    return step.vm.rule.priority if step.vm.rule else 0


def _cost(step: Step) -> int:
    """What it takes of the host's memory."""
    return max(step.want - step.vm.hugetlb, 0)


def _share(steps: list[Step], limit: int, others: int) -> tuple[list[Step], TooMuch | None]:
    left, granted = max(limit - others, 0), False
    result: list[Step] = []
    for _, level in groupby(sorted(steps, key=_priority, reverse=True), key=_priority):
        same = list(level)
        cost = sum(_cost(step) for step in same)
        if cost <= left:
            left -= cost
            granted = granted or cost > 0
            result += same
            continue
        if not granted:
            return steps, _impossible(same, cost, left, others)
        for step in same:
            share = min(_cost(step) * left // cost // MIB * MIB + step.vm.hugetlb, step.want)
            result.append(step._replace(want=share, size=Size("bytes", share), cut=True) if _cost(step) else step)
        left = 0
    return result, None


def _impossible(same: list[Step], cost: int, left: int, others: int) -> TooMuch:
    held = f", besides the {format_size(others)} that VMs hold which it does not change" if others else ""
    rows = sorted(same, key=_cost, reverse=True)
    table = tuple(f"  {format_size(_cost(step)):>12}  {step.vm.label}" for step in rows[:20])
    more = (f"  and {len(rows) - 20} more",) if len(rows) > 20 else ()
    return TooMuch(
        f"the policy asks for {format_size(cost)}; this host can guarantee {format_size(left)}{held}",
        "ask for less, or give those that matter more a higher priority, so that the others share what is left",
        never=True,
        details=(*table, *more),
    )
