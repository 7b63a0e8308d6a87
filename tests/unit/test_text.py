"""Text from a VM cannot play with the terminal."""
# SPDX-License-Identifier: GPL-2.0-or-later

from hypothesis import given
from hypothesis import strategies as st

from ramlock.text import printable


def test_control_characters_are_shown() -> None:
    assert printable("web\x1b[2J\r\n") == "web\\x1b[2J\\r\\n"
    assert printable("a\u202eb") == "a\\u202eb"
    assert printable("\udcff") == "\\udcff"
    assert printable("Grüße 1") == "Grüße 1"


def test_long_text_is_cut() -> None:
    assert printable("x" * 1000, 10) == "x" * 10 + "..."


@given(st.text(st.characters()))
def test_always_printable_and_bounded(text: str) -> None:
    shown = printable(text, 50)
    assert shown.isprintable()
    shown.encode()
    assert len(shown) <= 53 * 10
