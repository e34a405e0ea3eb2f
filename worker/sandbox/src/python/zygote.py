"""The warm interpreter: imports what snippets use, then forks once per snippet into a place of its own (place.py).

Started by the supervisor (spawn.rs) without privileges and with an empty environment, single-threaded: inside the jail, as
process 1 of its pid namespace, or where there are no namespaces by warden.py. Descriptors: 3 is the control socket
(messages: protocol.rs), 4 and 5 are the seccomp programs. It never reads a snippet's code or output, so it cannot carry one
snippet's data to the next: the code arrives as a descriptor that only the child reads, the output leaves through pipes that
only the child holds.

What must stay true: everything between the clone and `run` happens before any code of the snippet exists in the
process, and any failure there ends the child without running it.
"""

import os

# What modules want done at a fork is for forks of the snippet's own: a fork of the zygote has one thread and no state to
# mend, and each hook touches memory that is shared until then.
AT_FORK = []
register_at_fork, os.register_at_fork = os.register_at_fork, lambda **hooks: AT_FORK.append(hooks)

import collections
import gc
import select
import site
import socket
import struct
import sys

OWN_MODULES = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, OWN_MODULES)
import isolation
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

Ready = collections.namedtuple("Ready", "process handle channel limits")


def limits_of(request):
    """A request without what is its snippet's own: its call and seed, and whether its last value is shown."""
    _, tasks, _, *bounds, flags = request
    return (0, tasks, 0, *bounds, flags & ~isolation.ECHO)


def keep_hooks():
    """From here on forks are the snippet's."""
    for hooks in AT_FORK:
        os.register_at_fork(**hooks)


def wait_for_request(channel):
    """What the zygote hands over. Where it closes its end, nothing will come."""
    message, descriptors, _, _ = socket.recv_fds(channel, 512, 8)
    if not message:
        os._exit(1)
    return REQUEST.unpack(message), descriptors


class Zygote:
    """What its children start with."""

    def __init__(self, clone, where, packages, modules):
        self.clone, self.place = clone, where
        self.of_snippet, self.of_heads = isolation.read_programs()
        self.rights = isolation.Landlock()
        prepare(packages, modules)
        os.register_at_fork = register_at_fork
        self.numpy_random = script.NumpyRandom()
        for own in ("isolation", "leftovers", "place", "script", "session", "warden", "zygote"):
            sys.modules.pop(own, None)
        isolation.call_process("sandbox-zygote")
        self.control = socket.socket(fileno=CONTROL)
        self.events, self.cores = select.epoll(), len(os.sched_getaffinity(0))
        self.children = {}  # descriptor → (process, call)
        # A child that waits for its request, the limits of the last snippet, and whether those of the one before were equal.
        self.ready, self.last, self.repeated = None, None, False
        gc.collect()
        gc.freeze()
        isolation.use_huge_pages()
        self.address_bytes = kibibytes("/proc/self/status", "VmSize:")
        # Anonymous memory alone: each child starts with all of it, but with no more of the libraries' pages than it touches,
        # and how many of those are resident here depends on the page cache of the moment.
        image_bytes = kibibytes("/proc/self/status", "RssAnon:")
        self.control.send(REPLY.pack(READY, 0, self.rights.version, image_bytes, 0))

    def serve(self, warden):
        """Serves requests and reports every end, until the supervisor closes the socket or the warden ends."""
        self.events.register(CONTROL, select.EPOLLIN)
        if warden is not None:
            self.events.register(warden, select.EPOLLIN)
            warden = warden.fileno()
        while True:
            # Where every core has a snippet already, one that waits would take its time from those.
            free = len(self.children) < self.cores
            wanted = free and self.place.prepares and self.ready is None and self.repeated
            found = self.events.poll(0 if wanted else None)
            if wanted and not found:
                self.make_ready()
            for descriptor, _ in found:
                if descriptor == CONTROL:
                    self.take_request()
                elif descriptor == warden:
                    self.place.end()
                    os._exit(1)
                else:
                    self.report_end(descriptor)

    def report_end(self, handle):
        """A child has ended."""
        unused = self.ready is not None and handle == self.ready.handle
        if unused:
            # Closed by this process it is to be replaced; ended by itself it was not able to isolate itself.
            process, self.repeated = self.ready.process, self.repeated and self.ready.channel.fileno() < 0
            self.ready = None
        else:
            process, call = self.children.pop(handle)
        self.events.unregister(handle)
        os.close(handle)
        known = {process for process, _ in self.children.values()}
        if self.ready is not None:
            known.add(self.ready.process)
        status, used = self.place.reap(process, known)
        if not unused:
            cpu_microseconds = int((used.ru_utime + used.ru_stime) * 1e6)
            self.control.send(REPLY.pack(EXITED, call, status, used.ru_maxrss * 1024, cpu_microseconds))

    def take_request(self):
        """Hands a request to the child that is ready for such, or forks one for it."""
        message, descriptors, _, _ = socket.recv_fds(self.control, 512, 8)
        if not message:
            self.place.end()
            os._exit(0)
        request = REQUEST.unpack(message)
        try:
            process, handle = self.hand_over(request, message, descriptors) or self.fork(request, descriptors)
        except OSError as error:
            self.tell_fault(request, error)
        else:
            socket.send_fds(self.control, [REPLY.pack(SPAWNED, request[0], process, 0, 0)], [handle])
            self.children[handle] = (process, request[0])
        for each in descriptors:
            os.close(each)

    def hand_over(self, request, message, descriptors):
        """Gives a request to the child that is ready. None if there is none for such."""
        if request[-1] & isolation.SESSION:
            return None
        limits = limits_of(request)
        self.repeated, self.last = limits == self.last, limits
        if self.ready is None:
            return None
        if self.ready.limits != limits:
            if self.repeated:
                self.ready.channel.close()  # it ends, and one for these limits takes its place
            return None
        ready, self.ready = self.ready, None
        try:
            socket.send_fds(ready.channel, [message], descriptors)
        except OSError:  # it has just ended: its end is reported to nobody
            self.ready = ready
            return None
        ready.channel.close()
        return ready.process, ready.handle

    def make_ready(self):
        """Forks a child for a request like the last two, so that the next one need not wait for its isolation."""
        channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            process, handle = self.fork(self.last, (), (channel, theirs))
        except OSError:
            self.repeated = False  # the next request is told
        else:
            self.ready = Ready(process, handle, channel, self.last)
        theirs.close()

    def fork(self, request, descriptors, channel=None):
        """A child for a request, or for one that will come through a channel (both of its ends). Returns (process, its
        descriptor)."""
        process, handle = isolation.fork(self.clone, self.place.flags | isolation.CLONE_PIDFD)
        if process == 0:
            self.be_child(request, descriptors, channel)
        self.place.adopt(process)
        self.events.register(handle, select.EPOLLIN)
        return process, handle

    def tell_fault(self, request, error):
        """Says why a snippet is not run."""
        self.control.send(REPLY.pack(FAULT, request[0], 0, 0, 0) + repr(error).encode()[:400])

    def be_child(self, request, descriptors, channel):
        """Everything the forked process does; it never returns."""
        try:
            isolation.isolate(self.place, request, self.address_bytes, self.rights)
            if request[-1] & isolation.SESSION:
                isolation.call_process("sandbox-session")
                work = self.begin_session(request, descriptors)
            else:
                isolation.forbid(self.of_snippet)
                if channel is not None:
                    of_zygote, own = channel
                    of_zygote.close()
                    isolation.call_process("sandbox-ready")
                    request, descriptors = wait_for_request(own)
                isolation.call_process("sandbox-snippet")
                work = self.begin_snippet(request, descriptors)
        except BaseException as error:
            self.tell_fault(request, error)
            os._exit(1)
        work()

    def begin_snippet(self, request, descriptors):
        """Returns what runs the snippet."""
        code, stdout, stderr = descriptors
        with open(code, "rb", closefd=False) as file:
            source = file.read()
        script.connect(stdout, stderr)
        script.seed_everything(request[2], self.numpy_random)
        keep_hooks()

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

        def begin_head():
            self.rights.restrict(self.place.rules())
            isolation.forbid(self.of_heads)
            script.seed_everything(request[2], self.numpy_random)
            keep_hooks()

        def work():
            os.closerange(3, keep)
            os.closerange(keep + 1, 1 << 20)
            session.serve(supervisor, self.clone, begin_head)

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
    """Becomes the zygote; with a warden, a socket whose other end is that one's. Never returns."""
    home, readable, clone, packages, *modules = arguments
    where = place.Directory(home, readable.split(os.pathsep), warden) if home else place.Namespaces()
    Zygote(int(clone), where, packages, modules).serve(warden)


if __name__ == "__main__":
    main(sys.argv[1:])
