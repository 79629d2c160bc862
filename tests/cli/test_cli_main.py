from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import act_peft
from act_peft import ActValueError, cli
from act_peft.cli import COMMANDS, build_parser, main


@pytest.fixture
def command(monkeypatch):
    """A command `try` that calls what the test puts into `.work`."""
    import act_peft.cli.demo as demo

    stub = SimpleNamespace(work=lambda arguments: None)
    monkeypatch.setattr(demo, "run", lambda arguments: stub.work(arguments))
    return stub


def raising(error):
    def work(arguments):
        raise error

    return work


def test_success(command, capsys):
    assert main(["demo"]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ActValueError("here: got this,\n  expected that"), "act-peft: here: got this, expected that"),
        (
            FileNotFoundError(2, "No such file or directory", "some/file"),
            "act-peft: some/file: No such file or directory",
        ),
        (OSError("no space"), "act-peft: no space"),
        (OSError(), "act-peft: OSError"),
        (ActValueError("x: exists (pass overwrite=True)"), "act-peft: x: exists (pass --overwrite)"),
        (ActValueError("x: or transfer_scale='y' here"), "act-peft: x: or --transfer-scale y here"),
        (ActValueError("expected trainable='scales'"), "act-peft: expected trainable='scales'"),  # no option of it
    ],
)
def test_failure_is_one_line(command, capsys, error, line):
    command.work = raising(error)
    assert main(["demo"]) == 1
    assert capsys.readouterr() == ("", line + "\n")


@pytest.mark.parametrize("arguments", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_shows_the_traceback(command, capsys, arguments):
    command.work = raising(ActValueError("here: got this"))
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.endswith("ActValueError: here: got this\n")


def test_other_errors_are_bugs_and_not_hidden(command):
    command.work = raising(ZeroDivisionError("bug"))
    with pytest.raises(ZeroDivisionError, match="bug"):
        main(["demo"])


def test_interrupt(command, capsys):
    command.work = raising(KeyboardInterrupt())
    assert main(["demo"]) == 130
    assert capsys.readouterr() == ("", "act-peft: interrupted\n")


@pytest.mark.parametrize(
    "arguments", [[], ["unknown"], ["demo", "--density", "many"], ["demo", "extra"], ["demo", "--dens", "0.1"]]
)
def test_bad_arguments(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    assert stopped.value.code == 2
    assert "usage: act-peft" in capsys.readouterr().err


def test_version(capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"act-peft {act_peft.__version__}\n"


@pytest.mark.parametrize("name", [None, *COMMANDS])
def test_help_has_an_example_that_parses(capsys, name):
    with pytest.raises(SystemExit) as stopped:
        main(["--help"] if name is None else [name, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    example = re.search(r"example:\n  act-peft (.+)", text)[1].split()
    assert build_parser().parse_args(example).run
    assert name is None or example[0] == name


def test_every_module_of_a_command_is_in_the_table():
    shared = {"__init__", "examples", "files"}
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - shared
    assert files == {path.rpartition(".")[2] for path in COMMANDS.values()}


@pytest.mark.slow
def test_the_module_runs_and_help_does_not_load_the_heavy_packages():
    code = (
        "import sys, act_peft; before = set(sys.modules)\n"
        "from act_peft.cli import build_parser; build_parser()\n"
        "print(sorted({m.partition('.')[0] for m in set(sys.modules) - before}))"
    )
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert not {"trl", "datasets", "matplotlib"} & set(re.findall(r"'(\w+)'", loaded))
    done = subprocess.run([sys.executable, "-m", "act_peft", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"act-peft {act_peft.__version__}\n"
