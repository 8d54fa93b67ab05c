"""The command line: verbs, options from the settings, and errors as one message without a traceback.

Only what is needed to parse is imported here; each verb imports its own parts when it runs.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib
import importlib.metadata
import json
import logging
import os
import shutil
import signal
import sys
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import fields
from typing import Any, NoReturn

from amc.catalog import CRITERIA, MODELS, REWARDS
from amc.errors import AmcError, Interrupted, UsageError
from amc.files import disk_trouble
from amc.registry import Registry, suggest
from search.settings import Settings
from search.strategies import STRATEGIES

VERBS: dict[str, tuple[str, str]] = {
    "search": ("find a policy under the budget, slim, fine-tune, measure (the default verb)", "search.verbs.search"),
    "apply": ("apply a saved policy to a model", "search.verbs.apply"),
    "groups": ("what can be pruned, what is frozen and why, and the range of each budget", "search.verbs.groups"),
    "sensitivity": (
        "accuracy of each group alone at several widths, as a table and a figure",
        "search.verbs.sensitivity",
    ),
    "latency": ("measure and compare ONNX files on a device, or build a latency table", "search.verbs.latency"),
    "report": ("rebuild the report of a finished run", "search.verbs.report"),
    "compare": ("several finished runs side by side, with their Pareto front", "search.verbs.compare"),
    "doctor": ("what is installed, which devices and providers work, what to install for what", "search.verbs.doctor"),
    "completion": ("a completion script for bash, zsh or fish", "search.completion"),
}

EXAMPLES = {
    "search": "amc search --model resnet20 --weights resnet20.pt --data imagefolder:cifar --budget flops=0.5",
    "apply": "amc apply runs/x/policy.json --model resnet20 --weights resnet20.pt --out slim",
    "groups": "amc groups --model resnet56 --input-shape 1 3 32 32",
    "sensitivity": "amc sensitivity --model resnet20 --weights resnet20.pt --data imagefolder:cifar --out sensitivity",
    "latency": "amc latency runs/x/dense.onnx runs/x/model.onnx --device ssh://pi@board:22",
    "report": "amc report runs/x",
    "compare": "amc compare runs/x runs/y --out compared.html",
    "doctor": "amc doctor --json",
    "completion": "amc completion bash > ~/.local/share/bash-completion/completions/amc",
}

log = logging.getLogger("amc")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours."""

    def error(self, message: str) -> NoReturn:
        """Raises a UsageError in place of leaving the program."""
        if message.startswith("unrecognized arguments: "):
            wrong = message.removeprefix("unrecognized arguments: ").split(" ")[0].split("=")[0]
            flags = [flag for action in self._actions for flag in action.option_strings if flag.startswith("--")]
            if wrong.startswith("-"):
                raise UsageError(f"there is no option {wrong}; {suggest(wrong, flags)}")
            raise UsageError(f"the argument {wrong!r} is not understood; `{self.prog} --help` shows what is")
        raise UsageError(f"{message}; `{self.prog} --help` shows how it is written")


def parser_of(verb: str) -> Parser:
    """The parser of one verb."""
    help_text, module = VERBS[verb]
    parser = Parser(
        prog=f"amc {verb}",
        description=f"{help_text[0].upper()}{help_text[1:]}.",
        epilog=_epilog(verb),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=34, width=100),
        allow_abbrev=False,
    )
    importlib.import_module(module).add_arguments(parser)
    common = parser.add_argument_group("output")
    common.add_argument("--quiet", action="store_true", help="no progress")
    common.add_argument("--verbose", action="store_true", help="say more, and show tracebacks of unexpected errors")
    common.add_argument("--json", action="store_true", help="the result as one JSON object on standard output")
    return parser


def add_settings(parser: argparse.ArgumentParser, groups: Sequence[str], *, leave_out: Sequence[str] = ()) -> None:
    """Adds the options of the settings' `groups`; what isn't given stays out of the namespace."""
    for group in groups:
        section = parser.add_argument_group(group)
        for f in fields(Settings):
            meta = f.metadata
            if meta["group"] != group or f.name in leave_out:
                continue
            more: dict[str, Any] = {"action": "append"} if "repeat" in meta else {}
            if "nargs" in meta:
                more["nargs"] = meta["nargs"]
            if "flag" in meta:
                section.add_argument(
                    "--" + f.name.replace("_", "-"), action="store_true", default=argparse.SUPPRESS, help=meta["help"]
                )
                continue
            default = "" if f.default in (None, ()) or "(default" in meta["help"] else f" (default {f.default})"
            section.add_argument(
                "--" + f.name.replace("_", "-"),
                dest=f.name,
                default=argparse.SUPPRESS,
                metavar=meta.get("metavar", f.name.upper()),
                help=(meta["help"] + default).replace("%", "%%"),
                **more,
            )


def given_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The settings that were given, as texts."""
    names = {f.name for f in fields(Settings)}
    return {name: value for name, value in vars(arguments).items() if name in names}


def _epilog(verb: str) -> str:
    parts = [f"example:\n  {EXAMPLES[verb]}"]
    if verb == "search":
        parts += [
            _listing("strategies", STRATEGIES),
            _listing("rewards", REWARDS),
            _listing("importance", CRITERIA),
            _listing("built-in models", MODELS),
            _listing("verbs (amc VERB --help)", VERBS),
        ]
    return "\n\n".join(parts)


def _listing(title: str, registry: Registry) -> str:
    rows = []
    for name, (text, _) in registry.items():
        rows += textwrap.wrap(text, 100, initial_indent=f"  {name:<20} ", subsequent_indent=" " * 23)
    return "\n".join([f"{title}:", *rows])


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the program; returns 0 done, 2 the input is at fault, 3 stopped by a signal, 1 anything else."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    as_json = "--json" in words
    if words == ["--version"]:
        print(importlib.metadata.version("amc-pruning-search"))
        return 0
    verb = words.pop(0) if words and not words[0].startswith("-") else "search"
    try:
        if verb not in VERBS:
            raise UsageError(f"there is no verb {verb!r}; {suggest(verb, VERBS)}")
        parsed = parser_of(verb).parse_args(words)
        _listen()
        with _printing_elsewhere() if as_json else nullcontext():
            result = importlib.import_module(VERBS[verb][1]).execute(parsed)
        if as_json:
            print(json.dumps(result, allow_nan=False))
        sys.stdout.flush()  # a reader that has gone is met here, not when the interpreter ends
        return 0
    except AmcError as error:
        return _fail(str(error), error.exit_status, as_json)
    except KeyboardInterrupt:
        return _fail("stopped", Interrupted.exit_status, as_json)
    except BrokenPipeError:  # whoever read has seen enough, as in `amc groups | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        cause: BaseException
        if "--verbose" in words:
            raise
        cause = error
        while cause.__cause__ is not None:  # the first one says most
            cause = cause.__cause__
        reason = f"{type(cause).__name__}: {str(cause).strip() or 'no reason given'}"
        disk = disk_trouble(error)
        if disk is not None:
            said = f"{disk} ({reason}); what was written before is whole, and --resume goes on with a run"
            return _fail(said, 1, as_json)
        return _fail(f"unexpected error: {reason.rstrip('.')}. --verbose shows where", 1, as_json)


@contextmanager
def _printing_elsewhere() -> Iterator[None]:
    """What a user's model or data print goes to standard error, whether Python prints it or a library in C."""
    with ExitStack() as after:
        after.enter_context(redirect_stdout(sys.stderr))
        with suppress(OSError):  # one of them is closed
            ours = os.dup(1)
            after.callback(os.close, ours)
            _flush()
            os.dup2(2, 1)
            after.callback(os.dup2, ours, 1)
            after.callback(_flush)
        yield


def _flush() -> None:
    """Lets go of what Python and C libraries hold back of their standard output."""
    with suppress(Exception):
        sys.__stdout__.flush()  # type: ignore[union-attr]  # None where it is closed
    with suppress(Exception):
        ctypes.CDLL(None).fflush(None)


class _Messages(logging.Handler):
    """Prints to what standard error is now; a stream that is kept may have been replaced and closed."""

    def emit(self, record: logging.LogRecord) -> None:
        text = self.format(record)
        if sys.stderr.isatty():
            columns = shutil.get_terminal_size().columns - 1
            text = textwrap.fill(text, columns, break_long_words=False, break_on_hyphens=False)
        print(text, file=sys.stderr)


def _listen() -> None:
    """Warnings of ours go to standard error; a signal ends the program tidily, a second one at once."""
    if not log.handlers:
        handler = _Messages()
        handler.setLevel(logging.WARNING)
        handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
        log.addHandler(handler)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)


def _stop(_number: int, _frame: Any) -> NoReturn:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    raise KeyboardInterrupt


def _fail(message: str, status: int, as_json: bool) -> int:
    if as_json:
        print(json.dumps({"error": message}))
    print(f"amc: {message}", file=sys.stderr)
    return status
