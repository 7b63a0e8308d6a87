"""Work on what a hostile process made up, by a library that does not bound what it takes: in a child that may be lost.

The child may take so much memory and time, and then the kernel ends it: also where the library is in the middle of
one call, and also when we are killed meanwhile.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import json
import os
import resource
import select
import signal
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from ramlock.deadline import Deadline

MEMORY = 1 << 30
"""Bytes of address space that the child may add to what it has."""
_ANSWER_MOST = 1 << 16


def run(work: Callable[[], Any], seconds: float, memory: int = MEMORY) -> Any:
    """Return what `work` returns, which JSON can hold; None when it fails, or takes more than it may."""
    reader, writer = os.pipe()
    try:
        child = os.fork()
    except BaseException:
        os.close(reader)
        os.close(writer)
        raise
    if child == 0:
        try:
            os.close(reader)
            _limit(seconds, memory)
            os.write(writer, json.dumps(work()).encode()[:_ANSWER_MOST])
        finally:
            os._exit(0)  # also from whatever was raised: what is half written is no JSON
    try:
        os.close(writer)
        return _answer(reader, Deadline(seconds))
    finally:
        os.close(reader)
        with suppress(OSError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _limit(seconds: float, memory: int) -> None:
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    with open("/proc/self/statm", "rb") as file:
        now = int(file.read(64).split()[0]) * resource.getpagesize()
    for kind, most in ((resource.RLIMIT_AS, now + memory), (resource.RLIMIT_CORE, 0)):
        soft, hard = resource.getrlimit(kind)
        if soft == resource.RLIM_INFINITY or soft > most:
            resource.setrlimit(kind, (most, hard))


def _answer(reader: int, deadline: Deadline) -> Any:
    data = b""
    while len(data) <= _ANSWER_MOST:
        if not select.select([reader], [], [], deadline.remaining)[0]:
            return None
        piece = os.read(reader, _ANSWER_MOST)
        if not piece:
            break
        data += piece
    with suppress(ValueError):
        return json.loads(data)
    return None
