"""The reply to query-ram-minguarantee as a frozen record; docs/protocol.md is the reference.

Named tuples, here and elsewhere on the way of `ramlock status`: they are as frozen as a frozen dataclass, and the class
is made in a sixth of the time.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import enum
from typing import Any, NamedTuple, TypeVar

from ramlock.errors import ProtocolError
from ramlock.text import printable

T = TypeVar("T")
_BUCKETS_MOST = 64


class State(enum.Enum):
    """What the lock thread is doing."""

    WAITING = "waiting"
    """Guest RAM is not known yet."""
    IDLE = "idle"
    """The guarantee is held."""
    LOCKING = "locking"
    UNLOCKING = "unlocking"
    SHORT = "short"
    """Not all of the guarantee can be locked now."""


class Why(NamedTuple):
    """Why the guarantee is short, or guest RAM unknown."""

    reason: str
    desc: str


class Block(NamedTuple):
    """A RAM block; sizes in bytes."""

    id: str
    size: int
    locked: int
    page_size: int
    backing: str


class StepTimes(NamedTuple):
    """How long system calls on guest RAM took, since the shim's start."""

    steps: int
    sum_us: int
    buckets: tuple[int, ...]
    """[i] took at most 2**i microseconds, and longer than those of [i - 1]; longer ones are in `steps` alone."""


class Guarantee(NamedTuple):
    """The state of a guarantee; sizes in bytes, `rate` in bytes per second, `eta_s` in seconds."""

    requested: int
    all: bool
    locked: int
    armed: int
    foreign: int
    state: State
    ram: int
    order: str
    prefault: bool
    generation: int
    blocks: tuple[Block, ...]
    rate: int
    eta_s: int | None
    step_max_us: int | None
    step_p99_us: int | None
    hold_budget: int | None
    """Microseconds; None from a shim that does not tell."""
    threads: int | None
    host_reserve: int | None
    """Bytes that locking leaves for the host; None from a shim that does not say."""
    cgroups_seen: bool
    """Whether the shim can read the limits of its memory cgroups; an older one does not say."""
    memlock_limit: int | None
    """RLIMIT_MEMLOCK; None is unlimited."""
    why: Why | None
    """Set in the states short and waiting."""
    launch_error: str | None
    """Why the guarantee that QEMU was started with was not set; only until one is set."""
    raw: dict[str, Any]
    """The reply as it came."""
    told: bool = False
    """Whether the shim cannot see guest RAM itself, and has to be told where it is."""
    lost: int = 0
    """Bytes that were lost behind the shim's back since its start."""
    step_times: StepTimes | None = None
    """None from a shim that does not tell."""

    @property
    def held(self) -> int:
        """The bytes that count towards the guarantee: without prefault a lock in wait is all that was asked for."""
        return self.locked if self.prefault else self.armed


def parse(reply: object) -> Guarantee:
    """Read the reply.

    Raises ProtocolError when a member is missing or of the wrong type.
    """
    if not isinstance(reply, dict):
        raise _bad("the reply")
    try:
        state = State(_get(reply, "state", str))
    except ValueError:
        raise _bad("state") from None
    why = reply.get(state.value) if state in (State.SHORT, State.WAITING) else None
    return Guarantee(
        requested=_size(reply, "requested"),
        all=_get(reply, "all", bool, False),
        locked=_size(reply, "locked"),
        armed=_size(reply, "armed"),
        foreign=_size(reply, "foreign", 0),
        state=state,
        ram=_size(reply, "ram"),
        order=printable(_get(reply, "order", str, ""), 40),
        prefault=_get(reply, "prefault", bool, True),
        generation=_size(reply, "generation"),
        blocks=tuple(_block(block) for block in _get(reply, "blocks", list, [])),
        rate=_size(reply, "rate", 0),
        eta_s=_maybe(reply, "eta-s"),
        step_max_us=_maybe(reply, "step-max-us"),
        step_p99_us=_maybe(reply, "step-p99-us"),
        hold_budget=_maybe(reply, "hold-budget"),
        threads=_maybe(reply, "threads"),
        host_reserve=_maybe(reply, "host-reserve"),
        cgroups_seen=_get(reply, "cgroups-seen", bool, True),
        memlock_limit=_maybe(reply, "memlock-limit"),
        why=_why(why) if isinstance(why, dict) else None,
        launch_error=printable(_get(reply, "launch-error", str)) if "launch-error" in reply else None,
        raw=reply,
        told=reply.get("source") == "controller",
        lost=_size(reply, "lost", 0),
        step_times=_step_times(reply["step-times"]) if "step-times" in reply else None,
    )


def _block(block: object) -> Block:
    if not isinstance(block, dict):
        raise _bad("blocks")
    return Block(
        id=printable(_get(block, "id", str), 256),
        size=_size(block, "size"),
        locked=_size(block, "locked"),
        page_size=_size(block, "page-size"),
        backing=printable(_get(block, "backing", str), 40),
    )


def _step_times(times: object) -> StepTimes:
    if not isinstance(times, dict):
        raise _bad("step-times")
    buckets = _get(times, "buckets", list)
    if len(buckets) > _BUCKETS_MOST:
        raise _bad("step-times")
    counts = tuple(_size({"buckets": count}, "buckets") for count in buckets)
    found = StepTimes(_size(times, "count"), _size(times, "sum-us"), counts)
    if sum(counts) > found.steps:
        raise _bad("step-times")
    return found


def _why(why: dict[str, Any]) -> Why:
    return Why(printable(_get(why, "reason", str), 40), printable(_get(why, "desc", str, "")))


def _get(reply: dict[str, Any], name: str, kind: type[T], default: T | None = None) -> T:
    value = reply.get(name, default)
    # bool is an int to Python; it is none to JSON.
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise _bad(name)
    return value


def _size(reply: dict[str, Any], name: str, default: int | None = None) -> int:
    value = _get(reply, name, int, default)
    if not 0 <= value < 1 << 64:
        raise _bad(name)
    return value


def _maybe(reply: dict[str, Any], name: str) -> int | None:
    return _size(reply, name) if name in reply else None


def _bad(name: str) -> ProtocolError:
    return ProtocolError(
        f"the shim's reply is not understood ({name})", "are shim and ramlock of the same version? restart the VM"
    )
