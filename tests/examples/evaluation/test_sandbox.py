"""Programs that compute, programs that cheat, and programs that do harm."""

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dparallel.evaluation import sandbox, sandbox_runner
from dparallel.evaluation.sandbox import Verdict, run_tests
from tests.examples.evaluation.rows import DATA, FUNCTION, PROGRAM, real_rows

DOUBLE = "def f(x):\n    return 2 * x\n"
EXITED = "exited before the end of the tests"
NOBODY = 65534
LANDLOCK = "LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446"


@pytest.fixture(autouse=True)
def allowed(monkeypatch):
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "1")


def copy_of_the_runner(folder, old, new):
    source = sandbox.RUNNER.read_text()
    assert old in source
    path = Path(folder) / "sandbox_runner.py"
    path.write_text(source.replace(old, new))
    return path


@pytest.fixture(params=["with Landlock", "without Landlock"])
def kernel(request, monkeypatch, tmp_path):
    """Kernels with and without Landlock."""
    if request.param == "without Landlock":
        copy = copy_of_the_runner(tmp_path, LANDLOCK, LANDLOCK.replace("44", "99"))
        monkeypatch.setattr(sandbox, "RUNNER", copy)
    return request.param


def attempt(statements):
    """A program whose f() says which error the statements met, or "done"."""
    body = "\n        ".join(statements.splitlines())
    return (
        "import ctypes, fcntl, multiprocessing, os, resource, shutil, signal, socket, subprocess, sys, threading\n"
        "def c(function, *arguments):\n"
        "    if getattr(ctypes.CDLL(None, use_errno=True), function)(*arguments) == -1:\n"
        "        raise OSError(ctypes.get_errno(), function)\n"
        f"def f(*arguments):\n    try:\n        {body}\n    except Exception as error:\n"
        '        return type(error).__name__\n    return "done"\n'
    )


def processes(mark):
    """Runners with this among their arguments, and their children, which keep them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if mark in arguments and any(each.endswith("sandbox_runner.py") for each in arguments):
            found.append(int(path.parent.name))
    return found


def marked(seconds):
    """A timeout of this test run alone, by which `processes` finds its runners."""
    return float(f"{seconds}.{os.getpid():07d}5")


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


# --- What it is for ---


@pytest.mark.parametrize(
    ("program", "tests", "reason"),
    [
        (DOUBLE, "assert f(2) == 4\nassert f('ab') == 'abab'", "passed"),
        (DOUBLE, "assert f(2) == 4\nassert f(3) == 7", "AssertionError"),
        (DOUBLE, "def check(candidate):\n    assert candidate(2) == 4\ncheck(f)", "passed"),
        (DOUBLE, "def check(candidate):\n    assert candidate(2) == 5\ncheck(f)", "AssertionError"),
        (DOUBLE, "def check(candidate):\n    assert candidate(2) == 4", "the tests called nothing"),
        ("def f(x) return x", "assert f(2) == 4", "SyntaxError"),
        ("def g(x):\n    return x", "assert f(2) == 4", "NameError"),
        ("def f(x):\n    return x + y", "assert f(2) == 4", "NameError"),
        ("import numpy", "assert f(2) == 4", "ModuleNotFoundError"),
        ("class Mine(KeyError):\n    pass\ndef f(x):\n    raise Mine(x)", "assert f(2) == 4", "KeyError"),
        ("def f(x):\n    raise UnicodeDecodeError('utf8', b'', 0, 0, '')", "assert f(2)", "UnicodeDecodeError"),
        ("def f(x):\n    return f(x)", "assert f(2) == 4", "RecursionError"),
        ("'\ud800'", "assert f(2) == 4", "UnicodeEncodeError"),
        ("import ctypes\nctypes.string_at(0)", "assert f(2) == 4", "killed by signal 11"),
        ("if __name__ == '__main__':\n    raise ValueError\n" + DOUBLE, "assert f(2) == 4", "passed"),
        ("def f():\n    return input()", "assert f() == ''", "EOFError"),
    ],
)
def test_reasons(program, tests, reason):
    assert run_tests(program, tests) == Verdict(reason == "passed", reason)


@pytest.mark.parametrize(
    "value",
    [
        "None", "True", "-7", "2**63", "-(10**6000)", "0.1", "float('inf')", "'\\ud800 \\n é'", "b'\\x00a'", "2 - 3j",
        "[]", "()", "{}", "set()", "frozenset({1})", "{(1, 2): [3, {'a': (4.0,)}], None: {5, 'b'}, 1.5: b''}",
        "[[1], (2,), [3, [4]]]", "range(2, 9, 3)", "int", "[str, float]",
    ],
)  # fmt: skip
def test_values_come_out_as_they_went_in(value):
    program = f"def f(x):\n    return x, type(x).__name__, x == {value}"
    tests = f"x = {value}\nassert f(x) == (x, type(x).__name__, True)\nassert type(f(x)[0]) is type(x)"
    assert run_tests(program, tests).passed


def test_subclasses_compare_as_their_builtin_types():
    program = """
from collections import Counter, OrderedDict, defaultdict, namedtuple
from enum import IntEnum
Point, Level = namedtuple("Point", "x y"), IntEnum("Level", "LOW HIGH")
def f(x):
    return [Counter(x), OrderedDict(a=1), defaultdict(list, b=[2]), Point(3, 4), Level.HIGH]"""
    assert run_tests(program, "assert f('aab') == [{'a': 2, 'b': 1}, {'a': 1}, {'b': [2]}, (3, 4), 2]").passed


def test_objects_of_the_program():
    """As MBPP 367 and 927 use them."""
    program = """
class Node:
    def __init__(self, value):
        self.value, self.left = value, None
def depth(node):
    return 0 if node is None else 1 + depth(node.left)
def walk(node):
    while node:
        yield node.value
        node = node.left"""
    setup = "root = Node(1)\nroot.left = Node(2)\nroot.left.left = Node(value=3)\n"
    tests = "assert depth(root) == 3\nassert root.left.value == 2\nassert list(walk(root)) == [1, 2, 3]\nassert root"
    assert run_tests(program, setup + tests).passed
    assert run_tests(program, setup + "assert root.right is None").reason == "AttributeError"


def test_names():
    assert run_tests("def sum(a, b):\n    return a * b", "assert sum(2, 3) == 6").passed, "the program's"
    program = "import math\ndef abs(x):\n    return 0\ndef f(x):\n    return x\n"
    assert not run_tests(program, "assert abs(f(5) - 1) < 0.1").passed, "the builtin"
    assert run_tests(program, "assert math.isclose(f(5.0), 5)").passed
    assert run_tests(DOUBLE, "assert math.isclose(f(5.0), 10)").reason == "NameError", "as if it were one process"
    assert run_tests("f = list", "assert f('ab') == ['a', 'b']").passed
    assert run_tests("g = 3\n" + DOUBLE, "assert [f(g) for g in (1, 2)] == [2, 4] and f(g) == 6").passed


def test_tests_may_expect_an_exception():
    program = "def f(x):\n    if x < 0:\n        raise ValueError('negative')\n    return x"
    tests = "try:\n    f({})\n    assert False, 'no error'\nexcept ValueError:\n    pass"
    assert run_tests(program, tests.format(-1)).passed
    assert run_tests(program, tests.format(1)).reason == "AssertionError"
    assert run_tests("import os\ndef f(x):\n    os._exit(0)", tests.format(-1)).reason == EXITED
    swallowed = "try:\n    f(-1)\nexcept:\n    pass\nassert True"
    assert run_tests("import os\ndef f(x):\n    os._exit(0)", swallowed).reason == EXITED


def test_many_at_once():
    pairs = [(DOUBLE, f"assert f({number}) == {2 * number + number % 2}") for number in range(16)]
    with ThreadPoolExecutor(4) as pool:
        assert [each.passed for each in pool.map(lambda pair: run_tests(*pair), pairs)] == [True, False] * 8


def test_sets_have_one_order():
    command, environment = [sys.executable, "-c", "print(hash('a'))"], {"PYTHONHASHSEED": "0"}
    expected = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
    assert run_tests("def f():\n    return hash('a')", f"assert f() == {expected}").passed


# --- Arguments ---


def test_it_is_off_by_default(monkeypatch):
    for value in (None, "0", "true"):
        monkeypatch.delenv("HF_ALLOW_CODE_EVAL") if value is None else monkeypatch.setenv("HF_ALLOW_CODE_EVAL", value)
        with pytest.raises(PermissionError, match="HF_ALLOW_CODE_EVAL"):
            run_tests(DOUBLE, "assert f(2) == 4")


def test_other_platforms_are_refused(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(RuntimeError, match="Only Linux is supported for running generated code, not darwin"):
        run_tests(DOUBLE, "assert f(2) == 4")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"program": b"x"}, r"`program=b'x'` is not allowed: it must be a string"),
        ({"tests": None}, r"`tests=None` is not allowed: it must be a string"),
        ({"tests": "assert f("}, r"`tests` is no Python"),
        ({"tests": "f(2)"}, r"`tests='f\(2\)'` is not allowed: it must hold an `assert`"),
        ({"tests": "assert f(lambda: 2)"}, r"`tests` must pass plain values to the program, but pass a function"),
        ({"timeout": 0}, r"`timeout=0` is not allowed: it must be a number of seconds above 0"),
        ({"timeout": float("inf")}, r"`timeout=inf` is not allowed"),
        ({"timeout": "1"}, r"`timeout='1'` is not allowed"),
        ({"memory": 63}, r"`memory=63` is not allowed: it must be an integer of MiB from 64 to 1048576"),
        ({"memory": 512.0}, r"`memory=512.0` is not allowed"),
    ],
)
def test_wrong_arguments(changed, message):
    arguments = {"program": DOUBLE, "tests": "assert f(2) == 4", **changed}
    with pytest.raises(ValueError, match=message):
        run_tests(**arguments)


def test_nothing_runs_unconfined(monkeypatch, tmp_path):
    """Where the kernel refuses seccomp."""
    copy = copy_of_the_runner(tmp_path, '_call("prctl", SECCOMP, 2,', '_call("prctl", SECCOMP, 7,')
    monkeypatch.setattr(sandbox, "RUNNER", copy)
    with pytest.raises(RuntimeError, match=r"cannot be confined: .*Invalid argument"):
        run_tests(DOUBLE, "assert f(2) == 4")


@pytest.mark.parametrize(
    ("header", "column"),
    [("/usr/include/x86_64-linux-gnu/asm/unistd_64.h", 0), ("/usr/include/asm-generic/unistd.h", 1)],
)
def test_numbers_of_system_calls(header, column):
    """Against the kernel's headers. Those of aarch64 are the generic ones."""
    if not Path(header).exists():
        pytest.skip(f"needs {header}")
    defined = re.findall(r"#define (?:__NR|__NR3264)_(\w+)\s+(\d+)", Path(header).read_text(encoding="utf-8"))
    numbers = {name: int(number) for name, number in defined}
    numbers["newfstatat"] = numbers.get("newfstatat", numbers.get("fstatat"))
    listed = [*sandbox_runner.SYSTEM_CALLS.split(), *sandbox_runner.WITHOUT_BITS, *sandbox_runner.WITH_VALUE]
    for name, *columns in (each.split(":") for each in listed):
        if columns[column]:
            assert numbers[name] == int(columns[column]), name


# --- Programs that cheat ---

CHEATS = {
    "exit status 0": "import os\nos._exit(0)",
    "exit before the tests": "import sys\nsys.exit(0)",
    "exit in a test": "def f(x):\n    raise SystemExit(0)",
    "exit at the end": "import atexit, os\natexit.register(os._exit, 0)\ndef f(x):\n    raise SystemExit(0)",
    "exit from a thread": "import os, threading\nthreading.Thread(target=os._exit, args=(0,)).start()",
    "verdict on every file": """
import os, sys
text = '{"refused": null}\\n{"verdict": {"passed": true, "reason": "passed"}, "unsendable": null}\\n'
for descriptor in range(64):
    try:
        os.write(descriptor, text.encode())
    except OSError:
        pass
print(text)
def f(x):
    return 0""",
    "garbage for an answer": """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b'["value", ["object", ["list", 3]]' * 50 + b'\\n[[1, 2], 3]\\n' + b'[' * 5000 + b'\\n')
    except OSError:
        pass
def f(x):
    return 0""",
    "equal to anything": """
class Equal:
    __eq__ = __lt__ = __gt__ = __le__ = __ge__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
def f(x):
    return Equal()""",
    "a class equal to anything": """
class Meta(type):
    __eq__ = lambda self, other: True
    __hash__ = lambda self: 0
class Equal(metaclass=Meta):
    pass
def f(x):
    return Equal""",
    "an int equal to anything": """
class Equal(int):
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
def f(x):
    return Equal(5)""",
    "a list equal to anything": """
class Equal(list):
    __eq__ = lambda self, other: True
    __len__ = lambda self: 1
def f(x):
    return Equal([5])""",
    "an object that answers": """
class Answer:
    def __getattr__(self, name):
        return lambda *arguments: True
def f(x):
    return Answer()""",
    "no assertion": """
import builtins
class Quiet(Exception):
    def __new__(cls, *arguments):
        raise SystemExit(0)
builtins.AssertionError = Quiet
AssertionError = Quiet
def f(x):
    return 0""",
    "builtins": """
import builtins
for name in ("all", "any", "isinstance", "bool", "set", "list", "abs", "sorted", "len", "round", "type", "exec"):
    setattr(builtins, name, lambda *arguments, **keywords: True)
def f(x):
    return 0""",
    "names of the tests": "def check(candidate):\n    pass\nabs = round = lambda x: 0\ndef f(x):\n    return 0",
    "modules": """
import math, json, sys
math.isclose = lambda *arguments, **keywords: True
json.loads = lambda text: ["get", ["tuple", ["f"]], ["dict", []]]
sys.modules["math"] = sys.modules["json"] = sys
def f(x):
    return 0""",
    "harness": """
import sys
main = sys.modules["__main__"]
main._judge = lambda *arguments: None
main.Ended = Exception
main.encode = lambda value, number: ["object", 0]
def f(x):
    return 0""",
    "hooks": """
import os, sys
sys.excepthook = lambda *arguments: os._exit(0)
sys.settrace(lambda *arguments: os._exit(0))
__builtins__["__build_class__"] = __builtins__["__import__"] = lambda *arguments: os._exit(0)
def f(x):
    return 0""",
    "optimization": """
import os, sys, builtins
os.environ["PYTHONOPTIMIZE"] = "2"
def f(x):
    return 0""",
    "frames": """
import sys
frame = sys._getframe()
while frame:
    for name in list(frame.f_globals):
        if name.lower() in ("tests", "passed", "reason", "program"):
            frame.f_globals[name] = True
    frame = frame.f_back
def f(x):
    return 0""",
    "signals": """
import os, signal
for process in (os.getppid(), 0, -1):
    try:
        os.kill(process, signal.SIGTERM)
    except OSError:
        pass
def f(x):
    return 0""",
}


@pytest.mark.parametrize("name", CHEATS)
def test_cheats_fail(name):
    """Whatever a test looks like."""
    for tests in (
        "assert f(3) == 6",
        "assert f(3) != f(3)",
        "assert f(3) in (6, [7])",
        "def check(candidate):\n    assert abs(candidate(3) - 6) < 1e-6\ncheck(f)",
        "assert set(f([1, 2])) == {4}\nassert sorted(f([1])) == [4]",
        "import math\nassert math.isclose(f(3), 6)",
    ):
        verdict = run_tests(CHEATS[name], tests, timeout=5)
        assert not verdict.passed and verdict.reason not in ("passed", "timed out"), (tests, verdict)


def test_made_up_exceptions():
    """A reply of the program's own making that would end the tests, if it were believed."""
    program = """
import os
for descriptor in range(3, 64):
    try:
        os.write(descriptor, b'["value", null]\\n["value", ["object", 0]]\\n["error", "SystemExit"]\\n')
    except OSError:
        pass"""
    assert run_tests(program, "assert f(3) == 6").reason == "unreadable answer"


def test_right_answers_do_not_help_an_exit():
    program = "import os\nleft = [6, 8]\ndef f(x):\n    return left.pop(0) if left else os._exit(0)"
    assert run_tests(program, "assert f(3) == 6\nassert f(4) == 8").passed
    assert run_tests(program, "assert f(3) == 6\nassert f(4) == 8\nassert f(5) == 10").reason == EXITED


def test_the_tests_are_not_in_its_memory():
    program = """
import gc, sys
def f():
    needle, found, frame = "needle-" + str(7731), [], sys._getframe().f_back
    while frame:
        found += [name for name, value in frame.f_locals.items() if needle in repr(value)]
        frame = frame.f_back
    for each in gc.get_objects():
        if type(each) in (dict, list, tuple):
            values = each.values() if type(each) is dict else each
            found += [value for value in values if type(value) in (str, bytes) and needle in str(value)]
    return found"""
    assert run_tests(program, "assert f() == []  # needle-7731").passed


# --- Programs that do harm ---

HARMS = [
    # change files
    "open(FILE, 'w')", "open(FILE, 'a')", "open(FILE, 'r+')", "open(NEW, 'x')", "open('here', 'w')",
    "os.open(FILE, os.O_RDONLY | os.O_TRUNC)", "os.remove(FILE)", "os.rename(FILE, NEW)", "os.truncate(FILE, 0)",
    "os.rmdir(FOLDER + '/empty')", "os.mkdir(NEW)", "os.chmod(FILE, 0)", "os.chown(FILE, 1, 1)", "os.link(FILE, NEW)",
    "os.symlink(FILE, NEW)", "os.utime(FILE)", "os.mkfifo(NEW)", "os.setxattr(FILE, 'user.a', b'b')",
    "shutil.rmtree(FOLDER, ignore_errors=False)", "open('huge', 'wb').truncate(10**12)", "os.memfd_create('a')",
    # start processes
    "os.fork()", "os.forkpty()", "os.execv('/bin/true', ['true'])", "os.posix_spawn('/bin/true', ['true'], {})",
    "subprocess.run(['/bin/true'])", "multiprocessing.get_context('fork').Process(target=int).start()",
    "while True:\n    os.fork()", "if os.fork() == 0:\n    os.setsid()\n    os.fork() or open(NEW, 'w')",
    # speak
    "socket.socket()", "socket.socket(socket.AF_UNIX)", "socket.socketpair()", "c('socket', 16, 3, 0)",
    # meddle with other processes
    "os.kill(os.getppid(), 9)", "os.kill(-1, 9)", "os.killpg(0, 9)", "os.setsid()", "os.setpgid(0, 0)",
    "fcntl.fcntl(0, fcntl.F_SETOWN, os.getppid())", "c('prctl', 1, 0)", "c('ptrace', 16, os.getppid(), 0, 0)",
    "resource.prlimit(os.getppid(), resource.RLIMIT_CPU, (0, 0))", "c('syscall', 434, os.getppid(), 0)",
    "open(f'/proc/{os.getppid()}/mem', 'rb')", "open(f'/proc/{os.getppid()}/environ', 'rb')",
    "open(f'/proc/{os.getppid()}/fd/0', 'rb')",
    # get more rights: namespaces, a keyring, io_uring, other users
    "c('unshare', 0x10000000)", "c('syscall', 250, 1, 0)", "c('syscall', 425, 8, 0)", "os.setuid(1)",
]  # fmt: skip


@pytest.mark.parametrize("statements", HARMS)
def test_harm_is_refused(kernel, statements, tmp_path):
    folder = tmp_path / "outside"
    (folder / "empty").mkdir(parents=True)
    (folder / "file").write_text("precious")
    paths = f"FOLDER, FILE, NEW = {str(folder)!r}, {str(folder / 'file')!r}, {str(folder / 'new')!r}\n"
    assert run_tests(paths + attempt(statements), "assert f() == 'PermissionError'", timeout=5).reason == "passed"
    assert sorted(path.name for path in folder.iterdir()) == ["empty", "file"]
    assert (folder / "file").read_text() == "precious" and (folder / "file").stat().st_mode & 0o400


def test_threads_are_refused():
    program = attempt("threading.Thread(target=print).start()")
    assert run_tests(program, "assert f() == 'RuntimeError'").reason == "passed"


def test_reading(kernel, tmp_path):
    """The standard library, and nothing of the user's."""
    (tmp_path / "token").write_text("hf_secret")
    program = attempt("import decimal, hashlib, lzma, sqlite3\nopen(os.__file__).read()\nos.listdir('.')")
    assert run_tests(program, "assert f() == 'done'").reason == "passed"
    refused = "PermissionError" if kernel == "with Landlock" else "done"
    for statement in (f"open({str(tmp_path / 'token')!r})", f"os.listdir({str(tmp_path)!r})", "open('/etc/passwd')"):
        assert run_tests(attempt(statement), f"assert f() == {refused!r}").reason == "passed", statement


STUBBORN = """
def f(x):
    while True:
        try:
            f(x)
        except BaseException:
            pass"""
FLOOD = """
import os
while True:
    for descriptor in range(3, 64):
        try:
            os.write(descriptor, bytes(2**20))
        except OSError:
            pass"""


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("while True:\n    pass", "timed out"),
        ("def f(x):\n    while True:\n        pass", "timed out"),
        ("import time\ntime.sleep(10**6)", "timed out"),
        (STUBBORN, "timed out"),
        ("import itertools\ndef f(x):\n    return itertools.repeat(None)", "timed out"),
        ("import os, time\ndef f(x):\n    os.closerange(0, 64)\n    time.sleep(10**6)", EXITED),
        ("kept = []\nwhile True:\n    kept.append(bytes(2**20))", "memory"),
        ("def f(x):\n    return [0] * 10**10", "memory"),
        ("def f(x):\n    return 'x' * (300 << 20)", "memory"),
        (FLOOD, "memory"),
    ],
)
def test_limits(program, reason):
    timeout = marked(1 if reason == "timed out" else 90)
    assert run_tests(program, "for _ in f(3):\n    assert True", timeout=timeout).reason == reason
    assert not processes(str(timeout))


def test_memory_can_be_set():
    program = "def f(x):\n    return len(bytes(x << 20))"
    assert run_tests(program, "assert f(200) > 0").passed
    assert run_tests(program, "assert f(200) > 0", memory=200).reason == "memory"
    assert run_tests(program, "assert f(10) > 0", memory=64).passed


def test_output_goes_nowhere():
    program = "import os\ndef f(x):\n    return os.path.samestat(os.fstat(x), os.stat(os.devnull))"
    assert run_tests(program, "assert f(0) and f(1) and f(2)").passed
    program = "import sys\nfor _ in range(300):\n    print('x' * 2**20)\n    sys.stderr.write('x' * 2**20)\n" + DOUBLE
    assert run_tests(program, "assert f(2) == 4\nprint('of the tests')").passed


def test_tests_that_never_end(monkeypatch):
    """Not even when they are interrupted."""
    monkeypatch.setattr(sandbox, "GRACE", 1.0)
    tests = "try:\n    while f(2):\n        pass\nexcept BaseException:\n    while True:\n        pass\nassert True"
    assert run_tests(DOUBLE, tests, timeout=marked(1)).reason == "timed out"
    assert wait_until(lambda: not processes(str(marked(1))))


CALLER = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where tests run in the background
sys.path.insert(0, sys.argv[1])
import sandbox
print(sandbox.run_tests("while True:\\n    pass", "assert f()", timeout=float(sys.argv[2])))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_outlives_the_caller(number, tmp_path):
    mark = str(marked(50 + number))
    command = [sys.executable, "-c", CALLER, str(sandbox.RUNNER.parent), mark]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as caller:
        try:
            assert wait_until(lambda: len(processes(mark)) == 2)
            caller.send_signal(number)
            output, _ = caller.communicate(timeout=120)
        finally:
            caller.kill()
    assert not output and wait_until(lambda: not processes(mark))
    if number == signal.SIGINT:
        assert not list(tmp_path.iterdir()), "the working directory"


ENVIRONMENT = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
import sandbox
program = '''
import os
def f(process):
    found = ["environ"] if "hf_secret" in os.environ.values() else []
    try:
        found += ["proc"] * (b"hf_secret" in open(f"/proc/{process}/environ", "rb").read())
    except OSError:
        pass
    return found
def g(path):
    open(path, "w")
def h():
    os.fork()
'''
exec(program)
assert f(os.getpid()) == ["environ", "proc"]
tests = (f"assert f({os.getpid()}) == []", f"assert g({sys.argv[1] + '/new'!r})", "assert h()")
print(json.dumps([sandbox.run_tests(program, each).reason for each in tests]))
"""
NEW_NAMESPACE = "import ctypes, sys; sys.exit(ctypes.CDLL(None).unshare(0x10000000))"


@pytest.mark.parametrize("user", ["this user", "nobody"])
def test_the_environment_is_kept_from_it(kernel, user, tmp_path, request):
    """That of a caller with a token, root or not, by all means there are; and files and processes again."""
    folder, python, identity = tmp_path, sys.executable, {}
    if user == "nobody":
        if os.getuid():
            pytest.skip("needs root, to become another user")
        identity = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        folder = Path(tempfile.mkdtemp())
        request.addfinalizer(lambda: shutil.rmtree(folder))
        folder.chmod(0o777)
        python = next((path for path in (sys.executable, "/usr/bin/python3") if _runs(path, "", identity)), None)
        if python is None:
            pytest.skip("needs a Python that every user can start")
    if kernel == "without Landlock" and (os.getuid() or identity) and not _runs(python, NEW_NAMESPACE, identity):
        pytest.skip("needs user namespaces")
    shutil.copy(sandbox.RUNNER.parent / "sandbox.py" if kernel == "with Landlock" else sandbox.__file__, folder)
    if folder / "sandbox_runner.py" != sandbox.RUNNER:
        shutil.copy(sandbox.RUNNER, folder)
    environment = {"HF_TOKEN": "hf_secret", "HF_ALLOW_CODE_EVAL": "1", "PATH": os.defpath}
    command = [python, "-c", ENVIRONMENT, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd="/", **identity)
    assert done.stdout, done.stderr
    assert json.loads(done.stdout) == ["passed", "PermissionError", "PermissionError"]


def _runs(python, statements, identity):
    try:
        return subprocess.run([python, "-c", statements], capture_output=True, cwd="/", **identity).returncode == 0
    except OSError:
        return False


# --- Benchmarks ---


def mbpp(row, code=None):
    tests = "\n".join([row["test_setup_code"], *row["test_list"], *row["challenge_test_list"]])
    return row["code"] if code is None else code, tests


def humaneval(row, code=None):
    code = row["prompt"] + row["canonical_solution"] if code is None else code
    return code, f"{row['test']}\ncheck({row['entry_point']})"


def rows(name):
    return [json.loads(line) for line in (DATA / f"{name}.jsonl").read_text().splitlines()]


def failures(pairs, **limits):
    with ThreadPoolExecutor(2) as pool:
        verdicts = pool.map(lambda pair: run_tests(*pair, **limits), pairs)
        found = zip(pairs, verdicts, strict=True)
        return [f"{verdict.reason}: {tests}" for (_, tests), verdict in found if not verdict.passed]


def test_rows_of_our_own():
    pairs = [mbpp(PROGRAM), humaneval(FUNCTION)]
    assert not failures(pairs)
    assert len(failures([(program.replace("2 * x", "3 * x"), tests) for program, tests in pairs])) == 2


@real_rows
def test_some_references_pass():
    assert not failures([*map(mbpp, rows("mbpp")[::40]), *map(humaneval, rows("humaneval")[::7])])


@real_rows
@pytest.mark.slow
def test_all_references_pass():
    pairs = [*map(mbpp, rows("mbpp")), *map(humaneval, rows("humaneval"))]
    assert len(pairs) == 974 + 164
    assert not failures(pairs, timeout=60)


WRONG = """
class _Anything:
    __eq__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = None
def _wrong(value):
    if KIND == "none":
        return None
    if KIND == "equal":
        return _Anything()
    if KIND == "exit":
        raise SystemExit(0)
    if isinstance(value, bool):
        return not value
    if isinstance(value, (int, float, complex)):
        return value + 1
    return value + value[:1] if isinstance(value, (str, list, tuple)) and value else "wrong"
"""


@real_rows
def test_wrong_variants_fail():
    """References whose functions all return something else."""

    class Wrong(ast.NodeTransformer):
        def visit_Return(self, node):
            return ast.parse(f"return _wrong({ast.unparse(node.value) if node.value else None})").body[0]

    chosen = [(mbpp, row, row["code"]) for row in rows("mbpp")[5::80]]
    chosen += [(humaneval, row, row["prompt"] + row["canonical_solution"]) for row in rows("humaneval")[3::20]]
    pairs = [
        pair(row, f"KIND = {kind!r}{WRONG}{ast.unparse(Wrong().visit(ast.parse(code)))}")
        for number, (pair, row, code) in enumerate(chosen)
        for kind in ("none", "equal", "exit", "off by one")[number % 2 :: 2]
    ]
    assert len(pairs) >= 20 and len(failures(pairs, timeout=5)) == len(pairs)
