"""Make the VMs of this host what a policy says: look, plan, refuse before anything is touched, lower, then raise.

Whose VM it is decides whether it counts: anybody can call a process `qemu -name web-1`. What VMs hold is the kernel's
word, and not their own. Nothing here keeps books: what is guaranteed is in the VMs, so whoever does this may die at any
instant, and whoever comes next finds what is left to do.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, TypeVar, cast

from ramlock import host, procfs, room, survey
from ramlock.api import VM, Session
from ramlock.deadline import Deadline
from ramlock.errors import NoAnswer, NotFound, RamlockError, Refused, TimedOut
from ramlock.guarantee import Wish
from ramlock.policy import Known, Plan, Policy, Step, decide
from ramlock.reply import Guarantee, State
from ramlock.sizes import format_size
from ramlock.survey import Seen
from ramlock.vms import Selector

LOWER_TIME = 30.0
"""Seconds that a VM may take to give memory back before others are raised all the same."""
IDLE_TIME = 5.0
"""Seconds that QEMU's main thread has to be seen idle in, to be injected."""
STEP_TIME = 90.0
"""Seconds after which a VM is left behind, whatever it does."""
LOOK_TIME = 20.0
"""Seconds that a preflight may take."""
_BEAT = 1.0
_LIBVIRT = Path("/run/libvirt/qemu")
_LATE = 5.0
"""Seconds by which a process may be younger than the file that names it: clocks have ticks."""


T = TypeVar("T")
Beat = Callable[[], None]
"""Called about once a second by what may take long."""


def _quiet() -> None:
    pass


class Host(NamedTuple):
    """What was seen of this host."""

    everyone: list[Known]
    seen: dict[int, Seen]
    strangers: list[tuple[Known, int]]
    """VMs that the policy names and that are not ours, with their user."""
    limit: int | None
    """Bytes that can be guaranteed on this host; None when unknown."""


def look(policy: Policy, proc: Path = procfs.PROC, libvirt: Path = _LIBVIRT) -> Host:
    """See every VM of this host, and which table of the policy counts for it. Takes a few seconds at most."""
    seen = {vm.pid: vm for vm in survey.survey(proc=proc)}
    domains = libvirts_pids(libvirt)
    everyone, strangers = [], []
    for vm in seen.values():
        known = _known(policy, vm)
        if vm.process is not None and not _ours(vm.process, policy, domains, proc):
            if known.rule is not None:
                strangers.append((known, vm.process.uids[1]))
            known = known._replace(rule=None, requested=None)  # its memory counts, and that is all
        everyone.append(known)
    facts = host.memory(proc)
    limit = None
    if facts is not None:
        limit = facts.total - facts.hugetlb - host.reserve(facts.total, policy.host_reserve)
    return Host(everyone, seen, strangers, limit)


def plan(policy: Policy, now: Host, *, prune: bool = False, beat: Beat = _quiet) -> Plan:
    """Decide what to do, and hold every raise against what the host, its cgroups and the VM allow. Touches nothing."""
    made = decide(policy, now.everyone, now.limit, prune=prune)
    refused = list(made.refused)
    for step in made.steps:
        if step.done or step.lowers:
            continue
        error = _bounded(lambda step=step: _obstacle(step, policy), step, LOOK_TIME, beat)  # type: ignore[misc]
        if error is not None:
            refused.append((step.vm, error))
    hopeless = {vm.pid for vm, _ in refused if vm is not None}
    steps = tuple(step for step in made.steps if step.vm.pid not in hopeless)
    return made._replace(steps=steps, refused=tuple(refused))


def carry_out(step: Step, policy: Policy, process: procfs.Process | None, beat: Beat = _quiet) -> Guarantee:
    """Do one step; `process` is the one that is meant. Injects where there is no shim.

    Lowering waits until memory is given back, since others need it; raising does not wait, see follow(). Raises what
    setting and injecting raise, NoAnswer when it takes too long; then the guarantee may be set.
    """
    return _bounded(lambda: _do(step, policy, process), step, STEP_TIME, beat)


def follow(step: Step, process: procfs.Process | None, deadline: Deadline, show: Callable[[int, int], None]) -> None:
    """Wait until a guarantee that was set is reached. Raises Short, TimedOut and Superseded."""
    with VM(Selector(pid=step.vm.pid), process).session(deadline=deadline) as session:
        session.follow(session.ask(), deadline, patient=True, show=show)


def inform(step: Step, vm: Seen, beat: Beat = _quiet) -> None:
    """Tell a shim that works for its guarantee what a cgroup namespace hides from it; others need not be told."""
    now = vm.guarantee
    if now is None or now.state not in (State.LOCKING, State.SHORT):
        return
    if now.cgroups_seen and not procfs.hides_cgroups(vm.pid):
        return

    def tell() -> None:
        with VM(Selector(pid=vm.pid), vm.process).session(deadline=Deadline(LOOK_TIME)) as session:
            session.inform(now)

    _bounded(tell, step, LOOK_TIME, beat)


def shown(step: Step) -> str:
    """Say what a VM is to have."""
    return format_size(step.want) + ("" if step.size.kind == "bytes" else f" ({step.size})")


def _bounded(work: Callable[[], T], step: Step, seconds: float, beat: Beat) -> T:
    """Do `work` in a thread that is left behind when it takes too long; `beat` is called meanwhile.

    What is read of a hostile VM can keep whoever reads it waiting without end. Raises what `work` raises, and NoAnswer.
    """
    result: list[T | None] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            result.append(work())
        except BaseException as error:  # noqa: BLE001 it is raised again, where it is waited for
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline = Deadline(seconds)
    while thread.is_alive() and not deadline.expired:
        thread.join(min(_BEAT, deadline.remaining))
        beat()
    if failed:
        raise failed[0]
    if not result:
        raise NoAnswer(f"{step.vm.label} took too long", "is it stopped? look at it with ramlock list")
    return cast(T, result[0])


def libvirts_pids(folder: Path = _LIBVIRT) -> dict[int, tuple[str, float]]:
    """Return the QEMUs that libvirt says it has started: name, and when it was written, as seconds since 1970.

    Only root can write there. libvirt itself is not asked: it may wait for a VM, or for whoever calls us.
    """
    found = {}
    try:
        files = [entry for entry in os.scandir(folder) if entry.name.endswith(".pid")]
    except OSError:
        return {}
    for entry in files:
        try:
            facts = os.stat(entry.path, follow_symlinks=False)
            with open(entry.path, "rb") as file:
                pid = int(file.read(32))
        except (OSError, ValueError):
            continue
        if facts.st_uid == 0:
            found[pid] = (entry.name.removesuffix(".pid"), facts.st_mtime)
    return found


def _ours(process: procfs.Process, policy: Policy, domains: dict[int, tuple[str, float]], proc: Path) -> bool:
    if set(process.uids[:3]) <= {0, os.geteuid()} | policy.uids:
        return True
    if process.pid not in domains:
        return False
    name, written = domains[process.pid]
    return process.name == name and procfs.started(process, proc) <= written + _LATE


def _known(policy: Policy, vm: Seen) -> Known:
    now = vm.guarantee
    label = f"{vm.name} (pid {vm.pid})" if vm.name else f"VM (pid {vm.pid})"
    raw = vm.process.name if vm.process else None
    blocks = now.blocks if now else ()
    # A VM that says it has more huge pages than guest RAM only spoils its own share.
    hugetlb = sum(block.size for block in blocks if block.backing == "hugetlb")
    return Known(
        pid=vm.pid,
        label=label,
        rule=policy.match(raw, vm.uuid),
        ram=vm.ram,
        requested=now.requested if now else None,
        all=now.all if now else False,
        locked=vm.process.locked if vm.process else 0,
        hugetlb=min(hugetlb, vm.ram or 0),
        page=max([block.page_size for block in blocks], default=4096),
        trouble=vm.problem,
    )


def _obstacle(step: Step, policy: Policy) -> RamlockError | None:
    """Return why a VM can never be raised so. What is only short now is no obstacle: the shim waits for room."""
    if step.vm.requested is None:
        from ramlock import preflight

        try:
            preflight.look(step.vm.pid, os.environ).require()
        except NotFound:
            return None  # it has ended meanwhile
        except RamlockError as trouble:
            trouble.message = f"{step.vm.label}: {trouble.message}"
            return trouble
    error = room.check(
        step.vm.pid, room.Ask(step.want, policy.host_reserve, held=step.vm.locked, hugetlb=step.vm.hugetlb)
    )
    return error if error is not None and error.never else None


def _do(step: Step, policy: Policy, process: procfs.Process | None) -> Guarantee:
    machine = VM(Selector(pid=step.vm.pid), process)
    if step.vm.requested is not None:
        with machine.session(deadline=Deadline(LOWER_TIME)) as session:
            return _set(session, step, policy)
    from ramlock import install

    with machine.injected(install.Options(timeout=IDLE_TIME)) as (session, outcome):
        if outcome.source == "none":  # what could not be held against what is seen from outside is not locked
            raise Refused(
                f"{step.vm.label}: the shim is in, but guest RAM is not known yet; nothing was locked",
                "apply the policy again when the VM has started",
            )
        return _set(session, step, policy)


def _set(session: Session, step: Step, policy: Policy) -> Guarantee:
    deadline = Deadline(LOWER_TIME)
    wish = Wish(step.size, host_reserve=policy.host_reserve)
    placed = session.place(wish, deadline, patient=True, followed=step.lowers)
    if not step.lowers:
        return placed
    try:
        return session.follow(placed, deadline, patient=False)
    except TimedOut:
        return placed  # it goes on giving back, and the others are short until then
