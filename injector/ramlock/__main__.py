"""The command `ramlock`, which is also `python -m ramlock`."""
# SPDX-License-Identifier: GPL-2.0-or-later

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line; Ctrl-C says one line from the beginning on, and not what was being loaded."""
    ours = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if ours:
        signal.signal(signal.SIGINT, _leave)
    from ramlock import commands

    if ours:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    commands.main()


def _leave(number: int, frame: FrameType | None) -> None:
    os.write(2, b"ramlock: interrupted before anything was changed\nhint: run it again\n")
    os._exit(130)


if __name__ == "__main__":
    main()
