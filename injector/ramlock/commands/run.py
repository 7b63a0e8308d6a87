"""`ramlock run`: start QEMU with the shim in it."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
from pathlib import Path

import click

from ramlock.commands.common import (
    SOCKET_PATH,
    follow_discards_option,
    force_option,
    lock_options,
    monitor_option,
    read_size,
)
from ramlock.sizes import Size


@click.command(
    context_settings={"ignore_unknown_options": False, "allow_interspersed_args": False},
    options_metavar="[OPTIONS] --",
)
@click.option("--guarantee", callback=read_size, metavar="SIZE", help="Guest RAM to guarantee from the start.")
@click.option(
    "--socket",
    type=SOCKET_PATH,
    help="Where the shim listens, instead of the usual place.",
)
@click.option("--allow-uid", type=click.IntRange(0, 2**32 - 2), metavar="UID", help="Another user who may set it.")
@lock_options
@follow_discards_option
@force_option
@monitor_option
@click.argument("qemu", nargs=-1, required=True, type=click.UNPROCESSED, metavar="QEMU [ARGS]...")
def command(
    guarantee: Size | None,
    socket: Path | None,
    allow_uid: int | None,
    order: str | None,
    prefault: bool | None,
    hold_budget: int | None,
    threads: int | None,
    host_reserve: int | None,
    follow_discards: bool,
    force: bool,
    monitor: bool,
    qemu: tuple[str, ...],
) -> None:
    """Start QEMU with the shim in it.

    ramlock becomes QEMU: the process keeps its pid, and libvirt, systemd and shells see QEMU itself. Everything after
    -- is QEMU's own command line.

    Examples:

    \b
    A VM with 1 GiB guaranteed from its start:
      ramlock run --guarantee 1G -- qemu-system-x86_64 -name web -m 4G disk.qcow2
    All of it, locked as the guest touches it:
      ramlock run --guarantee all --no-prefault -- qemu-system-x86_64 -m 4G disk.qcow2
    Nothing yet; `ramlock set` raises it later, also by user 1000:
      ramlock run --allow-uid 1000 -- qemu-system-x86_64 -name web -m 4G disk.qcow2

    Without this command the environment does the same:

    \b
      LD_PRELOAD=/usr/local/lib/ramlock/ramlock.so RAMLOCK_GUARANTEE=1G qemu-system-x86_64 ...

    Before QEMU starts it is checked that preloading can work and that the guarantee fits, and the limit of locked
    memory is raised as far as this user may.
    """
    from ramlock import launch  # takes pyelftools, which --help need not

    options = launch.Options(
        guarantee,
        order,
        prefault,
        socket,
        allow_uid,
        hold_budget,
        threads,
        host_reserve,
        follow_discards,
        force=force,
        monitor=monitor,
    )
    ready = launch.prepare(qemu, options, launch.own_environ(os.environ))
    for warning in ready.warnings:
        click.echo(f"ramlock: {warning}", err=True)
    launch.execute(ready)
