"""What the pages of the project show: commands, snippets, links, tables. Pure text; the tests judge it."""

# SPDX-License-Identifier: GPL-2.0-or-later
from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "examples").rglob("*.md")),
]


class Block(NamedTuple):
    """A fenced block. `language` is empty for commands, which is what most blocks are; "text" is for reading only."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


class Command(NamedTuple):
    """A line of shell, continuation lines joined."""

    page: Path
    line: int
    text: str

    @property
    def where(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}: {self.text}"


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page."""
    text = page.read_text()
    for match in re.finditer(r"^```([a-z]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        yield Block(page, text.count("\n", 0, match.start(2)) + 1, match[1], match[2])


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def spans(page: Path) -> list[str]:
    """What stands in backticks in a page's text, such as `ramlock list`."""
    return re.findall(r"`([^`\n]+)`", prose(page))


def commands(page: Path) -> Iterator[Command]:
    """The commands that a page shows in its blocks."""
    for block in blocks(page):
        if block.language in ("", "sh"):
            joined, first = "", block.line
            for number, line in enumerate(block.text.splitlines(), block.line):
                joined, first = (f"{joined} {line.strip()}", first) if joined else (line.strip(), number)
                if joined.endswith("\\"):
                    joined = joined[:-1].rstrip()
                elif joined and not joined.endswith("|"):
                    yield Command(page, first, joined)
                    joined = ""


def simple(command: str) -> Iterator[list[str]]:
    """The words of each simple command in a line of shell: without variables before it, and redirections."""
    lexer = shlex.shlex(command, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    words: list[str] = []
    for word in [*lexer, ";"]:
        if word in ("|", "||", "&", "&&", ";"):
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                del words[0]
            if words:
                yield words
            words = []
        elif words[-1:] in ([">"], [">>"], ["<"]):
            del words[-1]  # the name of a file, and what came before it
        else:
            words.append(word)


def executes(text: str) -> Iterator[dict[str, Any]]:
    """The QMP requests in a text. Raises ValueError for one that is no JSON."""
    for match in re.finditer(r'\{\s*"execute"', text):
        yield json.JSONDecoder().raw_decode(text, match.start())[0]


def anchors(page: Path) -> set[str]:
    """The anchors that a page's headings have on GitHub and elsewhere."""
    headings = re.findall(r"^#+ +(.*?) *$", re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.S | re.M), re.M)
    return {
        re.sub(r"[^\w\- ]", "", re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h).lower()).replace(" ", "-") for h in headings
    }


def links(page: Path) -> list[str]:
    """The targets of a page's links and pictures."""
    return re.findall(r"\]\(([^)\s]+)\)", prose(page))


def table(page: str, heading: str) -> dict[str, list[str]]:
    """The rows of the first table below a heading: the name in the first column, and the other columns."""
    rows = re.search(r"(?:^\|.*\n)+", page.split(f"\n{heading}\n", 1)[1], re.MULTILINE)
    assert rows
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in rows.group().splitlines()[2:]]
    return {name.strip("`"): rest for names, *rest in cells for name in names.split(", ")}
