"""Make text that comes from a VM safe to show: one line, no control characters, bounded."""
# SPDX-License-Identifier: GPL-2.0-or-later


def printable(text: str, limit: int = 500) -> str:
    """Return `text` with everything escaped that could move a terminal's cursor, cut at `limit` characters.

    A VM's name and the shim's messages come from a process that may be hostile to whoever reads them.
    """
    if len(text) > limit:
        text = text[:limit] + "..."
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape", "backslashreplace").decode() for char in text
    )
