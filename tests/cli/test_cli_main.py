from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest

import act_peft
from act_peft import ActValueError, ActWarning, cli
from act_peft.cli import COMMANDS, build_parser, main

ROOT = Path(act_peft.__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}


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
        (ActValueError("x: or keep_weight='y' here"), "act-peft: x: or --keep-weight y here"),
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


def test_other_errors_are_one_line_that_says_how_to_find_them(command, capsys):
    command.work = raising(ZeroDivisionError("bug"))
    assert main(["demo"]) == 1
    line = "act-peft: ZeroDivisionError: bug (unexpected; --debug shows where it happened)\n"
    assert capsys.readouterr() == ("", line)
    assert main(["demo", "--debug"]) == 1
    assert capsys.readouterr().err.startswith("Traceback")


def test_interrupt(command, capsys):
    command.work = raising(KeyboardInterrupt())
    assert main(["demo"]) == 130
    assert capsys.readouterr() == ("", "act-peft: interrupted\n")


def test_interrupt_before_the_arguments_are_read(monkeypatch, capsys):
    monkeypatch.setattr(cli, "build_parser", lambda: raising(KeyboardInterrupt())(None))
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


def test_unknown_arguments_show_the_usage_of_their_command(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["demo", "--sed", "1"])
    error = capsys.readouterr().err
    assert error.startswith("usage: act-peft demo")
    assert error.endswith("act-peft demo: error: unrecognized arguments: --sed 1\n")


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
    shared = {"__init__", "examples", "files", "imports", "next_steps"}
    files = {path.stem for path in Path(cli.__file__).parent.glob("*.py")} - shared
    assert files == {path.rpartition(".")[2] for path in COMMANDS.values()}


def test_a_warning_is_one_line_without_its_place(command, capsys):
    command.work = lambda arguments: warnings.warn("here: got this,\n  or overwrite=True", ActWarning, stacklevel=2)
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert main(["demo"]) == 0
    assert capsys.readouterr() == ("", "act-peft: warning: here: got this, or --overwrite\n")


def options(name):
    parser = argparse.ArgumentParser()
    module = __import__(COMMANDS[name], fromlist=["add_arguments"])
    module.add_arguments(parser)
    return [action for action in parser._actions if action.option_strings and action.dest != "help"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_says_every_default(name):
    """A default stands in parentheses at the end; a flag is off, and a required option has none."""
    for option in options(name):
        assert option.help, option.dest
        if option.required or option.nargs == 0:
            continue
        assert option.help.endswith(")") or "only" in option.help, f"{name} {option.dest}: say the default in the help"
        if option.default is not None:
            assert f"({option.default}" in option.help, f"{name} {option.dest}: {option.default}"


def test_help_says_the_defaults_that_the_library_has():
    from act_peft.demo.run import DemoSettings
    from act_peft.sweeps.plan import DENSITIES, MAX_DROP, MAX_KEEP_LOSS, RANKS, ROW_DENSITIES, SCALES
    from act_peft.sweeps.search import KEEP_WEIGHTS

    said = {option.dest: option.help for option in options("demo")}
    for name in ("seed", "density", "keep_weight"):
        assert said[name].endswith(f"({getattr(DemoSettings(), name):g})")
    said = {option.dest: option.help for option in options("sweep")}
    lists = {"densities": DENSITIES, "scales": SCALES, "keep_weights": KEEP_WEIGHTS, "ranks": RANKS}
    for name, values in lists.items():
        assert f"({' '.join(f'{value}'.removesuffix('.0') for value in values)})" in said[name].replace(".0)", ")")
    assert said["densities"].endswith(f"({' '.join(map(str, ROW_DENSITIES))})")
    assert f"({MAX_KEEP_LOSS})" in said["max_keep_loss"]
    assert f"{MAX_DROP})" in said["max_drop"]


# ---------------------------------------------------------------------------------------- a process of its own ---

# Runs a command as its script would, and prints which of the slow packages were imported.
SCRIPT = """\
import atexit, re, sys
slow = ("torch", "peft", "transformers", "datasets", "trl", "matplotlib")
atexit.register(lambda: print("imported:", *(name for name in slow if name in sys.modules), file=sys.stderr))
from act_peft.cli import main
sys.exit(main())
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "act-peft"
    path.write_text(SCRIPT)
    return path


def run(*command, **options):
    return subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, env=ENVIRONMENT, check=False, **options
    )


@pytest.mark.parametrize(
    ("arguments", "status"),
    [
        (["--help"], 0),
        (["--version"], 0),
        (["localize", "--help"], 0),
        (["sweep", "--help"], 0),
        ([], 2),
        (["unknown"], 2),
        (["demo", "--density", "many"], 2),
        (["localize", "--base", "b", "--donor", "d", "--output", "scores"], 2),
        (["select", "scores", "--density", "0.1", "--output", "missing/mask"], 1),
    ],
)
def test_help_and_mistakes_do_not_wait_for_the_library(script, arguments, status):
    done = run(script, *arguments)
    assert done.returncode == status
    assert done.stderr.endswith("imported:\n"), "import slow packages inside `run`, within `importing()`"


def test_the_module_is_as_quick_as_the_script(script):
    done = run("-X", "importtime", "-m", "act_peft", "--version")
    assert done.stdout == f"act-peft {act_peft.__version__}\n"
    imported = set(re.findall(r"\| +(\w+)$", done.stderr, re.MULTILINE))
    assert not imported & {"torch", "peft", "transformers"}
    assert "argparse" in imported


IMPORTED_FIRST = """\
import sys
import act_peft
assert "act_peft.library" not in sys.modules
assert not hasattr(act_peft, "__wrapped__") and not hasattr(act_peft, "nothing")
from act_peft import ActConfig, localize
assert "localize" in act_peft.__all__
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
assert PEFT_TYPE_TO_CONFIG_MAPPING["ACT"] is ActConfig
"""


@pytest.mark.slow
def test_a_command_has_the_library_as_soon_as_it_asks(script):
    script.write_text(IMPORTED_FIRST)
    done = run(script)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("start", [["-c", "{code}"], ["script.py"], ["-m", "script"]])
def test_a_script_registers_at_once(tmp_path, start):
    code = "import act_peft, sys; from peft import PeftType; assert PeftType.ACT; assert act_peft.localize"
    (tmp_path / "script.py").write_text(code)
    done = run(*(part.format(code=code) for part in start), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


# A module among the imports that catches what is raised in it, as some of transformers' do, and takes its time.
CATCHES_EVERYTHING = """\
import os, time
print("importing", flush=True)
end = time.monotonic() + 60
while time.monotonic() < end:
    try:
        time.sleep(0.01)
    except BaseException:
        pass
"""


def test_ctrl_c_during_imports(script, tmp_path):
    (tmp_path / "torch.py").write_text(CATCHES_EVERYTHING)
    process = subprocess.Popen(
        [sys.executable, script, "inspect", "scores"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])},
    )
    with process:
        assert process.stdout.readline() == "importing\n"
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        try:
            out, error = process.communicate(timeout=30)
        finally:
            process.kill()
        assert time.monotonic() - sent < 2
    assert (process.returncode, out, error) == (130, "", "act-peft: interrupted\n")
