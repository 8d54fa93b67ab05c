"""`amc completion SHELL`: a script that completes verbs, options, names and files, made from the parsers by shtab.

The parsers are the ones that read the command line, so that what is completed is what is understood. Names come from
the registries: `--strategy <TAB>` lists the strategies.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from typing import Any

from amc.errors import UsageError
from search.settings import Settings

SHELLS = ("bash", "zsh", "fish")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The shell."""
    parser.add_argument("shell", metavar="SHELL", choices=SHELLS, help=f"one of {', '.join(SHELLS)}")


def execute(arguments: argparse.Namespace) -> Any:
    """Prints the script; returns it, by name of the shell."""
    found = script(arguments.shell)
    if not arguments.json:
        print(found)
    return {"shell": arguments.shell, "script": found}


def script(shell: str) -> str:
    """The completion script for a shell of `SHELLS`.

    Raises:
        UsageError: shtab isn't installed.
    """
    try:
        import shtab
    except ImportError:
        raise UsageError("completion needs shtab: pip install 'amc-pruning-search[completion]'") from None
    text: str = shtab.complete(_program(shtab.FILE, shtab.DIRECTORY), shell=shell)
    return text


def _program(file: Any, directory: Any) -> argparse.ArgumentParser:
    """All verbs under one parser, whose actions say what completes them."""
    from search.cli import VERBS, parser_of

    program = argparse.ArgumentParser(prog="amc")
    verbs = program.add_subparsers(dest="verb")
    for verb, (text, _) in VERBS.items():
        known = parser_of(verb)
        for action in known._actions:
            _complete(action, file, directory)
        verbs.add_parser(verb, help=text.replace("%", "%%"), parents=[known], add_help=False)
    return program


def _complete(action: argparse.Action, file: Any, directory: Any) -> None:
    """Says what completes an option: the names of a registry, a folder, or a file."""
    registries = {field.name: field.metadata["choices"] for field in fields(Settings) if "choices" in field.metadata}
    metavar = str(action.metavar or "")
    if action.dest in registries:
        action.choices = list(registries[action.dest])
    elif metavar in ("DIR", "RUN"):
        action.complete = directory  # type: ignore[attr-defined]
    elif metavar in ("POLICY", "MODEL", "DATA") or metavar.startswith("FILE"):
        action.complete = file  # type: ignore[attr-defined]
