"""Builds the man pages: `man.py FOLDER` writes ramlock.1, out of the commands' own help, and ramlock-protocol.7.

ramlock(1) cannot say anything else than `ramlock --help`: names, options and examples come from the same place. Both go
through lowdown(1), which turns Markdown into man(7).
"""
# SPDX-License-Identifier: GPL-2.0-or-later

import inspect
import itertools
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import click

from ramlock import __version__
from ramlock.commands import VERBS, cli

TOP = Path(__file__).resolve().parents[1]
EXIT_CODES = (
    ("0", "done"),
    ("1", "failed; `doctor`: something does not work here"),
    ("2", "usage"),
    ("3", "timed out: the guarantee stays set"),
    ("4", "refused before anything was touched"),
    ("5", "short: set, but not all of it can be locked now"),
    ("6", "no such VM, or no shim in it"),
    ("7", "no permission"),
    ("130", "interrupted: a guarantee that was set stays set"),
)
FILES = (
    ("/run/ramlock/PID.sock", "the control socket of a VM of root; ramlock-protocol(7) has the other places"),
    ("/usr/lib/ramlock/ramlock.so", "the shim, or in /usr/local/lib/ramlock; `RAMLOCK_SHIM` names another"),
)


def escape(text: str) -> str:
    """Keep Markdown from seeing more in `text` than words."""
    return re.sub(r"([\\`*_<>\[\]#|~$])", r"\\\1", text)


def paragraphs(text: str) -> list[str]:
    """Turn click's help into Markdown: what follows a \\b keeps its lines, the rest is wrapped anew."""
    result = []
    for block in re.split(r"\n\s*\n", inspect.cleandoc(text)):
        if not block.startswith("\b"):
            result.append(escape(" ".join(block.split())))
            continue
        for indented, group in itertools.groupby(block.split("\n")[1:], lambda line: line.startswith(" ")):
            lines = list(group)
            result.append("\n".join(f"    {line}" for line in lines) if indented else escape(" ".join(lines)))
    return [part for part in result if part.strip()]


def option(parameter: click.Option, context: click.Context) -> str | None:
    """One option as an entry of a list."""
    record = parameter.get_help_record(context)
    if record is None:
        return None
    return entry(*record)


def entry(term: str, text: str) -> str:
    """An entry of a list: a term and what it is."""
    return f"**{escape(term)}**\n:   {text if '`' in text else escape(text)}\n"


def verb(name: str) -> list[str]:
    """The part about one verb."""
    root = click.Context(cli, info_name="ramlock")
    command = cli.get_command(root, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=root)
    usage = " ".join(command.collect_usage_pieces(context))
    parts = [f"## ramlock {name}", f"**ramlock {name}** {escape(usage)}", *paragraphs(command.help or "")]
    options = [option(p, context) for p in command.get_params(context) if isinstance(p, click.Option)]
    return [*parts, *(text for text in options if text)]


def command_page() -> str:
    """ramlock(1) in Markdown."""
    parts = ["# NAME", "ramlock - guarantee a VM locked guest RAM, and change how much while it runs"]
    parts += ["# SYNOPSIS", "**ramlock** COMMAND [OPTIONS] [ARGS]...".replace("[", "\\["), "# DESCRIPTION"]
    parts += [part for part in paragraphs(cli.help or "") if not part.startswith("Exit codes:")]
    parts.append("# COMMANDS")
    for name in VERBS:
        parts += verb(name)
    parts += ["# EXIT STATUS", *(entry(*row) for row in EXIT_CODES)]
    parts += ["# FILES", *(entry(*row) for row in FILES)]
    parts += ["# SEE ALSO", "ramlock-protocol(7), qemu(1), mlock(2), proc(5)"]
    return "\n\n".join(parts) + "\n"


def protocol_page() -> str:
    """ramlock-protocol(7) in Markdown: docs/protocol.md, with its headings one level up."""
    text = (TOP / "docs/protocol.md").read_text()
    text = re.sub(r"^# .*\n", "", text, count=1)
    text = re.sub(
        r"^#(#+) (.*)$", lambda m: f"{m[1]} {m[2].upper() if len(m[1]) == 1 else m[2]}", text, flags=re.MULTILINE
    )
    name = "# NAME\n\nramlock-protocol - the control socket of the ramlock shim\n\n# DESCRIPTION\n"
    return f"{name}{text}\n# SEE ALSO\n\nramlock(1), unix(7)\n"


def roff(page: str, title: str, section: int) -> str:
    """Turn Markdown into man(7)."""
    command = ["lowdown", "-s", "-tman", "--out-no-smarty"]
    source = subprocess.run(command, input=page, capture_output=True, text=True, check=True).stdout
    date = time.strftime("%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time()))))
    head = f'.TH "{title.upper()}" "{section}" "{date}" "ramlock {__version__}"'
    source = re.sub(r"^\.TH .*$", lambda _: head, source, count=1, flags=re.MULTILINE)
    source = source.replace("\\fC", "\\fB")  # a font that terminals do not have
    source = re.sub(r"^(\.S[HS])\n(.*\n)(?:\.(?:PP|LP)\n)*", r"\1 \2", source, flags=re.MULTILINE)
    # Cells are too narrow to be filled up with spaces.
    source = source.replace("T{\n", "T{\n.ad l\n")
    return "'\\\" t\n" + source


def main() -> None:
    """Write both pages."""
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ramlock.1").write_text(roff(command_page(), "ramlock", 1))
    (folder / "ramlock-protocol.7").write_text(roff(protocol_page(), "ramlock-protocol", 7))


if __name__ == "__main__":
    main()
