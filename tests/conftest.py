"""What all tests share: a deadline for each, and what happens when something they need is absent."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

import pytest

# No test may hang: a stuck one fails after this many seconds, wherever it is.
DEADLINE = int(os.environ.get("RAMLOCK_TEST_DEADLINE", "300"))

Need = Callable[..., None]


def absent(reason: str, package: str | None = None) -> NoReturn:
    """Skip the test; where CI says that everything is installed, fail it."""
    hint = f"{reason} (install: {package})" if package else reason
    if os.environ.get("CI") == "true":
        pytest.fail(hint, pytrace=False)
    pytest.skip(hint)


@pytest.fixture
def need() -> Need:
    """A function that skips the test unless a command or a path is there."""

    def check(what: str, package: str | None = None) -> None:
        there = os.path.exists(what) if what.startswith("/") else shutil.which(what)
        if not there:
            absent(f"{what} is not here", package)

    return check


@pytest.fixture(autouse=True)
def deadline(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that takes too long; @pytest.mark.deadline(seconds) gives it another deadline."""
    marker = request.node.get_closest_marker("deadline")
    seconds = marker.args[0] if marker else DEADLINE

    def expired(_number: int, _frame: FrameType | None) -> None:
        raise TimeoutError(f"the test took more than {seconds} s")

    former = signal.signal(signal.SIGALRM, expired)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, former)


def pytest_configure(config: pytest.Config) -> None:
    """Registers this suite's own mark, and takes SIGINT, which a shell has what it runs in the background ignore."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    config.addinivalue_line("markers", "deadline(seconds): fail the test after that many seconds")
