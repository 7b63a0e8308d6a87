"""`ramlock doctor`: say what on this host helps or hinders, and what to do."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import shutil
import textwrap

import click

from ramlock.commands.common import emit, emit_json

_COLORS = {"ok": "green", "note": "yellow", "bad": "red"}
_INDENT = " " * 24


@click.command()
@click.option("--pid", type=click.IntRange(1, 2**31 - 1), metavar="PID", help="Look at this VM's QEMU process, too.")
@click.option("--json", "as_json", is_flag=True, help='Print {"ok", "findings": [{"name", "level", "found", ...}]}.')
def command(pid: int | None, as_json: bool) -> int:
    """Say what on this host helps or hinders, and what to do.

    Looks only: nothing is changed. Every line says what was found and what it means here; "note" is worth knowing,
    "bad" keeps something from working, and each says what to do. Exit code 0 when nothing is bad, else 1.

    \b
    Examples:
      ramlock doctor
      ramlock doctor --pid 4711
      ramlock doctor --json | jq '.findings[] | select(.level != "ok")'
    """
    from ramlock import doctor  # takes libraries that --help need not

    where = doctor.Host(os.environ)
    findings = doctor.examine(where)
    if pid is not None:
        findings += doctor.examine_vm(where, pid)
    ok = all(finding.level != "bad" for finding in findings)
    if as_json:
        rows = [{"name": f.name, "level": f.level, "found": f.found, "means": f.means, "do": f.todo} for f in findings]
        emit_json({"ok": ok, "findings": rows})
        return 0 if ok else 1
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    for finding in findings:
        emit(f"  {click.style(f'{finding.level:<4}', fg=_COLORS[finding.level])}  {finding.name:<15} {finding.found}")
        for line in textwrap.wrap(finding.means, width, initial_indent=_INDENT, subsequent_indent=_INDENT):
            emit(click.style(line, dim=True))
        lines = textwrap.wrap(finding.todo, width, initial_indent=_INDENT + "do: ", subsequent_indent=_INDENT + "    ")
        for line in lines:
            emit(line)
    return 0 if ok else 1
