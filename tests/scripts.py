"""The scripts of `examples/`: as modules, called where everything is imported already, and run as a user runs them."""

import argparse
import functools
import importlib.util
import os
import runpy
import shlex
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest
from accelerate.commands.launch import launch_command_parser

EXAMPLES = Path(__file__).parents[1] / "examples"
HARNESS = "dparallel.evaluation.harness"


class Result(NamedTuple):
    """What a script left: as `subprocess.CompletedProcess` has it."""

    returncode: int
    stdout: str
    stderr: str


def load(path) -> ModuleType:
    """A script as a module, once for all tests. As when it runs, it finds its neighbours by their names."""
    path = EXAMPLES / path
    if path.stem not in sys.modules:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        sys.path.insert(0, str(path.parent))
        spec.loader.exec_module(sys.modules[path.stem])
    return sys.modules[path.stem]


def call(name, *arguments, cwd=None, **environment) -> Result:
    """Run a script, or a module by its dotted name, in this process, where everything is imported already: that takes
    seconds less than a process of its own."""
    out, err, status, is_script = StringIO(), StringIO(), 0, name.endswith(".py")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", [Path(name).name, *map(str, arguments)])
        for key, value in environment.items():
            patch.setenv(key, value)
        if cwd is not None:
            patch.chdir(cwd)
        if is_script:
            patch.syspath_prepend(str((EXAMPLES / name).parent))
        try:
            if is_script:
                runpy.run_path(str(EXAMPLES / name), run_name="__main__")
            else:
                runpy.run_module(name, run_name="__main__", alter_sys=True)
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
            if isinstance(end.code, str):
                print(end.code, file=err)
    return Result(status, out.getvalue(), err.getvalue())


@functools.cache
def parser_of(name, *arguments) -> argparse.ArgumentParser:
    """The parser that prints the `--help` of a script or module, or of one of its subcommands."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "print_help", lambda parser, file=None: found.append(parser))
        if name == HARNESS:  # as __main__ it would register its model a second time
            patch.setattr(sys, "argv", [name, *arguments, "--help"])
            with pytest.raises(SystemExit):
                importlib.import_module(name).main()
        else:
            assert call(name, *arguments, "--help").returncode == 0
    return found[0]


def split_command(words) -> tuple[str, list[str]] | None:
    """A command of a shell that runs a script of `examples/` or a module of ours: its name, as `call` takes it, and
    its arguments; None for any other.

    Raises:
        ValueError: if `accelerate launch` does not take what it is given, or if there is no such script.
    """
    line = shlex.join(words)
    if words[:2] == ["accelerate", "launch"]:
        launch = _parse(launch_command_parser(), words[2:], line)
        words = ["python", *(["-m"] if launch.module else []), launch.training_script, *launch.training_script_args]
    if Path(words[0]).name not in ("python", "python3") or len(words) == 1:
        return None
    if words[1] == "-m":
        return (words[2], words[3:]) if words[2].startswith("dparallel.") else None
    if not (EXAMPLES.parent / words[1]).is_file():
        raise ValueError(f"{line!r}: there is no script {words[1]}.")
    return words[1].removeprefix("examples/"), words[2:]


def check_arguments(name, arguments) -> None:
    """Refuse what the parser of a script or module does not take.

    Raises:
        ValueError: with what the parser says.
    """
    parser, arguments = parser_of(name, *(["run"] if name == HARNESS else [])), list(arguments)
    if "--config" in arguments and "--config" not in parser._option_string_actions:  # TrlParser reads it by itself
        place = arguments.index("--config")
        if not (EXAMPLES.parent / arguments[place + 1]).is_file():
            raise ValueError(f"{name}: there is no file {arguments[place + 1]}.")
        del arguments[place : place + 2]
        for action in parser._actions:
            action.required = False  # the file may have it
    _parse(parser, arguments, f"{name} {shlex.join(arguments)}")


def _parse(parser, arguments, command):
    err = StringIO()
    try:
        with redirect_stderr(err):
            return argparse.ArgumentParser.parse_args(parser, arguments)
    except SystemExit as end:
        raise ValueError(f"{command!r} is not understood: {err.getvalue().splitlines()[-1]}") from end


def run(name, *arguments, cwd=None, **environment) -> subprocess.CompletedProcess:
    """Run it in a process of its own, with one thread."""
    settings = {"cwd": cwd, "env": _one_thread(environment), "capture_output": True, "text": True}
    return subprocess.run(_command(name, arguments), **settings)


def start(name, *arguments, cwd=None, **environment) -> subprocess.Popen:
    """Start it, to be killed: what it prints goes nowhere."""
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(_command(name, arguments), cwd=cwd, env=_one_thread(environment), **silent)


def _command(name, arguments):
    place = [str(EXAMPLES / name)] if name.endswith(".py") else ["-m", name]
    return [sys.executable, *place, *map(str, arguments)]


def _one_thread(environment):
    return {**os.environ, "OMP_NUM_THREADS": "1", **environment}
