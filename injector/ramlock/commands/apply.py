"""`ramlock apply`: give every VM of this host what a policy says."""
# SPDX-License-Identifier: GPL-2.0-or-later

from collections.abc import Callable
from pathlib import Path

import click

from ramlock import policy, reconcile, survey
from ramlock.commands.common import emit, seconds_option, unstopped
from ramlock.deadline import Deadline
from ramlock.errors import Interrupted, NoPermission, RamlockError, UsageError, VmGone
from ramlock.policy import Plan, Step
from ramlock.reconcile import Host
from ramlock.sizes import format_size
from ramlock.text import printable

WAIT_TIME = 300.0


@click.command()
@click.argument("file", type=click.Path(path_type=Path), metavar="POLICY")
@click.option("--dry-run", is_flag=True, help="Print the plan, and change nothing.")
@click.option("--prune", is_flag=True, help="Also take the guarantee from VMs that the policy does not name.")
@click.option("--wait", is_flag=True, help="Wait until every guarantee is reached, not only set.")
@seconds_option("--timeout", "With --wait: how long, also for memory that is short.", WAIT_TIME)
def command(file: Path, dry_run: bool, prune: bool, wait: bool, timeout: float) -> None:
    """Give every VM of this host what a policy says.

    Examples:

    \b
    A policy names VMs by name, pattern or UUID:
      [vm."web-*"]
      guarantee = "2G"
      priority = 10
      [vm.db]
      guarantee = "50%"
    What would be done; do it; do it and wait until all of it is locked:
      ramlock apply policy.toml --dry-run
      ramlock apply policy.toml
      ramlock apply policy.toml --wait

    Nothing is touched when the plan is impossible (exit code 4). VMs are lowered before others are raised, and the shim
    is brought in where it is missing. It can be done again at any time: what is so already is left alone.

    Only VMs of root, of this user and of libvirt count, as anybody can name a process so; those of others
    when the policy lists their users: uids = [1000].
    """
    rules = policy.load(file)
    if prune and not rules.rules:
        raise UsageError(
            f"{printable(str(file))} names no VM, so --prune would take the guarantee from every VM of this host",
            """is it the right file, and whole? if that is meant, say  [vm."*"]  guarantee = "0\"""",
        )
    now = reconcile.look(rules)
    plan = reconcile.plan(rules, now, prune=prune)
    for line in lines(plan, now):
        emit(line)
    if plan.refused:
        raise _refusal(plan)
    failed: list[RamlockError] = [_silent(vm.label, vm.trouble or "") for vm in plan.waiting]
    if not dry_run:
        with unstopped():
            placed = _apply(plan, rules, now, failed)
        if wait:
            _wait(placed, now, timeout, failed)
    if failed:
        for error in failed[:-1]:
            click.echo(f"ramlock: {printable(error.message, 2000)}", err=True)
        raise failed[-1]


def _apply(plan: Plan, rules: policy.Policy, now: Host, failed: list[RamlockError]) -> list[Step]:
    """Do it, one VM after another; what fails in one does not keep the others from theirs. Returns what was set."""
    placed: list[Step] = []
    for step in plan.steps:
        error = _try(step, lambda step=step: _carry_out(step, rules, now))  # type: ignore[misc]
        failed += [error] if error else []
        if error and not step.done:
            continue
        if step.want:
            placed.append(step)
    return placed


def _wait(placed: list[Step], now: Host, timeout: float, failed: list[RamlockError]) -> None:
    """Wait until all that was set is reached."""
    deadline = Deadline(timeout)
    for step in placed:
        process = now.seen[step.vm.pid].process
        error = _try(step, lambda step=step, process=process: _follow(step, process, deadline))  # type: ignore[misc]
        failed += [error] if error else []


def _carry_out(step: Step, rules: policy.Policy, now: Host) -> None:
    if step.done:
        reconcile.inform(step, now.seen[step.vm.pid])
    else:
        reconcile.carry_out(step, rules, now.seen[step.vm.pid].process)


def _follow(step: Step, process: object, deadline: Deadline) -> None:
    reconcile.follow(step, process, deadline, lambda held, requested: None)  # type: ignore[arg-type]


def _try(step: Step, work: Callable[[], None]) -> RamlockError | None:
    try:
        work()
    except VmGone:
        return None  # it needs nothing any more
    except RamlockError as error:
        if not error.message.startswith(step.vm.label):
            error.message = f"{step.vm.label}: {error.message}"
        return error
    except KeyboardInterrupt:
        raise Interrupted(
            "interrupted; what was set before stays set", "see it with ramlock list, and apply the policy again"
        ) from None
    return None


def _refusal(plan: Plan) -> RamlockError:
    """Return one error for all that is impossible; nothing was touched."""
    (_, first), *more = plan.refused
    if more:
        first.details = (*first.details, *(f"  also: {error.message}" for _, error in more[:20]))
    first.message = f"nothing was changed: {first.message}"
    return first


def _silent(label: str, trouble: str) -> RamlockError:
    if trouble == survey.NO_PERMISSION:
        return NoPermission(f"{label} was left as it is: {trouble}", "run ramlock as root or as the VM's user")
    return RamlockError(
        f"{label} was left as it is: {trouble}", "the others have theirs; apply the policy again when it answers"
    )


def lines(plan: Plan, now: Host) -> list[str]:
    """Say a plan as a diff is said."""
    rows = [_line(step) for step in plan.steps]
    rows += [click.style(f"? {vm.label}: {vm.trouble}", fg="yellow") for vm in plan.waiting]
    rows += [
        click.style(f"! {vm.label}: left alone, it is user {uid}'s, who is not in uids", fg="yellow")
        for vm, uid in now.strangers
    ]
    rows += [click.style(f"x {vm.label}: impossible", fg="red") for vm, _ in plan.refused if vm is not None]
    return rows or ["no VM that the policy names is running"]


def _line(step: Step) -> str:
    want = format_size(step.want) if step.want else "nothing"
    if step.size.kind != "bytes":
        want += f" ({step.size})"
    if step.cut:
        want += f", not the {step.vm.rule.size if step.vm.rule else ''} of the policy: memory is short"
    if step.done:
        return f"  {step.vm.label}: {want}, as it is"
    had = format_size(step.had) + (" (all)" if step.vm.all else "") if step.had else "nothing"
    how = ", the shim is brought in" if step.vm.requested is None else ""
    mark, color = ("-", "red") if step.lowers else ("+", "green")
    return click.style(f"{mark} {step.vm.label}: {had} -> {want}{how}", fg=color)
