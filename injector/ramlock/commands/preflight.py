"""`ramlock preflight`: say whether a VM can be injected, and if not, why."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os

import click

from ramlock import vms
from ramlock.commands.common import emit, emit_json, one_vm_options, which_vm


@click.command()
@one_vm_options
@click.option("--socket", metavar="PATH", help="As for inject: where the shim listens, as the VM's process sees it.")
@click.option(
    "--allow-seccomp", is_flag=True, help="As for inject: also under a seccomp filter that is not QEMU's own."
)
@click.option("--allow-probable", is_flag=True, help="As for inject: also where guest RAM is only a guess.")
@click.option("--json", "as_json", is_flag=True, help='Print {"ok", "checks": [{"name", "ok", "detail", "hint"}]}.')
def command(
    pid: int | None, vm: str | None, socket: str | None, allow_seccomp: bool, allow_probable: bool, as_json: bool
) -> int:
    """Say whether a VM can be injected, and if not, why.

    Looks only: nothing is written to the VM, nothing is stopped. Exit code 0 when every check passes, else 4.
    Give it the options that inject will be given, so that it says what inject will do.

    Examples:

    \b
      ramlock preflight --vm web
      ramlock preflight --pid 4711 --json | jq '.checks[] | select(.ok | not)'
    """
    from ramlock import preflight  # takes libraries that --help need not

    which = which_vm(pid, vm)
    report = preflight.look(
        which if isinstance(which, int) else vms.find(which).pid,
        os.environ,
        socket,
        allow_seccomp=allow_seccomp,
        allow_probable=allow_probable,
    )
    if as_json:
        checks = [{"name": c.name, "ok": c.ok, "detail": c.detail, "hint": c.hint} for c in report.checks]
        emit_json({"ok": report.ok, "checks": checks})
    else:
        for check in report.checks:
            mark = click.style("pass" if check.ok else "FAIL", fg="green" if check.ok else "red")
            emit(f"  {mark}  {check.name:<13} {check.detail}")
            if check.hint:
                emit(f"        {'':<13} {click.style('hint:', fg='cyan')} {check.hint}")
    return 0 if report.ok else 4
