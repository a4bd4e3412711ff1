"""Whether a program that a model wrote passes the tests of its task (MBPP, HumanEval)."""

import ast
import builtins
import json
import math
import os
import signal
import subprocess
import symtable
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUNNER = Path(__file__).with_name("sandbox_runner.py")
GRACE = 30.0  # seconds on top of the timeout, after which also the process of the tests is given up


@dataclass(frozen=True)
class Verdict:
    """
    Args:
        passed (`bool`): all tests ran, and held.
        reason (`str`): "passed", or the exception that ended it, such as "AssertionError" or "SyntaxError" (of a
            class of the program's own, the builtin one that it derives from), "timed out", "memory", "killed by
            signal 11", "exited before the end of the tests", "the tests called nothing", "unreadable answer" or "the
            tests' process died".
    """

    passed: bool
    reason: str


def require_permission() -> None:
    """Raises a PermissionError unless the environment variable HF_ALLOW_CODE_EVAL is "1" (as for code_eval of Hugging
    Face's `evaluate`), and a RuntimeError on another platform than Linux."""
    if os.environ.get("HF_ALLOW_CODE_EVAL") != "1":
        raise PermissionError(
            "Running programs that a model wrote is off. They are confined, but no confinement is perfect: to allow "
            'it, set the environment variable HF_ALLOW_CODE_EVAL to "1".'
        )
    if sys.platform != "linux":
        raise RuntimeError(f"Only Linux is supported for running generated code, not {sys.platform}.")


def run_tests(program: str, tests: str, *, timeout: float = 10.0, memory: int = 512) -> Verdict:
    """Run a program that nobody has read, confined, and then tests that call what it defines.

    Program and tests run in two processes, which exchange plain values: a test calls a function of the program by a
    message, and compares the answer in an interpreter where nothing of the program ever ran. So what a program does to
    its own (builtins, modules, `assert`, `__eq__`, frames, output, exit codes) does not reach the verdict, and it sees
    nothing of the tests but the arguments of the calls, as copies. Builtins and modules that tests use are their own,
    too. Of an object whose class is no builtin, tests can use the attributes and calls, go through it, or ask whether
    it is true; comparing it is a TypeError, because its class would decide.

    A program can compute, read the standard library (there are no other packages) and print (to nowhere). Kept from
    it, in the order of the means:

    - By seccomp, without which nothing runs: new processes and threads, sockets, signals, looking into other
      processes, and every change of a file. Nothing can be written, not even in the working directory, which is empty
      and deleted afterwards. All system calls are refused but those that are known to be harmless.
    - By Landlock, where the kernel has it (since 5.13): to read anything but Python's library and the system's.
      Elsewhere a program can read what the user can read, but tell nobody.
    - The environment, HF_TOKEN in it, is not handed on. That of other processes, in /proc, is closed by Landlock;
      without it, root's rights are given up, and an ordinary user's program goes into a user namespace. Where an
      ordinary user has neither, a program can read it.
    - Time, memory, 64 open files. Both processes end with the call, even if it is interrupted or the caller is killed.

    Not defended: holes of the kernel; tests that measure by the program's own functions (in HumanEval 32, 38 and 50,
    helpers from the prompt: put them into `tests`, too, and those count); programs that have learned the answers. The
    tests are trusted: only their time and memory are limited.

    Args:
        program (`str`): Python source. It runs as a module named "program", thus not what is under `__main__`.
        tests (`str`): Python source with `assert` statements. Names that it does not define are the program's, or
            builtins; a builtin's name is the program's only if there is no other (MBPP 126: `sum(10, 15) == 6`). Of
            MBPP, `test_setup_code` and `test_list`; of HumanEval, `test` and `check(<entry point>)`.
        timeout (`float`): seconds of wall clock for both, above 0. Python's start comes on top.
        memory (`int`): MiB of address space of each of the two processes, 64 to 1,048,576; Python itself takes 15.

    Can be called from several threads. Sets of strings have the same order in each call (PYTHONHASHSEED=0).

    Raises:
        ValueError: naming an argument that is not allowed; tests that are not Python, assert nothing, or pass the
            program something that is neither a plain value, nor a builtin type, nor its own.
        PermissionError: unless the environment variable HF_ALLOW_CODE_EVAL is "1".
        RuntimeError: if a process cannot be confined here: another platform than Linux, or another machine than x86-64
            and aarch64, or one that refuses seccomp.
    """
    require_permission()
    for name, value in (("program", program), ("tests", tests)):
        if not isinstance(value, str):
            raise ValueError(f"`{name}={value!r}` is not allowed: it must be a string.")
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not 0 < timeout < math.inf:
        raise ValueError(f"`timeout={timeout!r}` is not allowed: it must be a number of seconds above 0.")
    if isinstance(memory, bool) or not isinstance(memory, int) or not 64 <= memory <= 2**20:
        raise ValueError(f"`memory={memory!r}` is not allowed: it must be an integer of MiB from 64 to 1048576.")
    task = json.dumps({"tests": tests, "names": _names_of_the_program(tests)}).encode()
    source = program.encode("utf-8", "surrogatepass")

    with tempfile.TemporaryDirectory(prefix="sandbox-") as folder:
        # Isolated but for -E, which would ignore PYTHONHASHSEED: there is nothing else in the environment.
        command = [sys.executable, "-s", "-S", "-B", str(RUNNER), str(float(timeout)), str(memory), str(len(source))]
        environment = {"HOME": folder, "TMPDIR": folder, "PATH": os.defpath, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
        if "LD_LIBRARY_PATH" in os.environ:  # where some installations have Python's own library
            environment["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
        pipes: dict[str, Any] = {name: subprocess.PIPE for name in ("stdin", "stdout", "stderr")}
        with subprocess.Popen(command, cwd=folder, env=environment, start_new_session=True, **pipes) as process:
            try:
                output, errors = process.communicate(source + task, timeout + GRACE)
            except subprocess.TimeoutExpired:
                return Verdict(False, "timed out")
            finally:
                # Both processes are in this group: the program can neither leave it nor add to it. The number is
                # still the group's own, because the first of them has not been waited for.
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
    lines = output.splitlines()
    refused = json.loads(lines[0])["refused"] if lines else errors.decode(errors="replace").strip()[-1000:]
    if refused or not lines:
        raise RuntimeError(f"Generated code cannot be run here, because it cannot be confined: {refused}")
    if len(lines) == 1:
        return Verdict(False, "the tests' process died")
    answer = json.loads(lines[1])
    if answer["unsendable"]:
        raise ValueError(f"`tests` must pass plain values to the program, but pass a {answer['unsendable']}.")
    return Verdict(**answer["verdict"])


def _names_of_the_program(tests):
    """Names that tests use and do not define. Raises a ValueError if they are no tests."""
    try:
        asserts = any(isinstance(node, ast.Assert) for node in ast.walk(ast.parse(tests)))
        top = symtable.symtable(tests, "tests", "exec")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"`tests` is no Python: {error}.") from error
    if not asserts:
        raise ValueError(f"`tests={tests[:200]!r}` is not allowed: it must hold an `assert`.")
    used, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        used |= {each.get_name() for each in table.get_symbols() if each.is_referenced() and _is_global(each, table)}
    names = used - {each.get_name() for each in top.get_symbols() if each.is_assigned() or each.is_imported()}
    return sorted(names - set(dir(builtins)) or names)


def _is_global(symbol, table):
    return table.get_type() == "module" or symbol.is_global()
