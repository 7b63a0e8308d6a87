"""How long QEMU's own monitor is silent: asks again and again, and keeps the longest wait."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import threading
import time
from types import TracebackType
from typing import Self

from tests.qemu.monitor import Monitor


class Background:
    """Does `once` again and again in a thread while it is entered; what goes wrong there is raised at the end."""

    def __init__(self, pause: float) -> None:
        self.error: BaseException | None = None
        self._pause = pause
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def once(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(60)
        if self.error is not None and error is None:
            raise self.error

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self.once()
                time.sleep(self._pause)
        except BaseException as error:  # noqa: BLE001 - raised again in the thread that asked for this
            self.error = error


class Silence(Background):
    """Asks `query-status` in a thread while it is entered; `waits` are how long that took, in seconds.

    Nobody else may use the session meanwhile.
    """

    def __init__(self, monitor: Monitor, pause: float = 0.0005) -> None:
        super().__init__(pause)
        self.longest = 0.0
        self.waits: list[float] = []
        self.asked = 0
        self._monitor = monitor

    def once(self) -> None:
        begin = time.monotonic()
        self._monitor.execute("query-status", timeout=120)
        self.waits.append(time.monotonic() - begin)
        self.longest = max(self.longest, self.waits[-1])
        self.asked += 1
