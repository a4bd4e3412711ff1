"""What `sandbox.run_tests` starts: a script of its own, so that it starts fast. See there for the design.

    python sandbox_runner.py TIMEOUT MEMORY SIZE < program of SIZE bytes, then the tests and their names for it

writes, in JSON, whether it could confine itself, and the verdict, one line each. It is two processes: this one runs
the tests, and its child the program. They exchange lines of JSON, so that nothing but plain values ever comes out of
the child.
"""

import sys

if __name__ == "__main__":
    sys.path.pop(0)  # this folder, whose modules would hide the standard library's

import builtins
import ctypes
import errno
import importlib
import json
import math
import os
import resource
import signal
import struct

# System calls that a program may make, as "name:number on x86-64:number on aarch64" (an empty number: not there). What
# is not listed fails: processes, threads, sockets, signals, whatever changes a file, and all that is still unknown.
SYSTEM_CALLS = """
    read:0:63 write:1:64 readv:19:65 writev:20:66 pread64:17:67 lseek:8:62 close:3:57 dup:32:23 dup2:33: dup3:292:24
    pipe:22: pipe2:293:59 poll:7: ppoll:271:73 select:23: pselect6:270:72
    stat:4: lstat:6: fstat:5:80 newfstatat:262:79 statx:332:291 access:21: faccessat:269:48 faccessat2:439:439
    readlink:89: readlinkat:267:78 getdents64:217:61 getcwd:79:17 chdir:80:49 umask:95:166
    mmap:9:222 munmap:11:215 mremap:25:216 mprotect:10:226 madvise:28:233 brk:12:214 membarrier:324:283
    rt_sigaction:13:134 rt_sigprocmask:14:135 rt_sigreturn:15:139 sigaltstack:131:132 restart_syscall:219:128
    futex:202:98 set_robust_list:273:99 rseq:334:293 arch_prctl:158: sched_yield:24:124 sched_getaffinity:204:123
    time:201: gettimeofday:96:169 clock_gettime:228:113 clock_getres:229:114 times:100:153 getrusage:98:165
    nanosleep:35:101 clock_nanosleep:230:115 pause:34: alarm:37: getitimer:36:102 setitimer:38:103
    getpid:39:172 getppid:110:173 gettid:186:178 getuid:102:174 geteuid:107:175 getgid:104:176 getegid:108:177
    getgroups:115:158 getrlimit:97:163 sysinfo:99:179 uname:63:160 getrandom:318:278 exit:60:93 exit_group:231:94
"""
# Allowed if an argument, counted from zero, has none of the bits: opening files, but not to write or create.
WITHOUT_BITS = {"open:2:": (1, 0o1103), "openat:257:56": (2, 0o1103)}
# Allowed if an argument has one of the values: duplicating and close-on-exec of a file, whether it is a terminal, and
# limits of the process itself.
WITH_VALUE = {
    "fcntl:72:25": (1, (0, 1, 2, 3, 4, 1030)),
    "ioctl:16:29": (1, (0x5401, 0x5450, 0x5451)),
    "prlimit64:302:261": (0, (0,)),
}
MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column above, and the kernel's name for it

READABLE = (
    os.path.dirname(os.__file__), f"{sys.base_prefix}/lib", f"{sys.base_exec_prefix}/{sys.platlibdir}",
    "/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache",  # what extension modules link to
    "/usr/share/zoneinfo", "/etc/localtime", "/dev/null", "/dev/urandom", ".",
)  # fmt: skip
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # system calls, on all machines
READ_FILE, READ_FOLDER, ALL_ACCESS = 4, 8, 0x1FFF  # of Landlock's first version
PDEATHSIG, DUMPABLE, SECCOMP, NO_NEW_PRIVILEGES = 1, 4, 22, 38  # of prctl
NEW_USER_NAMESPACE = 0x10000000
LIBRARY = ctypes.CDLL(None, use_errno=True)


def main(timeout, memory, size):
    _call("prctl", PDEATHSIG, signal.SIGKILL)  # killed with the thread that started it
    _call("prctl", DUMPABLE, 0)  # not dumpable: nobody of the same user may look into it
    cpu_seconds = math.ceil(timeout) + 1
    for what, value in (("AS", memory << 20), ("CPU", cpu_seconds), ("FSIZE", 0), ("NOFILE", 64), ("CORE", 0)):
        _limit(getattr(resource, f"RLIMIT_{what}"), value)
    answers, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 1)
    source = _read(0, size).decode("utf-8", "surrogatepass")
    program = Program(source)  # before the tests are read, so that they are not in its memory
    task = json.loads(_read(0, sys.maxsize))
    try:
        os.write(answers, json.dumps({"refused": program.refused}).encode() + b"\n")
        if not program.refused:
            reason = _judge(program, task["tests"], task["names"], timeout)
            verdict = {"passed": reason is None, "reason": reason or "passed"}
            os.write(answers, json.dumps({"verdict": verdict, "unsendable": program.unsendable}).encode() + b"\n")
    finally:
        program.kill()


def _judge(program, tests, names, timeout):
    """Run the program, then the tests. Returns why they do not pass, or None."""

    def stop(*_):
        program.ended = "timed out"
        raise Ended(program.ended)

    signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, timeout)
        try:
            program.ask("run")
            namespace = {"__name__": "tests", **program.names(names)}
            exec(compile(tests, "tests", "exec", dont_inherit=True, optimize=0), namespace)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    except Ended as end:
        return str(end)
    except MemoryError:
        return "memory"
    except BaseException as error:
        return type(error).__name__
    # Tests may swallow an exception, and that of an end, too.
    return program.ended or (None if program.calls else "the tests called nothing")


# --- The process of the tests ---


class Ended(BaseException):
    """Nothing more comes from the program: why."""


class Program:
    """The process of the program, as that of the tests sees it. All that comes from it is taken for a lie that may
    be a right answer: it is decoded to values of builtin types, whose comparisons are Python's own."""

    def __init__(self, source):
        self.ended, self.calls, self.unsendable = None, 0, None
        (request_end, requests), (replies, reply_end) = os.pipe(), os.pipe()
        parent, self.process = os.getpid(), os.fork()
        if self.process == 0:
            try:
                _serve(source, request_end, reply_end, parent)
            finally:
                os._exit(1)  # whatever happens, the child never comes to the tests
        os.close(request_end)
        os.close(reply_end)
        self.requests, self.replies = os.fdopen(requests, "wb"), os.fdopen(replies, "rb")
        # The first reply comes before anything of the program has run.
        line = self.replies.readline()
        self.refused = json.loads(line) if line else "its process ended"

    def kill(self):
        """End the process, if it has not ended. Returns how it did, or None if that was asked before."""
        if self.process:  # after the wait, the number may be another's
            os.kill(self.process, signal.SIGKILL)
            process, self.process = self.process, None
            return os.waitpid(process, 0)[1]

    def ask(self, operation, *arguments, **keywords):
        """The result of one of `OPERATIONS`; raises what it raised, as the nearest builtin exception."""
        if self.ended:
            raise Ended(self.ended)
        request = json.dumps([operation, encode(arguments, self._number), encode(keywords, self._number)])
        try:
            self.requests.write(request.encode() + b"\n")
            self.requests.flush()
            line = self.replies.readline()
        except BrokenPipeError:
            line = b""
        if not line.endswith(b"\n"):
            status = self.kill()
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL
            self.ended = f"killed by signal {os.WTERMSIG(status)}" if killed else "exited before the end of the tests"
            raise Ended(self.ended)
        try:
            kind, content = json.loads(line)
            value = decode(content, self._stand_in) if kind == "value" else EXCEPTIONS[content]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            self.ended = "unreadable answer"
            raise Ended(self.ended) from error
        if kind == "value":
            return value
        raise value.__new__(value)  # not value(), as some want arguments

    def names(self, names):
        """What the program calls so. Modules are imported here, whatever the program did to them."""
        found = {}
        for name in names:
            try:
                value = self.ask("get", name)
            except KeyError:
                continue  # a builtin, or a NameError to come
            is_module = value is Module and name in sys.stdlib_module_names
            found[name] = importlib.import_module(name) if is_module else value
        return found

    def _stand_in(self, number):
        return StandIn(self, number)

    def _number(self, value):
        if isinstance(value, StandIn):
            return value._number
        self.unsendable = type(value).__name__
        raise Ended(f"the tests pass a {self.unsendable}")


class StandIn:
    """For what is no plain value: a function, a class, an object of one. It can be called, its attributes read and
    set, and gone through. A comparison is refused: the program's class would decide it."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, program, number):
        self.__dict__.update(_program=program, _number=number)

    def __call__(self, *arguments, **keywords):
        self._program.calls += 1
        return self._program.ask("call", self, *arguments, **keywords)

    def __getattr__(self, name):
        return self._program.ask("getattr", self, name)

    def __setattr__(self, name, value):
        self._program.ask("setattr", self, name, value)

    def __bool__(self):
        return self._program.ask("bool", self)

    def __iter__(self):
        iterator = self._program.ask("iter", self)
        while True:
            try:
                yield self._program.ask("next", iterator)
            except StopIteration:
                return

    def __eq__(self, other):
        raise TypeError("An object of the program is compared.")


class Module:
    """Stands for a module that the program imported."""


# --- The process of the program ---

OPERATIONS = {
    "call": lambda function, *arguments, **keywords: function(*arguments, **keywords),
    "getattr": getattr,
    "setattr": setattr,
    "bool": bool,
    "iter": iter,
    "next": next,
}


def _serve(source, requests, replies, parent):
    """Run the program and answer what the tests ask, confined."""
    for descriptor in (0, 1, 2):
        os.dup2(os.open(os.devnull, os.O_RDWR), descriptor)
    for descriptor in {*range(3, 64)} - {requests, replies}:
        os.closerange(descriptor, descriptor + 1)  # which does not mind that there is none
    requests, replies = os.fdopen(requests, "rb"), os.fdopen(replies, "wb")

    def reply(line):
        replies.write(line.encode())
        replies.write(b"\n")
        replies.flush()

    try:
        confine(parent)
        open(os.__file__).close()
    except OSError as error:
        return reply(json.dumps(str(error)))
    reply("null")

    module, objects = type(sys)("program"), []
    sys.modules["program"] = module  # where dataclasses and others look

    def number(value):
        objects.append(value)
        return len(objects) - 1

    def run():
        exec(compile(source, "program.py", "exec", dont_inherit=True, optimize=0), vars(module))

    operations = {**OPERATIONS, "run": run, "get": lambda name: vars(module)[name]}
    for request in requests:
        try:
            operation, arguments, keywords = json.loads(request)
            arguments, keywords = decode(arguments, objects.__getitem__), decode(keywords, objects.__getitem__)
            value = operations[operation](*arguments, **keywords)
            # A builtin type under a name of the program's (`to_list = list`) is called over here, and so counted.
            is_class = operation == "get" and isinstance(value, type)
            line = json.dumps(["value", ["object", number(value)] if is_class else encode(value, number)])
        except SystemExit:
            return
        except BaseException as error:
            names = [each.__name__ for each in type(error).__mro__ if EXCEPTIONS.get(each.__name__) is each]
            line = json.dumps(["error", names[0] if names else "Exception"])
        reply(line)


# --- Between them ---

EXCEPTIONS = {
    name: value for name, value in vars(builtins).items() if isinstance(value, type) and issubclass(value, Exception)
}


def encode(value, number):
    """A value as JSON: lists stand for [type, content], so that tuples, sets, dictionaries with any keys and large
    integers come out as they went in. A subclass is sent as its builtin type. `number` is called for all else."""
    if value is None or isinstance(value, (bool, float, str)):
        return value
    if isinstance(value, int):
        # Python refuses to write out integers of more than 4,300 digits, but not in base 16.
        return value if abs(value) < 2**63 else ["int", hex(value)]
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return [kind.__name__, [encode(each, number) for each in value]]
    if isinstance(value, dict):
        return ["dict", [[encode(key, number), encode(each, number)] for key, each in value.items()]]
    if isinstance(value, (bytes, bytearray)):
        return ["bytes", value.hex()]
    if isinstance(value, complex):
        return ["complex", [value.real, value.imag]]
    if isinstance(value, range):
        return ["range", [value.start, value.stop, value.step]]
    if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
        return ["type", value.__name__]
    if isinstance(value, type(sys)):
        return ["module", None]
    return ["object", number(value)]


def decode(value, by_number):
    if not isinstance(value, list):
        return value
    kind, content = value
    if kind in ("list", "tuple", "set", "frozenset"):
        return vars(builtins)[kind](decode(each, by_number) for each in content)
    if kind == "dict":
        return {decode(key, by_number): decode(each, by_number) for key, each in content}
    return by_number(content) if kind == "object" else DECODERS[kind](content)


def _type(name):
    if isinstance(value := vars(builtins)[name], type):
        return value
    raise TypeError(name)


DECODERS = {
    "int": lambda digits: int(digits, 16),
    "bytes": bytes.fromhex,
    "complex": lambda parts: complex(*parts),
    "range": lambda parts: range(*parts),
    "type": _type,
    "module": lambda _: Module,
}


def _read(descriptor, size):
    parts = []
    while size > 0 and (part := os.read(descriptor, min(size, 1 << 16))):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


# --- Confinement ---


def confine(parent):
    """Take from this process, for good, what a program does not need. Raises an OSError if that is not possible."""
    _call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)  # else an ordinary user may not do the rest
    if not _landlock() and os.getuid():
        try:
            _call("unshare", NEW_USER_NAMESPACE)  # from which processes outside cannot be looked into
        except OSError:
            pass
    _call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))  # root's rights, which are also over processes
    _call("prctl", PDEATHSIG, signal.SIGKILL)  # killed with the process of the tests
    if os.getppid() != parent:
        raise ProcessLookupError("the process of the tests ended")
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"the system calls of {machine} are not listed, but those of {', '.join(MACHINES)}")
    code = _filter(machine)
    array = ctypes.create_string_buffer(code, len(code))
    _call("prctl", SECCOMP, 2, struct.pack("HP", len(code) // 8, ctypes.addressof(array)))  # seccomp


def _landlock():
    """Only `READABLE` can be opened. Says whether the kernel has it."""
    try:
        rules = _call("syscall", LANDLOCK_CREATE, struct.pack("Q", ALL_ACCESS), 8, 0)
    except OSError:
        return False
    for path in READABLE:
        if os.path.exists(path):
            folder = os.open(path, os.O_PATH | os.O_CLOEXEC)
            access = READ_FILE | READ_FOLDER * os.path.isdir(path)
            _call("syscall", LANDLOCK_ADD, rules, 1, struct.pack("=Qi", access, folder), 0)
            os.close(folder)
    _call("syscall", LANDLOCK_RESTRICT, rules, 0)
    os.close(rules)
    return True


def _filter(machine):
    """The system calls above as a program for the kernel's packet filter: instructions of 8 bytes."""
    column, architecture = MACHINES[machine]
    load, equal, any_bit, done = 0x20, 0x15, 0x45, 0x06
    allow, refuse = (done, 0, 0, 0x7FFF0000), (done, 0, 0, 0x00050000 | errno.EPERM)

    def number(name):
        return name.split(":")[1 + column]

    lines = [(load, 0, 0, 4), (equal, 1, 0, architecture), refuse, (load, 0, 0, 0)]
    for name in filter(number, SYSTEM_CALLS.split()):
        lines += [(equal, 0, 1, int(number(name))), allow]
    for name, (argument, bits) in WITHOUT_BITS.items():
        if number(name):
            lines += [(equal, 0, 4, int(number(name))), (load, 0, 0, 16 + 8 * argument), (any_bit, 1, 0, bits)]
            lines += [allow, refuse]
    for name, (argument, values) in WITH_VALUE.items():
        lines += [(equal, 0, 2 + 2 * len(values), int(number(name))), (load, 0, 0, 16 + 8 * argument)]
        for value in values:
            lines += [(equal, 0, 1, value), allow]
        lines += [refuse]
    return b"".join(struct.pack("HBBI", *line) for line in [*lines, refuse])


def _limit(what, value):
    hard = resource.getrlimit(what)[1]
    value = value if hard == resource.RLIM_INFINITY else min(value, hard)
    resource.setrlimit(what, (value, value))


def _call(function, *arguments):
    """A function of the C library, with integers as wide as a register."""
    wide = [ctypes.c_long(each) if isinstance(each, int) else each for each in arguments]
    result = getattr(LIBRARY, function)(*wide)
    if result == -1:
        raise OSError(ctypes.get_errno(), f"{function}: {os.strerror(ctypes.get_errno())}")
    return result


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
