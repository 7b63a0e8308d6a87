"""How long QEMU's own monitor is silent: asks again and again, and keeps the longest wait."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import threading
import time
from types import TracebackType

from tests.qemu.monitor import Monitor


class Silence:
    """Asks `query-status` in a thread while it is entered; `waits` are how long that took, in seconds.

    Nobody else may use the session meanwhile.
    """

    def __init__(self, monitor: Monitor, pause: float = 0.0005) -> None:
        self.longest = 0.0
        self.waits: list[float] = []
        self.asked = 0
        self.error: BaseException | None = None
        self._monitor = monitor
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    def __enter__(self) -> Silence:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.error is not None and error is None:
            raise self.error

    def _ask(self) -> None:
        try:
            while not self._stop.is_set():
                begin = time.monotonic()
                self._monitor.execute("query-status", timeout=120)
                self.waits.append(time.monotonic() - begin)
                self.longest = max(self.longest, self.waits[-1])
                self.asked += 1
                time.sleep(self._pause)
        except Exception as error:  # noqa: BLE001 - raised again in the thread that asked for this
            self.error = error
