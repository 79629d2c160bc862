"""The command line: `act-peft COMMAND`.

A command is one module of this package with three names:

    SUMMARY, EXAMPLE                   text for `--help`
    add_arguments(parser)              its arguments
    run(arguments)                     one call of the library, and the output; errors are raised

and one line in `COMMANDS`. Modules of commands import the library inside `run`, within `imports.importing()`, so that
`--help`, mistyped arguments and the checks before do not wait for it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from act_peft.errors import ActError
from act_peft.interrupts import INTERRUPTED, INTERRUPTED_LINE, is_done_
from act_peft.plain import one_line, without_controls

COMMANDS = {
    "demo": "act_peft.cli.demo",
    "recipes": "act_peft.cli.recipes",
    "run": "act_peft.cli.run",
    "localize": "act_peft.cli.localize",
    "fit": "act_peft.cli.fit",
    "select": "act_peft.cli.select",
    "sweep": "act_peft.cli.sweep",
    "train": "act_peft.cli.train",
    "eval": "act_peft.cli.eval",
    "transfer": "act_peft.cli.transfer",
    "merge": "act_peft.cli.merge",
    "combine": "act_peft.cli.combine",
    "export-lora": "act_peft.cli.export_lora",
    "inspect": "act_peft.cli.inspect",
    "diff": "act_peft.cli.diff",
    "patch": "act_peft.cli.patch",
    "plot": "act_peft.cli.plot",
    "report": "act_peft.cli.report",
}

_QUIET = {
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
DONE, FAILED = 0, 1  # argparse itself ends with 2 after bad arguments

_DESCRIPTION = (
    "Move a lost ability from a related model: localize its channels, transfer only them, fine-tune briefly."
)
_EXAMPLE = "act-peft demo --output act-peft-demo"
_KEYWORD = re.compile(r"(?<=\s)(\w+)=(?:True|'([^']*)'|(\d+|\.\.\.))")


class _Command(argparse.ArgumentParser):
    """The parser of one command, which shows its own usage for arguments that it does not know."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        found, unknown = super().parse_known_args(args, namespace)
        if unknown:
            self.error(f"unrecognized arguments: {' '.join(unknown)}")
        return found, unknown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    from act_peft import __version__

    debug = argparse.ArgumentParser(add_help=False)
    debug.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the whole traceback of an error"
    )
    parser = _parser(argparse.ArgumentParser, debug, description=_DESCRIPTION, example=_EXAMPLE, prog="act-peft")
    parser.add_argument("--version", action="version", version=f"act-peft {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=_Command)
    for name, path in COMMANDS.items():
        module = importlib.import_module(path)
        command = _parser(
            commands.add_parser, debug, name, description=module.SUMMARY, example=module.EXAMPLE, help=module.SUMMARY
        )
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Errors and warnings of the library are one line each on the error stream.

    Args:
        argv: arguments without the name of the program; by default those of the process.

    Returns:
        The exit status: 0 done, 1 failed (one line on the error stream says why), 130 interrupted.

    Raises:
        SystemExit: by argparse; 2 after bad arguments, 0 after `--help` and `--version`.
    """
    if argv is None:  # the process is the command: nothing of it writes to a terminal but through these
        sys.stdout, sys.stderr = _Printable(sys.stdout), _Printable(sys.stderr)
        for name, value in _QUIET.items():  # who asks for more with these variables gets it
            os.environ.setdefault(name, value)
    arguments = argparse.Namespace()
    try:
        arguments = build_parser().parse_args(argv)
        with _short_warnings(arguments):
            arguments.run(arguments)
        sys.stdout.flush()
    except KeyboardInterrupt:  # in a program that calls this function; as a command see `interrupts.py`
        print(INTERRUPTED_LINE, file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of our output, `head` for example, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (ActError, OSError) as error:
        if getattr(arguments, "debug", False):
            print(without_controls(traceback.format_exc(), keep="\n\t"), end="", file=sys.stderr)
        else:
            print(f"act-peft: {_with_options(_one_line(error), arguments)}", file=sys.stderr)
        return FAILED
    except Exception as error:  # of a library below; no input may end in a traceback
        if getattr(arguments, "debug", False):
            traceback.print_exc()
        else:
            text = f"{type(error).__name__}: {_one_line(error)[:300]}"
            print(f"act-peft: {text} (unexpected; --debug shows where it happened)", file=sys.stderr)
        return FAILED
    finally:
        if argv is None:
            is_done_()
    return DONE


class _Printable:
    """A stream that gets printable characters only, also from other libraries that quote a file."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> Any:
        return self._stream.write(without_controls(text, keep="\n\r\t"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _parser(make, debug, *args: str, description: str, example: str, **options: str):  # type: ignore[no-untyped-def]
    return make(
        *args,
        parents=[debug],
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        **options,
    )


@contextmanager
def _short_warnings(arguments: argparse.Namespace) -> Iterator[None]:
    """Print warnings as one line each, without the place in the library's code that gives them."""

    def show(
        message: Warning | str, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        print(f"act-peft: warning: {_with_options(_one_line(message), arguments)}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        for category in (DeprecationWarning, FutureWarning):  # they concern calls between other libraries
            warnings.simplefilter("ignore", category)
        yield


def _one_line(error: Exception | str) -> str:
    """The message of an error or a warning in one line. If the system refused a file, the file comes first."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return one_line(f"{error.filename}: {error.strerror}")
    return one_line(" ".join(str(error).split())) or type(error).__name__


def _with_options(line: str, arguments: argparse.Namespace) -> str:
    """Replace arguments of the library, for example `overwrite=True`, by the options of the command, `--overwrite`."""

    def option(keyword: re.Match[str]) -> str:
        name, text, number = keyword.groups()
        value = text if text is not None else number
        if name not in vars(arguments):
            return keyword[0]
        flag = f"--{name.replace('_', '-')}"
        return flag if value is None else f"{flag} {value}"

    return _KEYWORD.sub(option, line)
