"""The warm interpreter: imports what snippets use, then forks once per snippet into namespaces of its own.

Started by the supervisor (spawn.rs) inside the jail, without privileges, with an empty environment, as process 1 of
its pid namespace, single-threaded. Descriptors: 3 is the control socket (messages: protocol.rs), 4 and 5 are the
seccomp programs. It never reads a snippet's code or output, so it cannot carry one snippet's data to the next: the
code arrives as a descriptor that only the child reads, the output leaves through pipes that only the child holds.

What must stay true: everything between the clone and `run` happens before any code of the snippet exists in the
process, and any failure there ends the child without running it.
"""

import atexit
import ctypes
import gc
import linecache
import os
import resource
import select
import signal
import site
import socket
import struct
import sys
import threading
import traceback
import types

REQUEST = struct.Struct("<IIQQQQQII")
REPLY = struct.Struct("<IIqQQ")
READY, SPAWNED, EXITED, FAULT = 1, 2, 3, 4

CONTROL, SECCOMP = 3, (4, 5)
MIB = 1 << 20
# Address space beyond the memory limit: stacks and allocator arenas are reserved, never filled.
ADDRESS_SLACK = 512 * MIB
SHM_BYTES = 16 * MIB

NEW_NAMESPACES = (
    0x10000000  # user
    | 0x20000000  # pid
    | 0x40000000  # net
    | 0x08000000  # ipc
    | 0x04000000  # uts
    | 0x00020000  # mount
)
CLONE_PIDFD = 0x1000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_SECCOMP, SECCOMP_MODE_FILTER, PR_SET_NO_NEW_PRIVS = 22, 2, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446

# Libraries load parts of themselves on first use; using them here saves every child that time.
WARM_UP = {
    "numpy": """
import numpy, numpy.linalg, numpy.random
numpy.linalg.inv(numpy.eye(3)) @ numpy.arange(9.0).reshape(3, 3); str(numpy.zeros(3)); numpy.random.default_rng(0)
""",
    "sympy": """
import sympy, sympy.parsing.sympy_parser
x = sympy.symbols("x")
sympy.factor(x**4 - 1); sympy.expand((x + 1) ** 3); sympy.solve(x**2 - 2, x); sympy.integrate(x**2, x)
sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2); sympy.N(sympy.sqrt(8)); sympy.latex(x / 2)
sympy.isprime(97); sympy.factorint(360); sympy.parsing.sympy_parser.parse_expr("x**2 + 1/2")
""",
    "math_verify": r"""
from math_verify import parse, verify
verify(parse(r"$\frac{1}{2}$"), parse("0.5")); verify(parse(r"\boxed{x^2+1}"), parse("$1+x^2$"))
""",
}

libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter lock, which a fork needs
UID, GID = os.getuid(), os.getgid()


def check(result, what):
    """Raises the error of a libc call that failed."""
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def syscall(number, *arguments):
    """A raw system call; integers are passed as long."""
    return libc.syscall(*(ctypes.c_long(a) if isinstance(a, int) else a for a in (number, *arguments)))


class FilterProgram(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = [("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p)]


class LandlockRuleset(ctypes.Structure):
    """struct landlock_ruleset_attr."""

    _fields_ = [("files", ctypes.c_uint64), ("network", ctypes.c_uint64), ("scopes", ctypes.c_uint64)]


class LandlockPath(ctypes.Structure):
    """struct landlock_path_beneath_attr."""

    _pack_ = 1
    _fields_ = [("allowed", ctypes.c_uint64), ("parent", ctypes.c_int32)]


def read_programs():
    """The seccomp programs, kept in memory: their descriptors are closed here."""
    programs = []
    for descriptor in SECCOMP:
        with open(descriptor, "rb") as file:
            code = file.read()
        buffer = ctypes.create_string_buffer(code, len(code))
        programs.append((buffer, FilterProgram(len(code) // 8, ctypes.addressof(buffer))))
    return programs


class Landlock:
    """File, network and signal rights, as far as this kernel's Landlock goes."""

    EXECUTE, WRITE, READ, LIST, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14

    def __init__(self):
        self.version = syscall(LANDLOCK_CREATE, None, 0, 1)  # below 1: absent or switched off
        # Rights that version 1 knows, then refer, truncate and ioctl on devices.
        self.files = (1 << 13) - 1
        for version, right in ((2, 1 << 13), (3, self.TRUNCATE), (5, 1 << 15)):
            if self.version >= version:
                self.files |= right

    def restrict(self):
        """Binds the calling process for good."""
        if self.version < 1:
            return
        # No TCP connect or bind from version 4, no abstract sockets or signals outside from version 6.
        ruleset = LandlockRuleset(self.files, 3 if self.version >= 4 else 0, 3 if self.version >= 6 else 0)
        size = 24 if self.version >= 6 else 16 if self.version >= 4 else 8
        handle = check(syscall(LANDLOCK_CREATE, ctypes.byref(ruleset), size, 0), "landlock_create_ruleset")
        read_only = self.EXECUTE | self.READ | self.LIST
        device = (self.WRITE | self.READ | self.TRUNCATE) & self.files
        rules = [("/", read_only), ("/tmp", self.files), ("/dev/shm", self.files & ~self.EXECUTE)]
        rules += [(f"/dev/{name}", device) for name in ("null", "zero", "full")]
        for path, allowed in rules:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = LandlockPath(allowed, parent)
            check(syscall(LANDLOCK_ADD, handle, 1, ctypes.byref(rule), 0), f"landlock_add_rule {path}")
            os.close(parent)
        check(syscall(LANDLOCK_RESTRICT, handle, 0), "landlock_restrict_self")
        os.close(handle)


def mount(kind, target, flags, options):
    """Mounts a new file system of a kind."""
    kind, where = kind.encode(), target.encode()
    check(libc.mount(kind, where, kind, ctypes.c_ulong(flags), options.encode()), f"mount {target}")


def write_once(path, content):
    """Writes a file of /proc in one call, as the kernel wants it."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(descriptor, content)
    finally:
        os.close(descriptor)


def isolate(request, landlock, programs):
    """Turns the new process into the snippet's: nothing here can be undone by it."""
    _, tasks, _, memory, cpu_seconds, tmp_bytes, file_bytes, open_files, _ = request
    write_once("/proc/self/setgroups", b"deny")
    write_once("/proc/self/uid_map", b"%d %d 1" % (UID, UID))
    write_once("/proc/self/gid_map", b"%d %d 1" % (GID, GID))
    plain = MS_NOSUID | MS_NODEV
    mount("tmpfs", "/tmp", plain, f"size={tmp_bytes},nr_inodes=4096,mode=700")
    mount("tmpfs", "/dev/shm", plain | MS_NOEXEC, f"size={SHM_BYTES},nr_inodes=64,mode=700")
    mount("proc", "/proc", plain | MS_NOEXEC, "subset=pid")
    os.chdir("/tmp")
    try:
        write_once("/proc/self/oom_score_adj", b"1000")
    except OSError:
        pass  # the node's own killer then sees the snippet as any process; the limits do not depend on it
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_NPROC, tasks),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_AS, IMAGE_ADDRESS_BYTES + memory + ADDRESS_SLACK),
        (resource.RLIMIT_STACK, 8 * MIB),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 256),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    landlock.restrict()
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, nothing), "capset")
    for _, program in programs:
        check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(program), 0, 0), "seccomp")


def seed_everything(seed):
    """A fork copies the state of every generator: without this all snippets would see the same stream."""
    if "random" in sys.modules:
        sys.modules["random"].seed(seed)
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed([seed & 0xFFFFFFFF, seed >> 32])
    if "sympy.core.random" in sys.modules:
        sys.modules["sympy.core.random"].seed(seed)


def text_stream(descriptor, mode, buffering):
    """Standard streams as a script has them: UTF-8 whatever happens, and a line is out once it is complete."""
    return open(descriptor, mode, buffering, encoding="utf-8", errors="backslashreplace", closefd=False)


def run(source):
    """Runs the snippet as a script, in one namespace, and returns its exit code."""
    sys.stdin = sys.__stdin__ = text_stream(0, "r", -1)
    sys.stdout = sys.__stdout__ = text_stream(1, "w", 1)
    sys.stderr = sys.__stderr__ = text_stream(2, "w", 1)
    sys.argv = ["snippet.py"]
    module = types.ModuleType("__main__")
    module.__builtins__ = sys.modules["builtins"]
    sys.modules["__main__"] = module
    exit_code = 0
    try:
        text = source.decode("utf-8", "replace")
        linecache.cache["<snippet>"] = (len(text), None, text.splitlines(True), "<snippet>")
        exec(compile(text, "<snippet>", "exec", dont_inherit=True), module.__dict__)
    except SystemExit as end:
        exit_code = code_of(end)
    except BaseException as error:
        exit_code = 1
        try:
            show(error)
        except BaseException:
            pass  # a hook of the snippet's own that fails changes nothing: the code is already 1
    for finish in (threading._shutdown, atexit._run_exitfuncs, sys.stdout.flush, sys.stderr.flush):
        try:
            finish()
        except BaseException:
            pass  # the interpreter ignores these at its end, too
    return exit_code


def show(error):
    """Prints an uncaught exception as the interpreter does, without the frame of `run`."""
    error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
    if sys.excepthook is sys.__excepthook__:
        traceback.print_exception(error)  # unlike the built-in hook it finds the snippet's lines
    else:
        sys.excepthook(type(error), error, error.__traceback__)


def code_of(end):
    """The exit code of sys.exit(value), which prints a value that is neither None nor a number."""
    if end.code is None:
        return 0
    if isinstance(end.code, int):
        return end.code & 0xFF
    try:
        print(end.code, file=sys.stderr)
    except BaseException:
        pass  # an object whose str() fails
    return 1


def child(request, descriptors, landlock, programs, control):
    """Everything the forked process does; it never returns."""
    try:
        code, stdout, stderr = descriptors
        isolate(request, landlock, programs)
        with open(code, "rb", closefd=False) as file:
            source = file.read()
        nothing = os.open("/dev/null", os.O_RDONLY)
        for descriptor, place in ((nothing, 0), (stdout, 1), (stderr, 2)):
            os.dup2(descriptor, place)
        seed_everything(request[2])
    except BaseException as error:
        control.send(REPLY.pack(FAULT, request[0], 0, 0, 0) + repr(error).encode()[:400])
        os._exit(1)
    os.closerange(3, 1 << 20)
    os._exit(run(source))


def fork(clone):
    """Clones into new namespaces. Returns (process id, descriptor of the process); the id is 0 in the child."""
    handle = ctypes.c_int(-1)
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    flags = NEW_NAMESPACES | CLONE_PIDFD | signal.SIGCHLD
    process = syscall(clone, flags, None, ctypes.byref(handle), None, None)
    if process == 0:
        api.PyOS_AfterFork_Child()
        return 0, -1
    code = ctypes.get_errno()
    api.PyOS_AfterFork_Parent()
    if process < 0:
        raise OSError(code, f"clone into new namespaces: {os.strerror(code)}")
    return process, handle.value


def serve(control, clone, landlock, programs):
    """Forks for every request and reports every end, until the supervisor closes the socket."""
    events = select.epoll()
    events.register(CONTROL, select.EPOLLIN)
    children = {}
    while True:
        for descriptor, _ in events.poll():
            if descriptor != CONTROL:
                process, call = children.pop(descriptor)
                events.unregister(descriptor)
                os.close(descriptor)
                _, status, used = os.wait4(process, 0)
                cpu_microseconds = int((used.ru_utime + used.ru_stime) * 1e6)
                control.send(REPLY.pack(EXITED, call, status, used.ru_maxrss * 1024, cpu_microseconds))
                continue
            message, descriptors, _, _ = socket.recv_fds(control, 512, 8)
            if not message:
                os._exit(0)
            request = REQUEST.unpack(message)
            try:
                process, handle = fork(clone)
            except OSError as error:
                for each in descriptors:
                    os.close(each)
                control.send(REPLY.pack(FAULT, request[0], 0, 0, 0) + repr(error).encode()[:400])
                continue
            if process == 0:
                child(request, descriptors, landlock, programs, control)
            for each in descriptors:
                os.close(each)
            socket.send_fds(control, [REPLY.pack(SPAWNED, request[0], process, 0, 0)], [handle])
            children[handle] = (process, request[0])
            events.register(handle, select.EPOLLIN)


def kibibytes(path, key):
    """A number of a /proc file, in bytes."""
    with open(path, encoding="ascii") as file:
        for line in file:
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


def prepare(packages, modules):
    """Imports and warms up what the snippets will use."""
    for name in ("PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE"):
        os.environ.pop(name, None)
    site.setquit()
    site.setcopyright()
    site.sethelper()
    if packages:
        sys.path.append(packages)
    sys.path.insert(0, "/tmp")  # a script finds modules beside itself
    import random  # noqa: F401 (imported here so that its generator is seeded)

    for module in modules:
        __import__(module)
        exec(WARM_UP.get(module, ""), {})


clone_number, packages, *modules = sys.argv[1:]
filters = read_programs()
rights = Landlock()
prepare(packages, modules)
control_socket = socket.socket(fileno=CONTROL)
gc.collect()
gc.freeze()
IMAGE_ADDRESS_BYTES = kibibytes("/proc/self/status", "VmSize:")
# Anonymous memory alone: each child starts with all of it, but with no more of the libraries' pages than it touches, and
# how many of those are resident here depends on the page cache of the moment.
image_bytes = kibibytes("/proc/self/status", "RssAnon:")
control_socket.send(REPLY.pack(READY, 0, rights.version, image_bytes, 0))
serve(control_socket, int(clone_number), rights, filters)
