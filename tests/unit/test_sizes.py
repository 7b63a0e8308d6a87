"""SIZE as people write it, and as they should not."""
# SPDX-License-Identifier: GPL-2.0-or-later

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ramlock.errors import SizeError
from ramlock.sizes import GIB, KIB, MAX_SIZE, MIB, TIB, Size, format_apart, format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1048576", MIB),
        ("1073741824", GIB),
        ("512M", 512 * MIB),
        ("2G", 2 * GIB),
        ("2g", 2 * GIB),
        ("2GiB", 2 * GIB),
        ("2 GiB", 2 * GIB),
        ("1T", TIB),
        ("1TiB", TIB),
        ("64K", 64 * KIB),
        ("64kib", 64 * KIB),
        ("4096B", 4096),
        ("1.5G", 3 * GIB // 2),
        ("0.5GiB", GIB // 2),
        ("1.1G", 11 * GIB // 10),
        ("2097152.0", 2 * MIB),
        (" 2G ", 2 * GIB),
        (str(MAX_SIZE), MAX_SIZE),
    ],
)
def test_bytes(text: str, size: int) -> None:
    assert parse_size(text) == Size("bytes", size)


TABLE = Path(__file__).parents[1] / "sizes.txt"
"""Read by the shim's own test as well."""


@pytest.mark.parametrize("line", [line for line in TABLE.read_text().splitlines() if line[0] != "#"])
def test_the_table_that_the_shim_is_held_to(line: str) -> None:
    text, _, meaning = line[1:].rpartition('" ')
    text = text.replace("\\t", "\t")
    if meaning == "refused":
        with pytest.raises(SizeError):
            parse_size(text)
    else:
        size = parse_size(text)
        assert f"{size.kind} {size.value}" == meaning
        assert parse_size(size.for_shim()) == size


def test_percent_and_all() -> None:
    assert parse_size("50%") == Size("percent", 50)
    assert parse_size("0%").resolve(GIB) == 0
    assert parse_size("100.0%").resolve(GIB + 4096) == GIB + 4096
    assert parse_size("33%").resolve(100) == 33
    assert parse_size("all") == parse_size("ALL") == Size("all")
    assert parse_size("all").resolve(GIB) == GIB


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "write it like"),
        ("abc", "write it like"),
        ("-1", "say 0"),
        ("-1G", "say 0"),
        ("nan", "write it like"),
        ("inf", "write it like"),
        ("1e9", "write it like"),
        ("0x1000", "write it like"),
        ("1,5G", "write it like"),
        ("+5G", "write it like"),
        ("1_000_000", "write it like"),
        ("٣G", "write it like"),
        ("2G2", "write it like"),
        ("2Gi", "KiB, MiB, GiB"),
        ("2P", "KiB, MiB, GiB"),
        ("2GB", "use 2GiB"),
        ("2.5 mb", "use 2.5MiB"),
        ("2048", "2048M?"),
        ("1", "1M?"),
        ("1048575", "1048575M?"),
        ("1.5", "write it like"),
        ("0.3B", "write it like"),
        ("101%", "at most 100%"),
        ("12.5%", "whole percent"),
        ("50%%", "write it like"),
        ("9" * 31, "all"),
        (str(MAX_SIZE + 1), "all"),
        ("9" * 5000, "write it like"),
        ("1\n2G", "write it like"),
        ("\x1b[31m", "write it like"),
    ],
)
def test_refused(text: str, hint: str) -> None:
    with pytest.raises(SizeError) as error:
        parse_size(text)
    assert error.value.exit_code == 2
    assert hint in error.value.hint
    assert len(error.value.message) < 200
    assert error.value.message.isprintable()


def test_what_the_shim_is_told() -> None:
    assert [parse_size(text).for_shim() for text in ("1G", "50%", "all", "0")] == ["1073741824B", "50%", "all", "0B"]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (4096, "4 KiB"),
        (MIB, "1 MiB"),
        (GIB, "1 GiB"),
        (3 * GIB // 2, "1.5 GiB"),
        (GIB + 4096, "1.00 GiB"),
        (2 * TIB, "2 TiB"),
    ],
)
def test_format(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.text(max_size=80))
def test_any_text_is_a_size_or_a_clear_error(text: str) -> None:
    try:
        size = parse_size(text)
    except SizeError as error:
        assert error.message.isprintable()
        assert error.hint.isprintable()
    else:
        assert 0 <= size.value <= MAX_SIZE


@given(st.integers(MIB, MAX_SIZE))
def test_a_bare_number_is_bytes(number: int) -> None:
    assert parse_size(str(number)).value == number


@given(st.integers(0, 1 << 22), st.sampled_from(["K", "MiB", "g", "T"]))
def test_what_is_formatted_exactly_reads_back(number: int, unit: str) -> None:
    size = parse_size(f"{number}{unit}").value
    shown = format_size(size)
    assert "." in shown or shown.endswith(" B") or parse_size(shown).value == size


@given(st.integers(0, 100), st.integers(0, MAX_SIZE))
def test_a_percentage_is_never_more_than_there_is(percent: int, ram: int) -> None:
    assert 0 <= parse_size(f"{percent}%").resolve(ram) <= ram


@pytest.mark.parametrize(
    ("one", "other", "shown"),
    [
        (2 * GIB, GIB, ("2 GiB", "1 GiB")),
        (GIB, GIB, ("1 GiB", "1 GiB")),
        (GIB + 1, GIB + 1, ("1.00 GiB", "1.00 GiB")),
        (1025 * MIB, GIB, ("1025 MiB", "1024 MiB")),
        (GIB, GIB + 4096, ("1048576 KiB", "1048580 KiB")),
        (GIB + 1, GIB, ("1073741825 B", "1073741824 B")),
        (GIB - 1, GIB, ("1073741823 B", "1073741824 B")),
        (5 * MIB, GIB, ("5 MiB", "1 GiB")),
        (0, 1, ("0 B", "1 B")),
    ],
)
def test_two_sizes_that_are_compared(one: int, other: int, shown: tuple[str, str]) -> None:
    assert format_apart(one, other) == shown


@given(st.integers(0, 1 << 64), st.integers(-4096, 4096))
def test_two_sizes_look_alike_only_when_they_are(one: int, more: int) -> None:
    shown = format_apart(one, max(one + more, 0))
    assert (shown[0] == shown[1]) is (one == max(one + more, 0))
