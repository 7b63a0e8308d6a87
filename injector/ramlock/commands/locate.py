"""`ramlock locate`: show where guest RAM is in QEMU's memory."""
# SPDX-License-Identifier: GPL-2.0-or-later

from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import click

from ramlock import procfs, vms
from ramlock.commands.common import emit, emit_json, one_vm_options, which_vm
from ramlock.errors import ControlError, NoPermission, NotFound, Refused
from ramlock.sizes import format_size
from ramlock.text import printable
from ramlock.vms import Selector

if TYPE_CHECKING:
    from ramlock.guestram import Found

_SOURCES = {
    "qemu": "the shim in it",
    "symbols": "QEMU's list of RAM blocks",
    "maps": "its mappings and its command line",
}


@click.command()
@one_vm_options
@click.option(
    "--source",
    type=click.Choice(["auto", "qemu", "symbols", "maps"]),
    default="auto",
    show_default=True,
    help="Whose word to take; auto is the best of all, which must agree.",
)
@click.option("--json", "as_json", is_flag=True, help="Print it as JSON; addresses in the process, sizes in bytes.")
def command(pid: int | None, vm: str | None, source: str, as_json: bool) -> None:
    """Show where guest RAM is in QEMU's memory.

    It also says how sure that is. Looks only: nothing is written to the VM, nothing is stopped. The table can be held
    against the monitor's "info ramblock", which has ROMs and video RAM as well.

    Examples:

    \b
      ramlock locate --vm web
      ramlock locate --pid 4711 --json | jq '.blocks[].host'
    One source alone:
      ramlock locate --pid 4711 --source maps

    \b
    qemu     what the shim in it sees
    symbols  QEMU's own list of RAM blocks, read in its memory
    maps     its mappings, held against its command line

    "certain" is locked by ramlock inject, "probable" only with --allow-probable.
    """
    from ramlock import tell  # takes libraries that --help need not

    process = vms.find(which_vm(pid, vm))
    with ExitStack() as stack:
        session = _session(stack, process.pid) if source in ("auto", "qemu") else None
        found = tell.everywhere(session, process, source)
    if as_json:
        emit_json(_json(found))
    else:
        emit("\n".join(_lines(process, found)))


def _session(stack: ExitStack, pid: int) -> vms.Vm | None:
    """A session with the shim, when there is one that serves us."""
    with suppress(NotFound, NoPermission, ControlError, Refused):
        return stack.enter_context(vms.session(Selector(pid)))
    return None


def _json(found: "Found") -> dict[str, Any]:
    blocks = [
        {"id": b.id, "host": b.host, "size": b.size, "page-size": b.page_size, "backing": b.backing}
        for b in found.blocks
    ]
    result: dict[str, Any] = {"source": found.source, "confidence": found.confidence, "blocks": blocks}
    if found.doubts:
        result["doubts"] = list(found.doubts)
    return result


def _lines(process: procfs.Process, found: "Found") -> list[str]:
    name = f"{printable(process.name, 80)} (pid {process.pid})" if process.name else f"VM (pid {process.pid})"
    color = "green" if found.certain else "yellow"
    result = [
        click.style(name, bold=True),
        f"  source      {found.source}: {_SOURCES[found.source]}",
        f"  confidence  {click.style(found.confidence, fg=color)}",
        *(f"              {printable(doubt)}" for doubt in found.doubts),
        "",
    ]
    if not found.blocks:
        return [*result, "  it has no guest RAM yet"]
    width = max(len("Block Name"), *(len(printable(b.id, 80)) for b in found.blocks))
    result.append(f"  {'Block Name':>{width}}    PSize  {'Host':>18}  {'Used':>18}      Size  Backing")
    for b in found.blocks:
        part = ", virtio-mem: only what is plugged" if b.virtio_mem else ""
        result.append(
            f"  {printable(b.id, 80):>{width}}  {format_size(b.page_size):>7}  {b.host:#018x}  {b.size:#018x}"
            f"  {format_size(b.size):>8}  {b.backing}{part}"
        )
    return result
