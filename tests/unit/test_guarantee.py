"""Setting a guarantee and following it, against servers that answer as a shim may."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import resource
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from ramlock import guarantee, host
from ramlock.control import Client
from ramlock.deadline import Deadline
from ramlock.errors import (
    LimitTooLow,
    NoPermission,
    NotOurs,
    ProtocolError,
    RamlockError,
    Refused,
    Short,
    Superseded,
    TimedOut,
)
from ramlock.guarantee import Wish
from ramlock.reply import Guarantee, parse
from ramlock.sizes import parse_size
from tests.conftest import absent
from tests.unit.conftest import Serve, Shim, reply

MIB, GIB = 1 << 20, 1 << 30


class Sessions:
    """Opens sessions with servers, and closes them."""

    def __init__(self, serve: Serve) -> None:
        self.serve = serve
        self.open: list[Client] = []

    def __call__(self, shim: Shim) -> Client:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(str(self.serve(shim)))
        self.open.append(Client(sock, "shim"))
        self.open[-1].greet(Deadline(5))
        return self.open[-1]


@pytest.fixture
def session(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> Iterator[Sessions]:
    monkeypatch.setattr(guarantee, "_POLL", 0.1)
    sessions = Sessions(serve)
    yield sessions
    for client in sessions.open:
        client.close()


def place(client: Client, text: str, **settings: Any) -> Guarantee:
    wish = Wish(parse_size(text), **settings)
    return guarantee.place(client, wish, pid=None, deadline=Deadline(5))


def follow(client: Client, seconds: float | None = 5, patient: bool = False, **placed: Any) -> list[tuple[int, int]]:
    shown: list[tuple[int, int]] = []
    guarantee.follow(
        client,
        parse(reply(**placed)),
        deadline=Deadline(seconds),
        patient=patient,
        show=lambda held, requested: shown.append((held, requested)),
    )
    return shown


@pytest.mark.parametrize(
    ("text", "settings", "arguments"),
    [
        ("1G", {}, {"size": GIB}),
        ("0", {}, {"size": 0}),
        ("50%", {}, {"size": GIB}),
        ("all", {}, {"all": True}),
        ("1G", {"order": "address", "prefault": False}, {"size": GIB, "order": "address", "prefault": False}),
    ],
)
def test_what_is_sent(session: Sessions, text: str, settings: dict[str, Any], arguments: dict[str, Any]) -> None:
    shim = Shim(reply(), reply(generation=1, requested=arguments.get("size", 2 * GIB)))
    assert place(session(shim), text, **settings).generation == 1
    assert shim.arguments() == arguments


@pytest.mark.parametrize(
    ("desc", "kind", "code"),
    [
        ("[range] too much", Refused, 4),
        ("[no-ram] there is none", Refused, 4),
        ("[rlimit] RLIMIT_MEMLOCK", LimitTooLow, 4),
        ("[new-word] something of a newer shim", Refused, 4),
        ("no word at all", Refused, 4),
    ],
)
def test_refusals(session: Sessions, desc: str, kind: type[RamlockError], code: int) -> None:
    with pytest.raises(kind) as error:
        place(session(Shim(refuse=desc)), "1G")
    assert error.value.exit_code == code
    assert error.value.hint


def test_a_refusal_shows_what_the_difference_is(session: Sessions) -> None:
    with pytest.raises(Refused, match="2049 MiB is more than the guest RAM of 2048 MiB"):
        place(session(Shim(refuse="[range] x")), "2049M")


def test_when_our_rights_lack(session: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shim refuses for the limit, and the limit is another user's to raise."""
    shim = Shim(reply(memlock_limit=8 << 20), refuse="[rlimit] x")
    ended = subprocess.Popen(["true"])
    ended.wait()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoPermission) as error:
        guarantee.place(session(shim), Wish(parse_size("1G")), pid=ended.pid, deadline=Deadline(5))
    assert error.value.exit_code == 7
    assert "8 MiB" in error.value.message


def test_the_limit_is_raised_by_what_the_kernel_says() -> None:
    """A reply that claims much foreign memory, or much guest RAM, does not raise the limit by as much."""
    honest = parse(reply(foreign=4 << 20))
    assert guarantee.limit_needed(honest, Wish(parse_size("1G")), 8 << 20) == GIB + (4 << 20) + host.SLACK
    greedy = parse(reply(foreign=1 << 60, ram=1 << 62))
    assert guarantee.limit_needed(greedy, Wish(parse_size("1G")), 8 << 20) == GIB + (8 << 20) + host.SLACK
    assert guarantee.limit_needed(greedy, Wish(parse_size("50%")), 0) == host.total_memory()
    assert guarantee.limit_needed(greedy, Wish(parse_size("all")), 0) is None


@pytest.fixture
def limited(tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """A function that starts a program called so, with a small limit of locked memory, and returns its pid."""
    started: list[subprocess.Popen[bytes]] = []
    hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)[1]
    if hard != resource.RLIM_INFINITY and hard < 4 * MIB:
        absent("this user may not lock memory: run as root, or raise the hard limit (prlimit --memlock)")

    def start(name: str) -> int:
        program = tmp_path / name
        shutil.copy("/bin/sleep", program)
        started.append(subprocess.Popen([program, "60"]))
        resource.prlimit(started[-1].pid, resource.RLIMIT_MEMLOCK, (MIB, hard))
        return started[-1].pid

    yield start
    for process in started:
        process.kill()
        process.wait()


def limit_of(pid: int) -> int:
    return resource.prlimit(pid, resource.RLIMIT_MEMLOCK)[0]


def test_a_stranger_behind_a_socket_gets_no_higher_limit(session: Sessions, limited: Callable[[str], int]) -> None:
    stranger = limited("sleep")
    shim = Shim(reply(memlock_limit=MIB), reply(generation=1, requested=4 * MIB))
    with pytest.raises(NotOurs, match="does not look like QEMU") as error:
        guarantee.place(session(shim), Wish(parse_size("4M")), pid=stranger, deadline=Deadline(5))
    assert f"--pid {stranger}" in error.value.hint
    assert limit_of(stranger) == MIB
    assert [seen["execute"] for seen in shim.seen] == ["qmp_capabilities", "query-ram-minguarantee"]


def test_what_needs_no_higher_limit_is_nobodys_harm(session: Sessions, limited: Callable[[str], int]) -> None:
    shim = Shim(reply(memlock_limit=GIB), reply(generation=1, requested=4 * MIB))
    assert guarantee.place(session(shim), Wish(parse_size("4M")), pid=limited("sleep"), deadline=Deadline(5))


@pytest.mark.parametrize(("name", "vouched"), [("qemu-system-test", False), ("my-own-build", True)])
def test_the_limit_of_a_vm_is_raised_as_far_as_was_wished(
    session: Sessions, limited: Callable[[str], int], name: str, vouched: bool
) -> None:
    vm = limited(name)
    shim = Shim(reply(memlock_limit=MIB, foreign=GIB), reply(generation=1, requested=4 * MIB))
    guarantee.place(session(shim), Wish(parse_size("4M")), pid=vm, deadline=Deadline(5), vouched=vouched)
    # Without CAP_SYS_RESOURCE it ends at the hard limit.
    assert 4 * MIB <= limit_of(vm) <= 4 * MIB + host.SLACK


def test_what_will_be_refused_raises_no_limit(session: Sessions, limited: Callable[[str], int]) -> None:
    vm = limited("qemu-system-test")
    with pytest.raises(Refused):
        shim = Shim(reply(memlock_limit=MIB), refuse="[range] too much")
        guarantee.place(session(shim), Wish(parse_size("3G")), pid=vm, deadline=Deadline(5))
    assert limit_of(vm) == MIB


def test_waiting_for_guest_ram(session: Sessions) -> None:
    starting = reply(state="waiting", ram=0, waiting={"reason": "starting", "desc": ""})
    shim = Shim(starting, starting, reply(), reply(generation=1, requested=GIB))
    assert place(session(shim), "50%").generation == 1
    assert shim.arguments() == {"size": GIB}


def test_not_waiting_for_ever(session: Sessions) -> None:
    starting = Shim(reply(state="waiting", ram=0, waiting={"reason": "starting", "desc": ""}))
    with pytest.raises(Refused, match="still starting"):
        guarantee.place(session(starting), Wish(parse_size("1G")), pid=None, deadline=Deadline(0.3))
    lacking = Shim(reply(state="waiting", ram=0, waiting={"reason": "no-symbols", "desc": ""}))
    with pytest.raises(Refused, match="nobody has told"):
        guarantee.place(session(lacking), Wish(parse_size("1G")), pid=None, deadline=Deadline(60))


def test_someone_else_in_the_same_moment(session: Sessions) -> None:
    with pytest.raises(Superseded) as error:
        place(session(Shim(reply(generation=3), reply(generation=5, requested=7 << 20))), "1G")
    assert "7 MiB" in error.value.message
    same = Shim(reply(generation=3), reply(generation=5, requested=GIB))
    assert place(session(same), "1G").generation == 5
    both = Shim(reply(generation=3), reply(generation=5, requested=2 * GIB, all=True))
    assert place(session(both), "all").generation == 5


def test_following_to_the_end(session: Sessions) -> None:
    shim = Shim(
        reply(state="locking", requested=GIB, locked=GIB // 2, generation=1),
        reply(state="idle", requested=GIB, locked=GIB, generation=1),
    )
    shown = follow(session(shim), state="locking", requested=GIB, generation=1)
    assert shown == [(0, GIB), (GIB // 2, GIB), (GIB, GIB)]


def test_following_without_prefault_counts_what_is_armed(session: Sessions) -> None:
    shim = Shim(reply(state="idle", requested=GIB, armed=GIB, prefault=False, generation=1))
    assert follow(session(shim), state="locking", requested=GIB, prefault=False, generation=1)[-1] == (GIB, GIB)


def test_reached_at_once_asks_nothing(session: Sessions) -> None:
    shim = Shim()
    assert follow(session(shim), requested=0) == [(0, 0)]
    assert [seen["execute"] for seen in shim.seen] == ["qmp_capabilities"]


def test_an_event_ends_the_wait_for_the_next_query(session: Sessions) -> None:
    shim = Shim(
        reply(), reply(generation=1, requested=GIB, state="locking"), reply(generation=1, requested=GIB),
        events=("RAM_MINGUARANTEE_PROGRESS", "RAM_MINGUARANTEE_REACHED"),
    )  # fmt: skip
    client = session(shim)
    placed = place(client, "1G")
    shown: list[tuple[int, int]] = []
    guarantee.follow(client, placed, deadline=Deadline(5), patient=False, show=lambda *pair: shown.append(pair))
    assert shown == [(0, GIB), (1, 1), (0, GIB)]


def test_short(session: Sessions) -> None:
    short = reply(
        state="short", requested=GIB, locked=5 << 20, generation=1, short={"reason": "rlimit", "desc": "limit is 5 MiB"}
    )
    with pytest.raises(Short, match="5 MiB of 1 GiB can be locked now: limit is 5 MiB") as error:
        follow(session(Shim(short)), state="locking", requested=GIB, generation=1)
    assert error.value.exit_code == 5
    assert "RLIMIT_MEMLOCK" in error.value.hint


def test_short_is_waited_out_when_asked(session: Sessions) -> None:
    short = reply(state="short", requested=GIB, generation=1, short={"reason": "host-memory", "desc": "x"})
    recovered = Shim(short, reply(state="idle", requested=GIB, locked=GIB, generation=1))
    follow(session(recovered), patient=True, state="short", requested=GIB, generation=1)
    with pytest.raises(Short):
        follow(session(Shim(short)), seconds=0.3, patient=True, state="short", requested=GIB, generation=1)


def test_timed_out(session: Sessions) -> None:
    locking = reply(state="locking", requested=GIB, locked=GIB // 4, generation=1)
    with pytest.raises(TimedOut, match=r"256 MiB of 1 GiB reached in time; the guarantee stays set") as error:
        follow(session(Shim(locking)), seconds=0.3, patient=True, state="locking", requested=GIB, generation=1)
    assert error.value.exit_code == 3


def test_no_progress_at_all_is_given_up(session: Sessions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guarantee, "STALL_TIME", 0.2)
    locking = reply(state="locking", requested=GIB, generation=1)
    with pytest.raises(TimedOut, match="nothing has changed"):
        follow(session(Shim(locking)), seconds=None, state="locking", requested=GIB, generation=1)


def test_superseded_while_following(session: Sessions) -> None:
    other = reply(state="locking", requested=3 << 20, generation=2)
    with pytest.raises(Superseded, match="3 MiB") as error:
        follow(session(Shim(other)), state="locking", requested=GIB, generation=1)
    assert error.value.exit_code == 1


def test_a_reply_that_is_none(session: Sessions) -> None:
    with pytest.raises(ProtocolError):
        guarantee.query(session(Shim({})))
