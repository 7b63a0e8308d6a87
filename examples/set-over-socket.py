#!/usr/bin/env python3
"""Sets a running VM's guarantee with the qemu.qmp library and follows it: set-over-socket.py SOCKET BYTES."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import asyncio
import sys
from typing import Any

from qemu.qmp import EventListener, ExecuteError, QMPClient

EVENTS = ("RAM_MINGUARANTEE_PROGRESS", "RAM_MINGUARANTEE_REACHED", "RAM_MINGUARANTEE_SHORT")


async def follow(events: EventListener, size: int) -> int:
    """Prints what the shim tells of this guarantee until it is reached, or cannot be."""
    while True:
        event: Any = await events.get()
        data = event["data"]
        if data["requested"] != size:
            continue  # of a guarantee that was set before ours
        print(f"{event['event']}: {data['locked'] >> 20} of {size >> 20} MiB locked")
        if event["event"] == "RAM_MINGUARANTEE_SHORT":
            print(f"short: {data['desc']}", file=sys.stderr)
            return 5
        if event["event"] == "RAM_MINGUARANTEE_REACHED":
            return 0


async def main(path: str, size: int) -> int:
    """The command answers at once; the events tell when it is done."""
    client = QMPClient("set-over-socket")
    await client.connect(path)
    try:
        with client.listener(EVENTS) as events:
            await client.execute("set_ram_minguarantee", {"size": size})
            return await asyncio.wait_for(follow(events, size), timeout=600)
    except ExecuteError as error:
        print(f"refused: {error}", file=sys.stderr)
        return 4
    finally:
        await client.disconnect()


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(asyncio.run(main(sys.argv[1], int(sys.argv[2]))))
