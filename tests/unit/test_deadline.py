"""Deadlines end, nest, and may never come."""
# SPDX-License-Identifier: GPL-2.0-or-later

import math

from ramlock.deadline import Deadline


def test_never() -> None:
    never = Deadline(None)
    assert never.remaining == math.inf
    assert not never.expired
    assert 0 < never.within(5).remaining <= 5


def test_past() -> None:
    past = Deadline(-1)
    assert past.expired
    assert past.remaining == 0
    assert past.within(5).remaining == 0


def test_the_sooner_counts() -> None:
    assert Deadline(2).within(60).remaining <= 2
