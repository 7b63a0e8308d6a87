"""The command line: one module per verb, loaded when it is used; errors are caught here, once."""
# SPDX-License-Identifier: GPL-2.0-or-later

import importlib
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

import click

from ramlock import __version__, streams
from ramlock.errors import Interrupted, RamlockError
from ramlock.priority import give_way
from ramlock.text import printable

VERBS = {
    "run": "Start QEMU with the shim in it.",
    "inject": "Bring the shim into a VM that runs already.",
    "set": "Set how much guest RAM is guaranteed.",
    "status": "Show what is guaranteed and what is locked.",
    "list": "Show every VM on this host.",
    "watch": "Watch what is locked, as it happens.",
    "locate": "Show where guest RAM is in QEMU's memory.",
    "preflight": "Say whether a VM can be injected, and if not, why.",
    "metrics": "Tell Prometheus of every VM on this host.",
    "doctor": "Say what on this host helps or hinders, and what to do.",
    "apply": "Give every VM of this host what a policy says.",
    "daemon": "Keep every VM of this host as a policy says.",
    "eject": "Take the shim out of a VM that runs.",
}
"""Every verb and its one line of help; `ramlock --help` needs no more, and loads none of the modules."""

LOOKERS = {"apply", "daemon", "doctor", "inject", "locate", "preflight"}
"""Those that look at much of the VM, and so take CPU time that it may miss."""


class _Lazy(click.Group):
    """A group that imports the module of a verb when the verb is used."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*VERBS]  # `list` is a verb's module here, once that is loaded

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in VERBS:
            return None
        if cmd_name in LOOKERS:
            give_way()
        command = importlib.import_module(f"ramlock.commands.{cmd_name}").command
        return command if isinstance(command, click.Command) else None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([*VERBS.items()])


@click.group(
    cls=_Lazy,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="ramlock %(version)s")
@click.pass_context
def cli(ctx: click.Context) -> None:
    """Guarantee a VM locked guest RAM, and change how much while it runs.

    Examples:

    \b
    Start an unmodified QEMU under ramlock, with 1 GiB guaranteed:
      ramlock run --guarantee 1G -- qemu-system-x86_64 -name web -m 4G ...
    Bring it into one that runs already:
      ramlock inject --vm db --guarantee 1G
    Raise it to 3 GiB, then look, then let go of everything:
      ramlock set 3G --vm web
      ramlock status --vm web
      ramlock set 0 --vm web
    Half of guest RAM; all of it, also what is plugged in later:
      ramlock set 50% --pid 4711
      ramlock set all --pid 4711

    SIZE is in bytes or has a binary unit (512M, 2G, 1.5GiB), is a percentage, or is "all".

    \b
    Exit codes: 0 done, 1 failed, 2 usage, 3 timed out (the guarantee stays set),
    4 refused (nothing was touched), 5 short (set, but not all of it can be locked now),
    6 no such VM or no shim in it, 7 no permission, 130 interrupted.
    """
    ctx.color = _color()
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help(), err=True)
        ctx.exit(2)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    sys.exit(_run(argv))


def _run(argv: Sequence[str] | None) -> int:
    streams.settle()
    done = False
    try:
        code = cli.main(args=argv, prog_name="ramlock", standalone_mode=False)
        done = True
        _flush_output()
        return code if isinstance(code, int) else 0
    except RamlockError as error:
        if isinstance(error, Interrupted):
            _discard_output()  # what could not be written until now would be waited for again on the way out
        _tell(error.message, error.hint, error.details)
        return error.exit_code
    except click.UsageError as error:
        where = error.ctx.command_path if error.ctx else "ramlock"
        _tell(error.format_message(), f"see {where} --help")
        return 2
    except click.ClickException as error:
        _tell(error.format_message(), "see ramlock --help")
        return 1
    except (KeyboardInterrupt, click.Abort):
        _discard_output()
        if done:
            _tell("interrupted while the output was written", "what was asked has been done")
        else:
            _tell("interrupted before anything was changed", "run it again")
        return 130
    except BrokenPipeError:
        _discard_output()  # whoever read it has seen enough
        return 1
    except Exception as error:  # noqa: BLE001 whatever it is, the user gets two lines and not a traceback
        if os.environ.get("RAMLOCK_DEBUG"):
            import traceback  # loads much that no other command needs

            traceback.print_exc()
        _tell(
            f"unexpected {type(error).__name__}: {error}",
            "this is a fault in ramlock; please report it with what RAMLOCK_DEBUG=1 prints",
        )
        return 1


def _flush_output() -> None:
    """Write what is left of our output. Raises RamlockError when it cannot be, as on a full disk."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        _discard_output()
        raise RamlockError(
            f"cannot write the output: {error.strerror}", "what was asked has been done; see it with: ramlock status"
        ) from None


def _discard_output() -> None:
    """Let what is left of our output go nowhere; Python would stumble over it on the way out, and exit with 120."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _tell(message: str, hint: str, details: Sequence[str] = ()) -> None:
    """Print one line of what happened and one of what to do, with `details` in between."""
    for style, word, text, more in (("red", "ramlock:", message, details), ("cyan", "hint:", hint, ())):
        line = printable(" ".join(text.split("\n")), 2000)
        click.echo(f"{click.style(word, fg=style)} {line}", err=True, color=_color())
        for row in more:
            click.echo(printable(row, 200), err=True)


def _color() -> bool | None:
    """False when colours are not wanted (no-color.org); None leaves it to whether it is a terminal."""
    return False if os.environ.get("NO_COLOR") else None
