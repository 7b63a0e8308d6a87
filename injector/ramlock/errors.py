"""Every error that ramlock tells its user: what happened, what to do about it, and the exit code.

The tree, with exit codes; whoever catches RamlockError catches all of it::

    RamlockError             1  failed
     +-- UsageError          2  the caller's words cannot be understood
     |    +-- SizeError      2    ... a SIZE
     |    +-- PolicyError    2    ... the file of a policy
     +-- TimedOut            3  the guarantee is set, and not reached in time
     +-- Refused             4  nothing was touched; the former guarantee is intact
     |    +-- CannotPreload  4    ... this program cannot be given the shim
     |    +-- LimitTooLow    4    ... RLIMIT_MEMLOCK does not allow it
     |    +-- TooMuch        4    ... it does not fit into the memory that there is
     |    +-- CannotInject   4    ... this process cannot be given the shim
     |    +-- NeverParked    4    ... the main thread was never seen idle
     |    +-- AlreadyTraced  4    ... another tracer, such as a debugger, has the process
     |    +-- NotLocated     4    ... where guest RAM is cannot be found out, or not for sure
     |    +-- GuestRamMismatch 4  ... what two sources say about guest RAM is not the same
     +-- Short               5  set, but not all of it can be locked now
     +-- NotFound            6  no such VM, or no shim in it
     |    +-- VmGone         6    ... the VM ended while we worked with it
     |    +-- NotOurs        6    ... the socket is not a shim's
     +-- NoPermission        7  our own rights do not suffice
     +-- ControlError        1  the conversation with the shim failed; its state is unknown
     |    +-- NoAnswer       1    ... no answer within the deadline
     |    +-- Disconnected   1    ... the shim hung up
     |    +-- TurnedAway     1    ... the shim takes no more clients; nothing was asked of it
     |    +-- ProtocolError  1    ... what came is not what docs/protocol.md promises
     +-- CommandError        1  the shim answered a command with an error; nothing changed
     +-- NoMonitor           1  QEMU's own monitor cannot offer the commands; all else is done
     +-- Superseded          1  someone else set another guarantee while we waited
     +-- Interrupted       130  Ctrl-C; the message says what stays behind
"""
# SPDX-License-Identifier: GPL-2.0-or-later

from typing import Any


class RamlockError(Exception):
    """Base of all: one line of what happened (`message`) and one of what to do (`hint`)."""

    exit_code = 1
    details: tuple[str, ...] = ()
    """Lines to print between the two, such as a table."""
    guarantee: Any = None
    """Of Short and TimedOut: the last known state, a reply.Guarantee."""

    def __init__(self, message: str, hint: str) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageError(RamlockError):
    """The caller's words cannot be understood."""

    exit_code = 2


class SizeError(UsageError):
    """A text is not a SIZE."""


class PolicyError(UsageError):
    """A policy cannot be read; the message names the line."""


class TimedOut(RamlockError):
    """The guarantee is set and stays set; it was not reached in time."""

    exit_code = 3


class Refused(RamlockError):
    """Nothing was touched; the former guarantee is intact."""

    exit_code = 4


class CannotPreload(Refused):
    """The program cannot be given the shim by LD_PRELOAD."""


class LimitTooLow(Refused):
    """RLIMIT_MEMLOCK of the QEMU process does not allow the guarantee."""


class TooMuch(Refused):
    """The guarantee does not fit into what the host, a cgroup or other guarantees leave.

    `never` is whether it would not fit either if all that can be freed were free.
    """

    def __init__(self, message: str, hint: str, *, never: bool, details: tuple[str, ...] = ()) -> None:
        super().__init__(message, hint)
        self.never = never
        self.details = details


class CannotInject(Refused):
    """The process cannot be given the shim while it runs."""


class NeverParked(Refused):
    """The main thread of the process was never seen idle."""


class AlreadyTraced(Refused):
    """Another tracer has the process."""

    def __init__(self, pid: int, tracer: int, name: str = "") -> None:
        who = f"process {tracer}" + (f" ({name})" if name else "")
        super().__init__(f"process {pid} is traced by {who} already", f"let it finish, or look: ps -p {tracer}")


class NotLocated(Refused):
    """Where guest RAM is cannot be found out, or only guessed: nothing is locked."""


class GuestRamMismatch(Refused):
    """Guest RAM by one source is not what it is by another, such as the shim: nothing is locked."""


class Short(RamlockError):
    """The guarantee is set, but not all of it can be locked now."""

    exit_code = 5


class NotFound(RamlockError):
    """There is no such VM, or no shim in it."""

    exit_code = 6


class VmGone(NotFound):
    """The VM ended while we worked with it."""


class NotOurs(NotFound):
    """Something answers on the socket, and it is not a shim."""


class NoPermission(RamlockError):
    """The caller's rights do not suffice; another user's would."""

    exit_code = 7


class ControlError(RamlockError):
    """The conversation with the shim failed: what it did with the last command is unknown."""


class NoAnswer(ControlError):
    """The shim did not answer within the deadline."""


class Disconnected(ControlError):
    """The shim closed the connection."""


class TurnedAway(ControlError):
    """The shim answered the connection with an error in place of its greeting: all of its places are taken."""


class ProtocolError(ControlError):
    """What came over the socket is not what docs/protocol.md promises."""


class CommandError(RamlockError):
    """The shim answered a command with an error: nothing changed.

    `reason` is the word in brackets that `desc` began with, or "" when there was none.
    """

    def __init__(self, desc: str, *, reason: str = "", error_class: str = "GenericError") -> None:
        super().__init__(f"the shim refused: {desc}", "see docs/protocol.md for what the shim accepts")
        self.desc = desc
        self.reason = reason
        self.error_class = error_class


class NoMonitor(RamlockError):
    """QEMU's own monitor cannot offer the shim's commands; everything else was done."""


class Superseded(RamlockError):
    """Someone else set another guarantee while we waited for ours."""


class Interrupted(RamlockError):
    """The user pressed Ctrl-C; the message says what stays behind."""

    exit_code = 130
