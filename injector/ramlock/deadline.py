"""A point in time until which one waits, so that a chain of waits ends when the whole was to end."""
# SPDX-License-Identifier: GPL-2.0-or-later

import math
import time


class Deadline:
    """A point on the monotonic clock, `seconds` from now; None is never."""

    def __init__(self, seconds: float | None) -> None:
        self._at = math.inf if seconds is None else time.monotonic() + seconds

    @property
    def remaining(self) -> float:
        """Seconds left, 0 when it has passed, infinite when it never comes."""
        return max(0.0, self._at - time.monotonic())

    @property
    def expired(self) -> bool:
        """Whether it has passed."""
        return self.remaining == 0.0

    def within(self, seconds: float) -> "Deadline":
        """Return the sooner of this deadline and `seconds` from now."""
        return Deadline(min(self.remaining, seconds))
