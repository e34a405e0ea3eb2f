"""The warm interpreter: imports what snippets use, then forks once per snippet into a place of its own (place.py).

Started by the supervisor (spawn.rs) without privileges and with an empty environment, single-threaded: inside the jail, as
process 1 of its pid namespace, or where there are no namespaces by warden.py. Descriptors: 3 is the control socket
(messages: protocol.rs), those from 4 are the seccomp programs. It never reads a snippet's code or output, so it cannot carry one
snippet's data to the next: the code arrives as a descriptor that only the child reads, the output leaves through pipes that
only the child holds.

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

OWN_MODULES = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, OWN_MODULES)
import isolation
import leftovers
import place
import script
import session

sys.path.remove(OWN_MODULES)

REQUEST = struct.Struct("<IIQQQQQII")
REPLY = struct.Struct("<IIqQQ")
READY, SPAWNED, EXITED, FAULT = 1, 2, 3, 4
CONTROL = 3

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

class Zygote:
    """What its children start with."""

    def __init__(self, clone, programs, where, packages, modules):
        self.clone, self.place = clone, where
        self.filters = isolation.read_programs(programs)
        self.rights = isolation.Landlock()
        prepare(packages, modules)
        for own in ("isolation", "leftovers", "place", "script", "session", "warden", "zygote"):
            sys.modules.pop(own, None)
        self.control = socket.socket(fileno=CONTROL)
        self.children = {}  # descriptor → (process, call)
        gc.collect()
        gc.freeze()
        isolation.use_huge_pages()
        self.address_bytes = kibibytes("/proc/self/status", "VmSize:")
        # Anonymous memory alone: each child starts with all of it, but with no more of the libraries' pages than it touches,
        # and how many of those are resident here depends on the page cache of the moment.
        image_bytes = kibibytes("/proc/self/status", "RssAnon:")
        self.control.send(REPLY.pack(READY, 0, self.rights.version, image_bytes, 0))

    def serve(self, warden):
        """Forks for every request and reports every end, until the supervisor closes the socket or the warden ends."""
        events = select.epoll()
        events.register(CONTROL, select.EPOLLIN)
        if warden is not None:
            events.register(warden, select.EPOLLIN)
        while True:
            for descriptor, _ in events.poll():
                if descriptor in self.children:
                    events.unregister(descriptor)
                    self.report_end(descriptor)
                elif descriptor == warden:
                    leftovers.end_strays()
                    leftovers.remove(self.place.home)
                    os._exit(1)
                elif handle := self.take_request():
                    events.register(handle, select.EPOLLIN)

    def report_end(self, handle):
        """A child has ended."""
        process, call = self.children.pop(handle)
        os.close(handle)
        status, used = self.place.reap(process, {process for process, _ in self.children.values()})
        cpu_microseconds = int((used.ru_utime + used.ru_stime) * 1e6)
        self.control.send(REPLY.pack(EXITED, call, status, used.ru_maxrss * 1024, cpu_microseconds))

    def take_request(self):
        """Forks for a request. Returns the descriptor of the child; None if there is none."""
        message, descriptors, _, _ = socket.recv_fds(self.control, 512, 8)
        if not message:
            os._exit(0)
        request = REQUEST.unpack(message)
        try:
            process, handle = isolation.fork(self.clone, self.place.flags | isolation.CLONE_PIDFD)
        except OSError as error:
            process, handle = None, None
            self.tell_fault(request, error)
        if process == 0:
            self.be_child(request, descriptors)
        for each in descriptors:
            os.close(each)
        if process is None:
            return None
        self.place.adopt(process)
        socket.send_fds(self.control, [REPLY.pack(SPAWNED, request[0], process, 0, 0)], [handle])
        self.children[handle] = (process, request[0])
        return handle

    def tell_fault(self, request, error):
        """Says why a snippet is not run."""
        self.control.send(REPLY.pack(FAULT, request[0], 0, 0, 0) + repr(error).encode()[:400])

    def be_child(self, request, descriptors):
        """Everything the forked process does; it never returns."""
        try:
            isolation.isolate(self.place, request, self.address_bytes, self.rights)
            begin = self.begin_session if request[-1] & isolation.SESSION else self.begin_snippet
            work = begin(request, descriptors)
        except BaseException as error:
            self.tell_fault(request, error)
            os._exit(1)
        work()

    def begin_snippet(self, request, descriptors):
        """Gives up the last rights, and returns what runs the snippet."""
        code, stdout, stderr = descriptors
        isolation.forbid(self.filters)
        with open(code, "rb", closefd=False) as file:
            source = file.read()
        script.connect(stdout, stderr)
        script.seed_everything(request[2])

        def work():
            os.closerange(3, 1 << 20)
            exit_code = script.run(source, script.new_namespace(), "<snippet>", request[-1] & isolation.ECHO)
            script.finish()
            os._exit(exit_code)

        return work

    def begin_session(self, request, descriptors):
        """Returns what serves the turns of a session; one of the descriptors is its socket."""
        supervisor = socket.socket(fileno=os.dup(descriptors[0]))
        nothing = os.open("/dev/null", os.O_RDWR)
        script.connect(nothing, nothing)
        keep = supervisor.fileno()

        def bind():
            self.rights.restrict(self.place.rules())
            isolation.forbid(self.filters[-2:])  # without the one against siblings, where there is one

        def work():
            os.closerange(3, keep)
            os.closerange(keep + 1, 1 << 20)
            session.serve(supervisor, self.clone, bind, request[2])

        return work


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


def main(arguments, warden=None):
    """Becomes the zygote; with a warden, a descriptor that ends when it does. Never returns."""
    home, readable, clone, programs, packages, *modules = arguments
    where = place.Directory(home, readable.split(os.pathsep)) if home else place.Namespaces()
    Zygote(int(clone), int(programs), where, packages, modules).serve(warden)


if __name__ == "__main__":
    main(sys.argv[1:])
