"""`ramlock daemon`: keep every VM of this host as a policy says."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import signal
from contextlib import suppress
from pathlib import Path

import click

from ramlock.commands.common import seconds_option, unstopped
from ramlock.daemon import EVERY, Daemon
from ramlock.notify import Notifier
from ramlock.text import printable


@click.command()
@click.option("--policy", "file", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The policy.")
@seconds_option("--interval", "How often all VMs are looked at; one that comes is seen within a second or two.", EVERY)
def command(file: Path, interval: float) -> None:
    """Keep every VM of this host as a policy says.

    Examples:

    \b
    Does what ramlock apply does, again whenever a VM comes or the policy changes:
      ramlock daemon --policy /etc/ramlock/policy.toml
    As a service (examples/systemd/ramlock.service), and reading its policy again at once:
      systemctl enable --now ramlock
      systemctl reload ramlock

    However it ends, no guarantee changes. It runs in the foreground, tells systemd how it is (sd_notify, watchdog), and
    goes on with the former policy when the new one has a fault.
    """
    daemon = Daemon(file, Notifier(os.environ), _say, interval)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: daemon.stop.set())
    signal.signal(signal.SIGHUP, lambda *_: daemon.reload.set())
    with unstopped():
        daemon.run()


def _say(text: str) -> None:
    with suppress(OSError):  # a log that is full or gone is no reason to leave VMs alone
        click.echo(printable(text, 2000), err=True)
