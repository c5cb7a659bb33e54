"""What every command shares: user errors are one line, ctrl-c says how to go on.

A user error (:class:`~r1sae_fast.errors.R1SaeError`, ``ValueError``, ``OSError``) prints one line
on stderr and exits 1; ctrl-c exits 130. Anything else is a bug of ours and shows its traceback,
as does everything with ``r1sae --traceback ...`` or ``R1SAE_TRACEBACK=1``.
"""

import os
import shlex
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from r1sae_fast.errors import R1SaeError

TRACEBACK = "R1SAE_TRACEBACK"
INTERRUPTED = 130  # 128 + SIGINT, as shells have it

# Commands (by their path below `r1sae`) that go on where they stopped when run again.
RESUMABLE = {
    ("harvest",),
    ("convert",),
    ("train",),
    ("encode",),
    ("examples",),
    ("fetch",),
    ("label",),
    ("demo",),
    ("tiny-r1", "train"),
}


class GuardedGroup(TyperGroup):
    """The root command group: runs the command, turns its exceptions into exit codes."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the chosen command within the guard (``ctx``: the root's click context)."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `r1sae ... | head`: typer ends quietly
        except KeyboardInterrupt:
            _say(_interrupted_line(sys.argv[1:]), style="yellow")
            raise typer.Exit(INTERRUPTED) from None
        except (R1SaeError, ValueError, OSError) as error:
            if ctx.params.get("traceback") or os.environ.get(TRACEBACK, "0") not in ("", "0"):
                raise
            _fail(error)


def _fail(error: Exception) -> NoReturn:
    """Prints the error's one line and exits 1."""
    _say(f"error: {describe(error)}", style="bold red")
    raise typer.Exit(1) from None


def describe(error: Exception) -> str:
    """The error's message; its type too where the message alone would say nothing.

    A message may quote a file of unknown origin: nothing in it reaches the terminal as a control.
    """
    from r1sae_fast.features.text import visible

    text = "\n".join(map(visible, str(error).strip().split("\n")))
    return text or type(error).__name__


def _interrupted_line(arguments: list[str]) -> str:
    words = tuple(word for word in arguments if not word.startswith("-"))
    if words[:1] in RESUMABLE or words[:2] in RESUMABLE:
        command = shlex.join(["r1sae", *arguments])
        return f"interrupted: what was finished is kept; the same command goes on: {command}"
    return "interrupted"


def _say(line: str, *, style: str) -> None:
    """One line on stderr, coloured where that is a terminal, never wrapped or marked up."""
    from rich.console import Console

    Console(stderr=True).print(line, style=style, markup=False, highlight=False, soft_wrap=True)
