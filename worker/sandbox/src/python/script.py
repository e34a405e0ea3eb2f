"""Runs a snippet as a script: one namespace, its own streams, its traceback, its exit code."""

import ast
import atexit
import importlib.machinery
import linecache
import os
import sys
import threading
import traceback
import types

class NumpyRandom:
    """`numpy.random`, loaded but out of sight: whoever imports it finds it seeded.

    To seed it takes longer than a short program, which has no use for it. numpy itself imports it when it is first asked for
    (from its version 2; with an older one it is not hidden).
    """

    NAME = "numpy.random"

    def __init__(self):
        self.modules, self.seed = {}, 0
        if self.NAME in sys.modules and self.imports_itself() and not self.in_use():
            hidden = [name for name in sys.modules if f"{name}.".startswith(f"{self.NAME}.")]
            self.modules = {name: sys.modules.pop(name) for name in hidden}
            del sys.modules["numpy"].random
            sys.meta_path.insert(0, self)

    @staticmethod
    def imports_itself():
        """Whether numpy imports it when it is asked for."""
        return int(sys.modules["numpy"].__version__.partition(".")[0]) >= 2

    def in_use(self):
        """Whether a module that is loaded has imported it, or a function of its generator."""
        module = sys.modules[self.NAME]
        generator = module.mtrand._rand
        others = [other for name, other in sys.modules.items() if name.partition(".")[0] != "numpy"]
        values = [value for other in others for value in getattr(other, "__dict__", {}).values()]
        return any(value is module or getattr(value, "__self__", None) is generator for value in values)

    def find_spec(self, name, path, target=None):
        """Part of the import system: asked for modules that are not in sys.modules."""
        if name != self.NAME:
            return None
        return importlib.machinery.ModuleSpec(name, self)

    def create_module(self, spec):
        """Brings back all of it. Part of the import system."""
        sys.meta_path.remove(self)
        sys.modules.update(self.modules)
        module = self.modules[self.NAME]
        self.spec = module.__spec__
        seed_numpy(module, self.seed)
        return module

    def exec_module(self, module):
        """It has been executed before. Part of the import system."""
        module.__spec__, module.__loader__ = self.spec, self.spec.loader


def seed_numpy(module, seed):
    """Seeds the global generator."""
    module.seed([seed & 0xFFFFFFFF, seed >> 32])


def seed_everything(seed, numpy_random):
    """A fork copies the state of every generator: without this all snippets would see the same stream."""
    if "random" in sys.modules:
        sys.modules["random"].seed(seed)
    if numpy_random.modules:
        numpy_random.seed = seed
    elif NumpyRandom.NAME in sys.modules:
        seed_numpy(sys.modules[NumpyRandom.NAME], seed)
    if "sympy.core.random" in sys.modules:
        sys.modules["sympy.core.random"].seed(seed)


def text_stream(descriptor, mode, buffering):
    """Standard streams as a script has them: UTF-8 whatever happens, and a line is out once it is complete."""
    return open(descriptor, mode, buffering, encoding="utf-8", errors="backslashreplace", closefd=False)


def connect(stdout, stderr):
    """Makes these descriptors the process's output; its input is at its end."""
    nothing = os.open("/dev/null", os.O_RDONLY)
    for descriptor, place in ((nothing, 0), (stdout, 1), (stderr, 2)):
        os.dup2(descriptor, place)
    os.close(nothing)


def new_namespace():
    """An empty `__main__`."""
    module = types.ModuleType("__main__")
    module.__builtins__ = sys.modules["builtins"]
    sys.modules["__main__"] = module
    return module.__dict__


def run(source, namespace, name, echo):
    """Runs the code in `namespace` and returns its exit code; tracebacks call it `name`.

    With `echo`, the value of a last line that is an expression is printed, as at a prompt.
    """
    sys.stdin = sys.__stdin__ = text_stream(0, "r", -1)
    sys.stdout = sys.__stdout__ = text_stream(1, "w", 1)
    sys.stderr = sys.__stderr__ = text_stream(2, "w", 1)
    sys.argv = ["snippet.py"]
    exit_code = 0
    try:
        text = source.decode("utf-8-sig", "replace")
        linecache.cache[name] = (len(text), None, text.splitlines(True), name)
        for code, mode in pieces(text, name, echo):
            exec(code, namespace) if mode == "exec" else sys.displayhook(eval(code, namespace))
    except SystemExit as end:
        exit_code = code_of(end)
    except BaseException as error:
        exit_code = 1
        try:
            show(error)
        except BaseException:
            pass  # a hook of the snippet's own that fails changes nothing: the code is already 1
    return exit_code


def pieces(text, name, echo):
    """The code to run, compiled: one piece, or with `echo` two where the last statement is an expression."""
    tree = compile(text, name, "exec", ast.PyCF_ONLY_AST, dont_inherit=True) if echo else None
    last = tree.body[-1] if tree and tree.body else None
    if not isinstance(last, ast.Expr):
        return [(compile(text, name, "exec", dont_inherit=True), "exec")]
    del tree.body[-1]
    expression = ast.Expression(last.value)
    return [
        (compile(tree, name, "exec", dont_inherit=True), "exec"),
        (compile(expression, name, "eval", dont_inherit=True), "eval"),
    ]


def finish():
    """What an interpreter does at its end: waits for threads, calls exit hooks, writes what is buffered."""
    settle((threading._shutdown, atexit._run_exitfuncs))


def settle(steps=()):
    """Takes steps of a snippet's end, whatever each raises, and writes what is buffered."""
    for step in (*steps, sys.stdout.flush, sys.stderr.flush):
        try:
            step()
        except BaseException:
            pass  # the interpreter ignores these at its end, too


def show(error):
    """Prints an uncaught exception as the interpreter does, without the frames of this file."""
    trace = error.__traceback__
    while trace and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    error.__traceback__ = trace
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
