"""The scripts of `examples/`: as modules, called where everything is imported already, and run as a user runs them."""

import importlib.util
import os
import runpy
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


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
