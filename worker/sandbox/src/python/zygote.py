"""The warm interpreter: imports what snippets use, then forks once per snippet into namespaces of its own.

Started by the supervisor (spawn.rs) inside the jail, without privileges, with an empty environment, as process 1 of
its pid namespace, single-threaded. Descriptors: 3 is the control socket (messages: protocol.rs), 4 and 5 are the
seccomp programs. It never reads a snippet's code or output, so it cannot carry one snippet's data to the next: the
code arrives as a descriptor that only the child reads, the output leaves through pipes that only the child holds.

What must stay true: everything between the clone and `run` happens before any code of the snippet exists in the
process, and any failure there ends the child without running it.
"""

import gc
import os
import select
import site
import socket
import struct
import sys

OWN_MODULES = "/opt/agentfly"
sys.path.insert(0, OWN_MODULES)
import isolation
import script
import session

sys.path.remove(OWN_MODULES)

REQUEST = struct.Struct("<IIQQQQQII")
REPLY = struct.Struct("<IIqQQ")
READY, SPAWNED, EXITED, FAULT = 1, 2, 3, 4
CONTROL = 3
# Flags of a request.
SESSION, ECHO = 1, 2

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

def child(request, descriptors, control):
    """Everything the forked process does; it never returns."""
    try:
        isolation.isolate(request, IMAGE_ADDRESS_BYTES, rights)
        if request[-1] & SESSION:
            begin = begin_session
        else:
            begin = begin_snippet
        work = begin(request, descriptors)
    except BaseException as error:
        control.send(REPLY.pack(FAULT, request[0], 0, 0, 0) + repr(error).encode()[:400])
        os._exit(1)
    work()


def begin_snippet(request, descriptors):
    """Gives up the last rights, and returns what runs the snippet."""
    code, stdout, stderr = descriptors
    isolation.forbid(filters)
    with open(code, "rb", closefd=False) as file:
        source = file.read()
    script.connect(stdout, stderr)
    script.seed_everything(request[2])

    def work():
        os.closerange(3, 1 << 20)
        exit_code = script.run(source, script.new_namespace(), "<snippet>", request[-1] & ECHO)
        script.finish()
        os._exit(exit_code)

    return work


def begin_session(request, descriptors):
    """Returns what serves the turns of a session; one of the descriptors is its socket."""
    supervisor = socket.socket(fileno=os.dup(descriptors[0]))
    nothing = os.open("/dev/null", os.O_RDWR)
    script.connect(nothing, nothing)
    keep = supervisor.fileno()

    def work():
        os.closerange(3, keep)
        os.closerange(keep + 1, 1 << 20)
        session.serve(supervisor, clone_number, filters, request[2])

    return work


def serve(control):
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
                process, handle = isolation.fork(
                    clone_number, isolation.NEW_NAMESPACES | isolation.CLONE_PIDFD
                )
            except OSError as error:
                for each in descriptors:
                    os.close(each)
                control.send(REPLY.pack(FAULT, request[0], 0, 0, 0) + repr(error).encode()[:400])
                continue
            if process == 0:
                child(request, descriptors, control)
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


clone_text, packages, *modules = sys.argv[1:]
clone_number = int(clone_text)
filters = isolation.read_programs()
rights = isolation.Landlock()
prepare(packages, modules)
for own in ("isolation", "script", "session"):
    del sys.modules[own]
control_socket = socket.socket(fileno=CONTROL)
gc.collect()
gc.freeze()
isolation.use_huge_pages()
IMAGE_ADDRESS_BYTES = kibibytes("/proc/self/status", "VmSize:")
# Anonymous memory alone: each child starts with all of it, but with no more of the libraries' pages than it touches, and
# how many of those are resident here depends on the page cache of the moment.
image_bytes = kibibytes("/proc/self/status", "RssAnon:")
control_socket.send(REPLY.pack(READY, 0, rights.version, image_bytes, 0))
serve(control_socket)
