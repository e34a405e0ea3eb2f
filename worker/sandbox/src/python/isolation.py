"""What binds a process for good: namespaces, mounts, limits, Landlock, a seccomp program.

Called by the zygote's children before any code of a snippet exists in them. Nothing here can be undone by the process
that it was done to, and any failure raises, which ends the child without running anything.
"""

import ctypes
import os
import resource
import signal

SECCOMP = (4, 5)  # a snippet's program, and that of a session's heads
# Flags of a request.
SESSION, ECHO = 1, 2
MIB = 1 << 20
# Address space beyond the memory limit: stacks and allocator arenas are reserved, never filled.
ADDRESS_SLACK = 512 * MIB

NEW_NAMESPACES = (
    0x10000000  # user
    | 0x20000000  # pid
    | 0x40000000  # net
    | 0x08000000  # ipc
    | 0x04000000  # uts
    | 0x00020000  # mount
)
CLONE_PIDFD, CLONE_PARENT = 0x1000, 0x8000
MS_NOSUID, MS_NODEV, MS_NOEXEC = 2, 4, 8
PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 36, 38
SECCOMP_MODE_FILTER, PR_SET_NAME = 2, 15
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446


libc = ctypes.PyDLL(None, use_errno=True)  # PyDLL keeps the interpreter lock, which a fork needs


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

    EXECUTE, WRITE, READ, LIST, REFER, TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 13, 1 << 14
    PROGRAM = EXECUTE | READ
    READ_ONLY = PROGRAM | LIST
    DEVICE = WRITE | READ | TRUNCATE
    ALL = (1 << 16) - 1
    ALL_BUT_EXECUTE = ALL & ~EXECUTE

    def __init__(self):
        self.version = syscall(LANDLOCK_CREATE, None, 0, 1)  # below 1: absent or switched off
        # Rights that version 1 knows, then refer, truncate and ioctl on devices.
        self.files = (1 << 13) - 1
        for version, right in ((2, self.REFER), (3, self.TRUNCATE), (5, 1 << 15)):
            if self.version >= version:
                self.files |= right

    def restrict(self, rules):
        """Binds the calling process for good to (path, rights below it)."""
        if self.version < 1:
            return
        # No TCP connect or bind from version 4, no abstract sockets or signals outside from version 6.
        ruleset = LandlockRuleset(self.files, 3 if self.version >= 4 else 0, 3 if self.version >= 6 else 0)
        size = 24 if self.version >= 6 else 16 if self.version >= 4 else 8
        handle = check(syscall(LANDLOCK_CREATE, ctypes.byref(ruleset), size, 0), "landlock_create_ruleset")
        for path, allowed in rules:
            parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
            rule = LandlockPath(allowed & self.files, parent)
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


def call_process(name):
    """Gives this process the name that ps(1) shows, of 15 bytes at most."""
    check(libc.prctl(PR_SET_NAME, name.encode(), 0, 0, 0), "name")


def become_subreaper():
    """Orphans below this process become its children."""
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "subreaper")


def end_with_parent(parent):
    """The kernel kills this process when `parent` ends."""
    check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "parent-death signal")
    if os.getppid() != parent:
        os._exit(1)  # it had ended before


def isolate(place, request, address_bytes, landlock):
    """Gives a process its place, its limits, and no rights; `address_bytes` of address space it has already."""
    _, tasks, _, memory, cpu_seconds, tmp_bytes, file_bytes, open_files, flags = request
    os.setpgid(0, 0)
    place.enter(tmp_bytes)
    try:
        write_once("/proc/self/oom_score_adj", b"1000")
    except OSError:
        pass  # the node's own killer then sees the snippet as any process; the limits do not depend on it
    for limit, value in (
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_NPROC, tasks),
        (resource.RLIMIT_NOFILE, open_files),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_AS, address_bytes + memory + ADDRESS_SLACK),
        (resource.RLIMIT_STACK, 8 * MIB),
        (resource.RLIMIT_CORE, 1),  # not 0: with that a core is still piped to a program of the node's
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
        (resource.RLIMIT_SIGPENDING, 256),
    ):
        hard = resource.getrlimit(limit)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(limit, (value, value))
    check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    landlock.restrict(place.rules(of_first_process=bool(flags & SESSION)))
    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    check(libc.capset(header, nothing), "capset")


def forbid(program):
    """Leaves the calling process the system calls of the table (seccomp/table.rs) alone."""
    _, filter_program = program
    check(libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(filter_program), 0, 0), "seccomp")


HUGE_PAGE = 2 * MIB
MADV_COLLAPSE = 25


def use_huge_pages():
    """Moves this process's memory into huge pages, as far as the kernel does that (from Linux 6.1).

    A fork copies an entry for each page, and the child's end gives each back: with a large library that is most of a short
    snippet's time.
    """
    with open("/proc/self/maps", encoding="ascii") as file:
        areas = [line.split() for line in file]
    for span, rights, _, _, _, *path in areas:
        if not rights.startswith("rw") or path not in ([], ["[heap]"]):
            continue
        first, end = (int(address, 16) for address in span.split("-"))
        for start in range(-(-first // HUGE_PAGE) * HUGE_PAGE, end - HUGE_PAGE + 1, HUGE_PAGE):
            # What it answers does not matter: a page that stays small is only slower.
            libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(HUGE_PAGE), MADV_COLLAPSE)


def fork(clone, flags):
    """`os.fork` with flags of clone. Returns (process id, descriptor of the process or -1); the id is 0 in the child."""
    handle = ctypes.c_int(-1)
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    process = syscall(clone, flags | signal.SIGCHLD, None, ctypes.byref(handle), None, None)
    if process == 0:
        api.PyOS_AfterFork_Child()
        return 0, -1
    code = ctypes.get_errno()
    api.PyOS_AfterFork_Parent()
    if process < 0:
        raise OSError(code, f"clone: {os.strerror(code)}")
    return process, handle.value
