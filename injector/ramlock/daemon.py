"""Keep every VM of this host as a policy says: new VMs, VMs that were started again, a policy that was changed.

Nothing is kept here but when to try again. What is guaranteed is in the VMs: a daemon that ends, by whatever, changes
nothing, and its successor finds what there is to do.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

from ramlock import policy, procfs, reconcile
from ramlock.errors import NotFound, PolicyError, RamlockError
from ramlock.notify import Notifier
from ramlock.policy import Known, Plan, Policy, Step
from ramlock.reconcile import Host
from ramlock.reply import State
from ramlock.sizes import format_size

STARTING = "starting"
EVERY = 10.0
"""Seconds after which all VMs are looked at, though none has come or gone."""
_STARTING = 2.0
"""The same, when one of them is still starting."""
_TICK = 1.0
_AGAIN_FIRST, _AGAIN_MOST = 4.0, 300.0
"""Seconds after which a VM that failed is tried again: the first time, and at most."""
_CHANGED_OFTEN = 3
"""Times that a guarantee is put back at once, though somebody else keeps changing it."""
_CALM = 600.0
"""Seconds after which that is forgotten."""


class _Later:
    """VMs that failed, or that others keep changing, and when to try again; told only when what failed has changed."""

    def __init__(self) -> None:
        self._when: dict[tuple[int, int], tuple[float, float]] = {}
        self._said: dict[tuple[int, int], str] = {}
        self._placed: dict[tuple[int, int], int] = {}
        self._changed: dict[tuple[int, int], tuple[int, float]] = {}

    def placed(self, key: tuple[int, int], had: int, want: int) -> bool:
        """Note that a guarantee was set; return whether it is news that somebody else keeps changing it.

        Such as another daemon: then it is put back less and less often, lest memory is locked and unlocked without end.
        """
        self.succeeded(key)
        theirs = self._placed.get(key, had) != had
        self._placed[key] = want
        if not theirs:
            return False
        times, last = self._changed.get(key, (0, 0.0))
        times = times + 1 if time.monotonic() - last < _CALM else 1
        self._changed[key] = times, time.monotonic()
        if times > _CHANGED_OFTEN:
            pause = min(_AGAIN_FIRST * 2.0 ** min(times - _CHANGED_OFTEN, 16), _AGAIN_MOST)
            self._when[key] = (time.monotonic() + pause, _AGAIN_FIRST)
        return times == _CHANGED_OFTEN + 1

    def holds(self, key: tuple[int, int]) -> bool:
        return self._when.get(key, (0.0, 0.0))[0] > time.monotonic()

    def failed(self, key: tuple[int, int], message: str) -> bool:
        """Note a failure; return whether it is news."""
        pause = min(max(2 * self._when.get(key, (0.0, 0.0))[1], _AGAIN_FIRST), _AGAIN_MOST)
        self._when[key] = (time.monotonic() + pause, pause)
        news = self._said.get(key) != message
        self._said[key] = message
        return news

    def forget(self, keep: set[tuple[int, int]]) -> None:
        """Drop VMs that are gone."""
        for known in (self._when, self._said, self._placed, self._changed):
            for key in set(known) - keep:
                known.pop(key)

    def succeeded(self, key: tuple[int, int]) -> None:
        self._when.pop(key, None)
        self._said.pop(key, None)

    def clear(self) -> None:
        """Try all again now, as when the policy has changed."""
        for known in (self._when, self._said, self._placed, self._changed):
            known.clear()

    def settle(self, since: float) -> None:
        """Drop those that were to be tried by `since`, and have not failed again: there was nothing to do any more."""
        for key in [key for key, (when, _) in self._when.items() if when <= since]:
            self.succeeded(key)

    @property
    def due(self) -> bool:
        """Whether some VM is to be tried again."""
        return any(when <= time.monotonic() for when, _ in self._when.values())


class Daemon:
    """Keeps a host as the policy in a file says."""

    def __init__(self, path: Path, notifier: Notifier, say: Callable[[str], None], every: float = EVERY) -> None:
        """Read the policy; `say` gets a line for each change and each failure. Raises PolicyError."""
        self._path, self._notifier, self._say, self._every = path, notifier, say, every
        self._signature = self._seen = _signature(path)
        self._policy = policy.load(path, regular=True)
        self._later = _Later()
        self._impossible = ""
        self.stop = Event()
        self.reload = Event()

    def run(self) -> None:
        """Work until `stop` is set. VMs keep what they have."""
        self._notifier.tell(READY=1, STATUS=f"policy {self._path}")
        pids: list[int] = []
        next_look = 0.0
        while not self.stop.is_set():
            self._beat()
            changed = self._reread()
            now = procfs.candidates()
            if changed or now != pids or time.monotonic() >= next_look or self._later.due:
                began = time.monotonic()
                starting = self._once()
                self._later.settle(began)
                pids = now
                next_look = time.monotonic() + (min(_STARTING, self._every) if starting else self._every)
            self.stop.wait(_TICK)
        self._notifier.tell(STOPPING=1)

    def _beat(self) -> None:
        self._notifier.tell(WATCHDOG=1)

    def _reread(self) -> bool:
        """Read the policy if it has changed. One that cannot be read changes nothing: the former stays in force.

        One that is still being written can be a whole one that says something else, so it has to stay the same for
        one round.
        """
        before, self._seen = self._seen, _signature(self._path)
        signature = self._seen
        asked = self.reload.is_set()
        self.reload.clear()
        if not asked and (signature == self._signature or signature != before):
            return False
        self._signature = signature
        try:
            self._policy = policy.load(self._path, regular=True)
        except PolicyError as error:
            self._say(f"{error.message}; the former policy stays in force ({error.hint})")
            return False
        self._say(f"the policy {self._path} was read again")
        self._later.clear()
        self._impossible = ""
        return True

    def _once(self) -> bool:
        """Look at all VMs, and do what is to be done. Returns whether one is still starting."""
        rules = self._policy
        now = reconcile.look(rules)
        self._later.forget({_key(now, vm) for vm in now.everyone})
        everyone = [self._put_off(vm, now) for vm in now.everyone]
        self._beat()
        plan = reconcile.plan(rules, now._replace(everyone=everyone), beat=self._beat)
        impossible = self._tell_refused(plan, now)
        for step in plan.steps:
            if self.stop.is_set():
                return False
            # Where nobody has said who is to lose, nobody gets more; giving back is always possible.
            if step.done or (impossible and not step.lowers):
                self._inform(step, now)
                continue
            self._try(step, rules, now)
        kept = sum(step.done for step in plan.steps)
        left = len(plan.waiting) + len(plan.refused)
        self._notifier.tell(STATUS=f"{kept} of {len(plan.steps) + left} VMs were as the policy says")
        return any(vm.trouble == STARTING for vm in plan.waiting)

    def _put_off(self, vm: Known, now: Host) -> Known:
        """Leave out for now what failed, and what is starting: setting a guarantee would wait for that."""
        if self._later.holds(_key(now, vm)):
            return vm._replace(trouble="tried again later")
        said = now.seen[vm.pid].guarantee
        if said is not None and said.state is State.WAITING and said.why is not None and said.why.reason == "starting":
            return vm._replace(trouble=STARTING)
        return vm

    def _tell_refused(self, plan: Plan, now: Host) -> bool:
        """Say what is impossible; return whether the whole is."""
        whole = ""
        for vm, error in plan.refused:
            if vm is None:
                whole = error.message
            elif self._later.failed(_key(now, vm), error.message):
                self._say(f"{error.message} ({error.hint})")
        if whole and whole != self._impossible:
            self._say(f"nobody's guarantee is raised: {whole}")
        self._impossible = whole
        return bool(whole)

    def _try(self, step: Step, rules: Policy, now: Host) -> None:
        key = _key(now, step.vm)
        had, want = step.had, reconcile.shown(step)
        try:
            reconcile.carry_out(step, rules, now.seen[step.vm.pid].process, self._beat)
        except NotFound:
            return  # it has ended
        except (RamlockError, OSError) as error:
            if self._later.failed(key, str(error)):
                self._say(f"{step.vm.label}: {error}; tried again later")
            return
        news = self._later.placed(key, had, step.want)
        self._say(f"{step.vm.label}: {want} guaranteed, {format_size(had)} before")
        if news:
            self._say(
                f"{step.vm.label}: somebody else keeps changing its guarantee, so it is put back less often from now on"
                " (is there another daemon with another policy?)"
            )

    def _inform(self, step: Step, now: Host) -> None:
        try:
            reconcile.inform(step, now.seen[step.vm.pid], self._beat)
        except (RamlockError, OSError):
            return  # it is looked at again soon


def _key(now: Host, vm: Known) -> tuple[int, int]:
    process = now.seen[vm.pid].process
    return vm.pid, process.start_time if process else 0


def _signature(path: Path) -> tuple[int, ...]:
    """What changes when a file is written, or replaced by another."""
    try:
        facts = os.stat(path)
    except OSError:
        return ()
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns
