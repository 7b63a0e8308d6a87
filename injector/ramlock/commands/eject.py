"""`ramlock eject`: take the shim out of a VM that runs."""
# SPDX-License-Identifier: GPL-2.0-or-later

import click

from ramlock.api import VM
from ramlock.commands.common import emit, one_vm_options, seconds_option
from ramlock.vms import Selector


@click.command()
@one_vm_options
@seconds_option("--timeout", "How long it may take to unlock everything.", 30.0)
def command(pid: int | None, vm: str | None, timeout: float) -> None:
    """Take the shim out of a VM that runs.

    Everything that it holds is unlocked, its threads end, its socket goes away; the VM runs on. `ramlock inject` brings
    it back.

    Examples:

    \b
      ramlock eject --vm web
    """
    label = VM(Selector(pid, vm)).eject(timeout)
    emit(f"{label}: the shim has left, nothing is guaranteed any more")
