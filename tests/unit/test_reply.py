"""The shim's reply is believed only as far as it has the right shape."""
# SPDX-License-Identifier: GPL-2.0-or-later

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramlock.errors import ProtocolError
from ramlock.reply import State, Why, parse
from tests.unit.conftest import reply


def test_a_good_one() -> None:
    raw = reply(requested=5, locked=3, armed=4, state="locking", eta_s=9, memlock_limit=8 << 20)
    now = parse(raw)
    assert (now.requested, now.locked, now.armed, now.state) == (5, 3, 4, State.LOCKING)
    assert (now.eta_s, now.memlock_limit, now.why) == (9, 8 << 20, None)
    assert now.blocks[0].id == "pc.ram"
    assert now.raw is raw
    assert now.held == 3
    assert parse(reply(locked=3, armed=4, prefault=False)).held == 4


def test_why() -> None:
    why = {"reason": "cgroup", "desc": "no\x1b[1m room"}
    assert parse(reply(state="short", short=why)).why == Why("cgroup", "no\\x1b[1m room")
    assert parse(reply(state="waiting", waiting={"reason": "starting"})).why == Why("starting", "")
    assert parse(reply(state="idle", short=why)).why is None


def test_launch_error() -> None:
    assert parse(reply()).launch_error is None
    assert parse(reply(launch_error="RAMLOCK_GUARANTEE is\x1b[1m above")).launch_error == (
        "RAMLOCK_GUARANTEE is\\x1b[1m above"
    )


def test_what_may_be_absent() -> None:
    needed = ("requested", "locked", "armed", "state", "ram", "generation")
    now = parse({name: reply()[name] for name in needed})
    assert now.prefault is True
    assert now.blocks == ()
    for name in needed:
        with pytest.raises(ProtocolError, match=name):
            parse({key: value for key, value in reply().items() if key != name})


@pytest.mark.parametrize(
    "changes",
    [
        {"requested": -1},
        {"requested": True},
        {"requested": 1.5},
        {"requested": "1"},
        {"locked": 1 << 64},
        {"locked": None},
        {"all": 1},
        {"state": "happy"},
        {"state": 5},
        {"blocks": {}},
        {"blocks": [1]},
        {"blocks": [{}]},
        {"eta_s": "soon"},
        {"memlock_limit": None},
        {"launch_error": None},
        {"launch_error": ["x"]},
    ],
    ids=str,
)
def test_wrong_shapes(changes: dict[str, Any]) -> None:
    with pytest.raises(ProtocolError):
        parse(reply(**changes))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(reply())), inner),
    max_leaves=20,
)


@given(JSON, st.sampled_from([*sorted(reply()), "short", "waiting", "launch-error"]), st.sampled_from(list(State)))
def test_anything_is_parsed_or_refused(value: object, name: str, state: State) -> None:
    for raw in (value, {**reply(), "state": state.value, name: value}):
        try:
            parse(raw)
        except ProtocolError as error:
            assert error.hint
