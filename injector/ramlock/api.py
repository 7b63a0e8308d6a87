"""The library: a VM as an object, for the command line and for other programs (docs/library.md).

A session with a shim lasts for one call, for a shim has places for few clients. What a call needs beyond asking is
loaded when it is called, since `ramlock status` and `set` are to be quick.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from ramlock import guarantee, procfs, vms
from ramlock.control import Client, Event
from ramlock.deadline import Deadline
from ramlock.errors import Disconnected, NoPermission, Refused
from ramlock.guarantee import Wish
from ramlock.reply import Guarantee
from ramlock.sizes import Size, parse_size
from ramlock.vms import Selector

if TYPE_CHECKING:
    from ramlock.install import Options, Outcome
    from ramlock.survey import Seen

Show = Callable[[int, int], None]
"""Told the bytes held and the bytes requested."""
Warn = Callable[[str], None]


def _quiet(text: str) -> None:
    pass


def _unseen(held: int, requested: int) -> None:
    pass


class Session:
    """A conversation with the shim of one VM."""

    def __init__(self, found: vms.Vm) -> None:
        """Take over a session that vms.py has begun."""
        self.vm = found
        self._gates: dict[int, guarantee.Admission] = {}

    @property
    def label(self) -> str:
        """What messages call the VM."""
        return self.vm.label

    def ask(self, warn: Warn = _quiet) -> Guarantee:
        """Return the state of the guarantee; a shim that cannot see guest RAM is told of it, if that has changed.

        That it cannot be told is no reason to say nothing: `warn` gets the reason. Raises ControlError.
        """
        now = guarantee.query(self.vm.client)
        if not now.told:
            return now
        from ramlock import tell

        try:
            tell.refresh(self.vm)
        except (Refused, NoPermission) as error:
            warn(error.message)
        return guarantee.query(self.vm.client)

    def place(
        self,
        wish: Wish,
        deadline: Deadline,
        *,
        force: bool = False,
        patient: bool = False,
        followed: bool = False,
        warn: Warn = _quiet,
        vouched: bool = True,
    ) -> Guarantee:
        """Set a guarantee and return the state right after; parameters and errors as of guarantee.place().

        `force` sets also what does not seem to fit, `patient` also what does not fit now; `followed` is whether
        follow() will be called.
        """
        from ramlock import admission

        def tell_it() -> None:
            from ramlock import tell

            tell.refresh(self.vm, deadline)

        gate = admission.Gate(self.vm.pid, wish, force=force, patient=patient, followed=followed, warn=warn)
        placed = guarantee.place(
            self.vm.client, wish, pid=self.vm.pid, deadline=deadline, vouched=vouched, tell=tell_it, admission=gate
        )
        self._gates = {placed.generation: gate}
        return placed

    def follow(self, placed: Guarantee, deadline: Deadline, *, patient: bool, show: Show = _unseen) -> Guarantee:
        """Wait until the guarantee `placed` is reached; parameters and errors as of guarantee.follow()."""
        gate = self._gates.get(placed.generation) or self._gate(placed, followed=True)
        return guarantee.follow(self.vm.client, placed, deadline=deadline, patient=patient, show=show, admission=gate)

    def inform(self, now: Guarantee) -> None:
        """Tell the shim, whose state is `now`, what its namespace hides from it, good for half a minute."""
        self._gate(now, followed=False).inform(self.vm.client)

    def _gate(self, now: Guarantee, *, followed: bool) -> guarantee.Admission:
        """Return what goes with the guarantee as it is; it was admitted when it was set."""
        from ramlock import admission

        as_it_is = Wish(Size("all") if now.all else Size("bytes", now.requested))
        gate = admission.Gate(self.vm.pid, as_it_is, force=True, followed=followed)
        gate.check(now)
        return gate


class VM:
    """A VM of this host: one QEMU process. Another one that gets the same pid later is not taken for it."""

    def __init__(self, selector: Selector, process: procfs.Process | None = None) -> None:
        """Use find(), at() or all() instead; with a selector alone, the VM is looked for when it is used."""
        self._selector, self._process = selector, process

    @classmethod
    def find(cls, which: str | int) -> "VM":
        """Find a VM by name, UUID (str) or pid (int). Raises NotFound, and Refused when two have that name."""
        process = vms.find(which)
        return cls(Selector(pid=process.pid), process)

    @classmethod
    def at(cls, socket: str | os.PathLike[str]) -> "VM":
        """Return the VM whose shim listens on `socket`; nothing is asked yet."""
        return cls(Selector(socket=Path(socket)))

    @classmethod
    def all(cls) -> "list[VM]":
        """Return every QEMU of this host that we may see, in order of pid."""
        return [cls(Selector(pid=process.pid), process) for process in procfs.qemus()]

    @staticmethod
    def survey(seconds: float | None = None) -> "list[Seen]":
        """Return how it is with every VM of this host, asked all at once; those that do not answer are told as such."""
        from ramlock import survey

        return survey.survey(survey.TIME if seconds is None else seconds)

    @property
    def pid(self) -> int | None:
        """The pid of QEMU; None when only a socket is known."""
        return self._process.pid if self._process else self._selector.pid

    @property
    def name(self) -> str | None:
        """What QEMU's -name says. Anyone can name a process so; mind that it may hold control characters."""
        return self._process.name if self._process else self._selector.name

    @property
    def uuid(self) -> str | None:
        """What QEMU's -uuid says."""
        return self._process.uuid if self._process else None

    @property
    def guarantee(self) -> Guarantee:
        """The state of the guarantee now; sizes in bytes.

        Raises NotFound when there is no shim in it, NoPermission, ControlError.
        """
        with self.session() as session:
            return session.ask()

    def set(
        self,
        size: str | int | Size,
        *,
        order: str | None = None,
        prefault: bool | None = None,
        hold_budget: int | None = None,
        threads: int | None = None,
        host_reserve: int | None = None,
        force: bool = False,
        wait: bool = True,
        timeout: float | None = None,
    ) -> Guarantee:
        """Set how much guest RAM is guaranteed, and with `wait` wait until it is locked.

        `size` is in bytes, or a text such as "2G", "50%" or "all". The rest is as for `ramlock set`: `hold_budget` in
        µs, `host_reserve` in bytes, `timeout` in seconds, within which a shortage is waited out; None leaves things as
        they are. Raises Refused (TooMuch, LimitTooLow) and NoPermission when nothing was changed; Short, TimedOut (both
        carry the last state as `guarantee`) and Superseded when it was set.
        """
        wanted = size if isinstance(size, Size) else Size("bytes", size) if isinstance(size, int) else parse_size(size)
        wish = Wish(wanted, order, prefault, hold_budget, threads, host_reserve)
        deadline = Deadline(timeout)
        patience = guarantee.START_TIME if timeout is None else timeout
        with self.session(patience=patience, deadline=deadline) as session:
            patient = timeout is not None
            placed = session.place(wish, deadline, force=force, patient=patient, followed=wait, vouched=self._vouched)
            return session.follow(placed, deadline, patient=patient) if wait else placed

    def wait(self, timeout: float | None = None) -> Guarantee:
        """Wait until the present guarantee is reached; with a `timeout` in seconds a shortage is waited out.

        Raises Short, TimedOut and Superseded; the guarantee stays set in each case.
        """
        deadline = Deadline(timeout)
        with self.session(deadline=deadline) as session:
            return session.follow(session.ask(), deadline, patient=timeout is not None)

    def inject(self, options: "Options | None" = None) -> "Outcome":
        """Bring the shim into the VM; one that is there already is used as it is.

        Raises Refused (CannotInject, NeverParked, ...) and NoPermission when nothing was done.
        """
        with self.injected(options) as (_, outcome):
            return outcome

    def eject(self, timeout: float = 30.0) -> str:
        """Unlock everything and take the shim out again, within `timeout` seconds; return what to call the VM.

        Raises NotFound and NoAnswer.
        """
        from ramlock import eject

        with self.session() as session:
            eject.eject(session.vm, timeout)
            return session.label

    async def events(self) -> AsyncIterator[Event]:
        """Yield what the shim tells from now on (docs/protocol.md lists the events), until the VM ends: VmGone."""
        import asyncio

        stack = ExitStack()
        try:
            session = await asyncio.to_thread(stack.enter_context, self.session())
            client = session.vm.client
            while True:
                while (event := client.event(Deadline(0))) is not None:
                    yield event
                await _readable(client)
                if (event := client.event(Deadline(_AT_ONCE))) is not None:
                    yield event
        except Disconnected as error:
            # To find out whether the VM has ended takes a moment, which others need not wait.
            await asyncio.to_thread(stack.__exit__, type(error), error, error.__traceback__)
            raise
        finally:
            stack.close()

    @contextmanager
    def session(self, *, patience: float = 0.0, deadline: Deadline | None = None) -> Iterator[Session]:
        """Hold one session for several questions. Waits `patience` seconds for a shim that is starting.

        Raises as vms.session() does.
        """
        with vms.session(self._selector, patience=patience, deadline=deadline) as found:
            self._same()
            yield Session(found)

    @contextmanager
    def injected(self, options: "Options | None" = None) -> "Iterator[tuple[Session, Outcome]]":
        """Bring the shim in as inject() does, and hold the session with it."""
        from ramlock import install

        pid = self.pid if self.pid is not None else vms.find(self._selector.name or "").pid
        with install.installed(pid, options or install.Options(), os.environ, self._process) as (found, outcome):
            yield Session(found), outcome

    @property
    def _vouched(self) -> bool:
        """Whether the process was named, and is not only what was found behind a socket."""
        return self._selector.socket is None

    def _same(self) -> None:
        """Raise VmGone when the pid means another process by now; the caller has pinned it."""
        if self._process is None:
            return
        if procfs.read(self._process.pid).start_time != self._process.start_time:
            raise procfs.gone(self._process.pid)


_AT_ONCE = 0.001
"""Seconds for what is known to have come; half a line is taken, too, and the rest is waited for elsewhere."""


async def _readable(client: Client) -> None:
    import asyncio

    loop = asyncio.get_running_loop()
    come = asyncio.Event()
    loop.add_reader(client.fileno(), come.set)
    try:
        await come.wait()
    finally:
        loop.remove_reader(client.fileno())
