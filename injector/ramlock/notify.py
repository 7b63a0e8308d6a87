"""Tell systemd how it is with us (sd_notify(3)): a datagram to the socket that NOTIFY_SOCKET names."""
# SPDX-License-Identifier: GPL-2.0-or-later

import socket
from collections.abc import MutableMapping
from contextlib import suppress


class Notifier:
    """Tells the service manager; does nothing where there is none, and never fails, as nothing depends on it."""

    def __init__(self, environ: MutableMapping[str, str]) -> None:
        """Take the socket out of `environ`, so that what we start does not speak for us."""
        self._address = environ.pop("NOTIFY_SOCKET", "")
        if self._address.startswith("@"):
            self._address = "\0" + self._address[1:]

    def tell(self, **states: str | int) -> None:
        """Send states, such as READY=1 or STATUS="text"."""
        if not self._address:
            return
        text = "\n".join(f"{name}={value}" for name, value in states.items())
        with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode("utf-8", "replace"), self._address)
