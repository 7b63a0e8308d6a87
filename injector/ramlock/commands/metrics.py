"""`ramlock metrics`: tell Prometheus of every VM on this host."""
# SPDX-License-Identifier: GPL-2.0-or-later

import signal
import sys
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import click

from ramlock import survey
from ramlock.commands.common import answer_time_option, emit
from ramlock.errors import UsageError

if TYPE_CHECKING:
    from ramlock import metrics


@click.command()
@click.option("--listen", metavar="ADDR:PORT", help="Serve them by HTTP, on /metrics, until stopped.")
@click.option(
    "--textfile",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write them once to this file, for node_exporter's textfile collector.",
)
@answer_time_option(survey.TIME)
def command(listen: str | None, textfile: Path | None, timeout: float) -> None:
    """Tell Prometheus of every VM on this host.

    Without --listen and --textfile the metrics are printed once.

    \b
    Examples:
      ramlock metrics
      ramlock metrics --listen 127.0.0.1:9911
      ramlock metrics --textfile /var/lib/prometheus/node-exporter/ramlock.prom

    There is no password: listen where only Prometheus can come to. Alert rules and a dashboard are in
    examples/prometheus. It needs the library prometheus_client (pip install 'ramlock[metrics]').
    """
    from ramlock import metrics  # takes the library

    if listen is not None and textfile is not None:
        raise UsageError("--listen and --textfile cannot be had together", "run it twice")
    if listen is not None:
        _serve(metrics.Server(listen, timeout))
    elif textfile is not None:
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # nothing half written is left behind
        metrics.write(textfile, metrics.exposition(timeout))
    else:
        emit(metrics.exposition(timeout).decode().rstrip("\n"))


def _serve(server: "metrics.Server") -> None:
    def stop(_number: int, _frame: FrameType | None) -> None:
        raise SystemExit(0)

    signal.signal(signal.SIGTERM, stop)
    where, port = server.server_address[:2]
    shown = f"[{where!s}]" if ":" in str(where) else str(where)
    try:
        click.echo(f"ramlock: metrics are on http://{shown}:{port}/metrics", err=True)
        server.serve_forever()
    except KeyboardInterrupt:
        pass
    finally:
        server.server_close()
