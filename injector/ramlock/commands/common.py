"""What the verbs share: options, parameter types, output."""
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import click

from ramlock.errors import RamlockError, SizeError, UsageError
from ramlock.sizes import Size, parse_size
from ramlock.text import printable
from ramlock.vms import Selector, Vm

F = TypeVar("F", bound=Callable[..., Any])

HOLD_BUDGET_MIN, HOLD_BUDGET_MAX = 50, 100_000
"""Microseconds that a shim takes as the hold budget."""
THREADS_MAX = 16
_STOPS = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
NAME_MOST = 200
"""Characters of a VM's name in --json, as `ramlock list` has it."""


def read_size(ctx: click.Context, param: click.Parameter, value: str | None) -> Size | None:
    """Read a SIZE, as a click callback.

    Raises SizeError, which unlike an error of click's keeps its hint.
    """
    return None if value is None else parse_size(value)


def read_reserve(ctx: click.Context, param: click.Parameter, value: str | None) -> int | None:
    """Read what the host keeps, as a click callback: bytes, 0 for "default".

    Raises SizeError.
    """
    if value is None or value.strip().lower() == "default":
        return None if value is None else 0
    size = parse_size(value)
    if size.kind != "bytes" or size.value == 0:
        raise SizeError(f"'{printable(value, 40)}' cannot be left for the host", "give bytes, such as 2G, or default")
    return size.value


def read_seconds(ctx: click.Context, param: click.Parameter, value: float | None) -> float | None:
    """Read a time that one can wait, as a click callback: finite and above 0."""
    if value is not None and not 0 < value < 1e9:
        raise click.BadParameter("it takes a number of seconds above 0", ctx, param)
    return value


def seconds_option(name: str, text: str, default: float | None = None) -> Callable[[F], F]:
    """Take a time in seconds as `name`, which `text` explains; `default` unless said."""
    return click.option(
        name,
        type=float,
        default=default,
        show_default=True,
        callback=read_seconds,
        metavar="SECONDS",
        help=text,
    )


def answer_time_option(seconds: float) -> Callable[[F], F]:
    """Take how long all VMs of the host together have to answer; `seconds` unless said."""
    return seconds_option("--timeout", "How long to wait for VMs that do not answer.", seconds)


class _SocketPath(click.Path):
    """The path of a socket that need not be there yet."""

    def __init__(self) -> None:
        super().__init__(readable=False, path_type=Path)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        # As a Path it would be ".", and what was meant, such as a variable that is not set, would no more be seen.
        if not value:
            self.fail("the socket's path is empty", param, ctx)
        return super().convert(value, param, ctx)


SOCKET_PATH = _SocketPath()


def vm_options(function: F) -> F:
    """Add --pid, --vm and --socket; `selector` turns them into a Selector."""
    for option in (
        click.option("--socket", type=SOCKET_PATH, help="The shim's socket."),
        click.option("--vm", metavar="NAME", help="The VM of this name or UUID (QEMU's -name, -uuid)."),
        click.option("--pid", type=click.IntRange(1, 2**31 - 1), metavar="PID", help="The VM's QEMU process."),
    ):
        function = option(function)
    return function


def one_vm_options(function: F) -> F:
    """Add --pid and --vm: a process is meant, and not a socket."""
    for option in (
        click.option("--vm", metavar="NAME", help="The VM of this name or UUID (QEMU's -name, -uuid)."),
        click.option("--pid", type=click.IntRange(1, 2**31 - 1), metavar="PID", help="The VM's QEMU process."),
    ):
        function = option(function)
    return function


def which_vm(pid: int | None, vm: str | None) -> int | str:
    """Return the pid or the name of the VM that is meant. Raises UsageError unless exactly one of them is given."""
    if pid is not None and vm is None:
        return pid
    if vm is not None and pid is None:
        return vm
    raise UsageError("which VM is meant?", "give exactly one of --pid PID and --vm NAME")


def lock_options(function: F) -> F:
    """Add the options that say how to lock; launch.Options and guarantee.Wish have them as fields."""
    for option in (
        click.option(
            "--host-reserve",
            callback=read_reserve,
            metavar="SIZE",
            help="Memory that locking leaves for the host (at least 128M; default: the larger of 512M and 2 %).",
        ),
        click.option(
            "--threads",
            type=click.IntRange(1, THREADS_MAX),
            metavar="N",
            help="Threads that fill the memory, for very large guests (default 1).",
        ),
        click.option(
            "--hold-budget",
            type=click.IntRange(HOLD_BUDGET_MIN, HOLD_BUDGET_MAX),
            metavar="US",
            help="The longest that one step may keep QEMU from changing its memory map, in microseconds (default 500).",
        ),
        click.option(
            "--prefault/--no-prefault",
            default=None,
            help="Fill the memory at once, or lock it when the guest touches it.",
        ),
        click.option(
            "--order",
            type=click.Choice(["resident", "address"]),
            help="Which pages first: those that are in memory already (default), or by address.",
        ),
    ):
        function = option(function)
    return function


force_option = click.option(
    "--force", is_flag=True, help="Set it also when it does not seem to fit; locking still stops short of any limit."
)
follow_discards_option = click.option(
    "--follow-discards",
    is_flag=True,
    help="Go along when the guest gives memory back (balloon, virtio-mem): the guarantee moves to other pages.",
)
monitor_option = click.option(
    "--monitor",
    is_flag=True,
    help="Offer set_ram_minguarantee and query-ram-minguarantee in QEMU's own QMP monitor too.",
)
json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print the shim's reply, and the VM's pid, name and UUID, as JSON; sizes in bytes.",
)


def selector(pid: int | None, vm: str | None, socket: Path | None) -> Selector:
    """Return which VM the options name. Raises UsageError unless exactly one is given."""
    return Selector(pid, vm, socket)


def emit(text: str) -> None:
    """Print data to stdout.

    Raises BrokenPipeError when nobody reads it any more, RamlockError when it cannot be written.
    """
    try:
        click.echo(text)
    except BrokenPipeError:
        raise
    except OSError as error:
        raise RamlockError(
            f"cannot write the output: {error.strerror}", "the guarantee is not affected; see where stdout leads"
        ) from None


def emit_json(facts: dict[str, Any]) -> None:
    """Print an object as one line of ASCII."""
    emit(json.dumps(facts))


@contextmanager
def unstopped() -> Iterator[None]:
    """Ctrl-Z, and a terminal's other ways, do not stop this process meanwhile: one of its threads may hold a QEMU's.

    The main thread's alone, as signal.signal() is.
    """
    former = [(number, signal.signal(number, signal.SIG_IGN)) for number in _STOPS]
    try:
        yield
    finally:
        for number, handler in former:
            signal.signal(number, handler)


def emit_state(vm: Vm, raw: dict[str, Any]) -> None:
    """Print what the shim of `vm` has replied, and which VM that is: what it is called is not the shim's to say."""
    name = None if vm.name is None else printable(vm.name, NAME_MOST)
    emit_json({**raw, "pid": vm.pid, "name": name, "uuid": vm.uuid})


def warn(text: str) -> None:
    """Print a line to stderr that is no failure; what of it comes from a VM is made safe to show."""
    click.echo(f"ramlock: {printable(text, 2000)}", err=True)
