"""SIZE: how the user says how much ("2G", "50%", "all"), and how sizes are said to the user.

Units are binary, as in QEMU: 1K is 1024 bytes.
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import re
from dataclasses import dataclass
from typing import Literal

from ramlock.errors import SizeError
from ramlock.text import printable

KIB, MIB, GIB, TIB = 1 << 10, 1 << 20, 1 << 30, 1 << 40
MAX_SIZE = (1 << 63) - 1
"""No size can be larger: the kernel keeps file and memory sizes in signed 64 bits."""

_UNITS = {"": 1, "b": 1, "k": KIB, "kib": KIB, "m": MIB, "mib": MIB, "g": GIB, "gib": GIB, "t": TIB, "tib": TIB}
_NAMES = ((TIB, "TiB"), (GIB, "GiB"), (MIB, "MiB"), (KIB, "KiB"), (1, "B"))
_DECIMAL_UNITS = {"kb": "KiB", "mb": "MiB", "gb": "GiB", "tb": "TiB"}
_SIZE = r"([0-9]+)(?:\.([0-9]{1,6}))?[ \t\n\v\f\r]*([A-Za-z]*|%)"
_SPACES = " \t\n\v\f\r"
_LONGEST = 64
_EXAMPLES = "write it like 512M, 2G, 1.5GiB, 50% or all"


@dataclass(frozen=True, slots=True)
class Size:
    """How much the user asked for; `value` is in bytes or in percent, and is 0 for all."""

    kind: Literal["bytes", "percent", "all"]
    value: int = 0

    def resolve(self, ram: int) -> int:
        """Return the bytes that this is of `ram` bytes of guest RAM."""
        if self.kind == "all":
            return ram
        return ram * self.value // 100 if self.kind == "percent" else self.value

    def for_shim(self) -> str:
        """Return it as the shim reads it from RAMLOCK_GUARANTEE."""
        if self.kind == "all":
            return "all"
        return f"{self.value}%" if self.kind == "percent" else f"{self.value}B"

    def __str__(self) -> str:
        return format_size(self.value) if self.kind == "bytes" else self.for_shim()


def parse_size(text: str) -> Size:
    """Read a SIZE.

    Raises SizeError when it is not one, or is one that is nearly always a slip (a bare 2048, GB).
    """
    shown = printable(text, 40)
    bare = text.strip(_SPACES)
    if bare.lower() == "all":
        return Size("all")
    match = re.fullmatch(_SIZE, bare, re.ASCII) if len(bare) <= _LONGEST else None
    if match is None:
        if re.fullmatch(r"\s*-[0-9.]+\s*[A-Za-z%]*\s*", text):
            raise SizeError(f"'{shown}' is negative, a size is not", "to unlock everything say 0")
        raise SizeError(f"'{shown}' is not a size", _EXAMPLES)
    whole, fraction, unit = match[1], match[2] or "", match[3]
    if unit == "%":
        return _percent(whole, fraction, shown)
    if unit.lower() in _DECIMAL_UNITS:
        better = f"{match[0][: -len(unit)].strip()}{_DECIMAL_UNITS[unit.lower()]}"
        raise SizeError(
            f"'{shown}' is ambiguous: {unit} is a power of ten to some", f"use {better}: sizes are binary, as in QEMU"
        )
    if unit.lower() not in _UNITS:
        raise SizeError(f"'{shown}' has the unknown unit '{unit}'", "use K, M, G or T, or KiB, MiB, GiB or TiB")
    scaled = int(whole + fraction) * _UNITS[unit.lower()]
    if scaled % 10 ** len(fraction) and _UNITS[unit.lower()] == 1:
        raise SizeError(f"'{shown}' has a fraction of a byte", _EXAMPLES)
    value = scaled // 10 ** len(fraction)
    if value > MAX_SIZE:
        raise SizeError(f"'{shown}' is more memory than any machine has", "give at most what the guest has, or say all")
    if unit == "" and 1 <= value < MIB:
        raise SizeError(f"'{shown}' is {value} bytes, less than any guest can use", f"did you mean {value}M?")
    return Size("bytes", value)


def _percent(whole: str, fraction: str, shown: str) -> Size:
    if fraction.strip("0"):
        raise SizeError(f"'{shown}' is not a whole percentage", "use whole percent, or a size such as 1.5G")
    if int(whole) > 100:
        raise SizeError(f"'{shown}' is more than all of guest RAM", "use at most 100%, or say all")
    return Size("percent", int(whole))


def format_size(size: int) -> str:
    """Say `size` bytes for people: "1.5 GiB". Two decimals tell that it was rounded ("1.00 GiB" is not quite 1 GiB)."""
    for unit, name in _NAMES[:-1]:
        if abs(size) >= unit:
            if size % unit == 0:
                return f"{size // unit} {name}"
            return f"{size / unit:.1f} {name}" if size * 10 % unit == 0 else f"{size / unit:.2f} {name}"
    return f"{size} B"


def format_apart(one: int, other: int) -> tuple[str, str]:
    """Say two sizes that are compared: in a smaller unit when they differ and rounding would make them look alike."""
    shown = format_size(one), format_size(other)
    if one == other or _read_back(shown[0]) != _read_back(shown[1]):
        return shown
    unit, name = next((unit, name) for unit, name in _NAMES if one % unit == other % unit == 0)
    return f"{one // unit} {name}", f"{other // unit} {name}"


def _read_back(shown: str) -> float:
    number, name = shown.split()
    return float(number) * _UNITS[name.lower()]
