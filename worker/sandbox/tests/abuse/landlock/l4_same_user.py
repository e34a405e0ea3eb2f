# What a user may do to its own files and processes; harmless if it works: modes and times are set to what they are, signals
# are 0, limits are asked for.
import ctypes, fcntl, os, resource, signal, socket, sys
parent = os.getppid()
program = os.path.realpath(sys.executable)
mode = os.stat("/tmp").st_mode & 0o7777
def reads(path): return lambda: open(path, "rb").read(1)
def steal():
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    a.sendto(b"x", "/run/nowhere")
attempts = {
    "chmod": lambda: os.chmod("/tmp", mode),
    "times": lambda: os.utime("/tmp"),
    "attributes": lambda: os.listxattr("/tmp"),
    "kill": lambda: os.kill(parent, 0),
    "group": lambda: os.killpg(os.getpgid(parent), 0),
    "pidfd": lambda: signal.pidfd_send_signal(os.pidfd_open(parent), 0),
    "limits": lambda: resource.prlimit(parent, resource.RLIMIT_NOFILE),
    "nice": lambda: os.setpriority(os.PRIO_PROCESS, parent, os.getpriority(os.PRIO_PROCESS, parent)),
    "affinity": lambda: os.sched_setaffinity(parent, os.sched_getaffinity(parent)),
    "owner": lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent),
    "lease": lambda: fcntl.fcntl(open(program, "rb"), fcntl.F_SETLEASE, fcntl.F_RDLCK),
    "local socket": lambda: socket.socket(socket.AF_UNIX),
    "datagram pair": steal,
    "environ": reads(f"/proc/{parent}/environ"),
    "cmdline": reads(f"/proc/{parent}/cmdline"),
    "memory": reads(f"/proc/{parent}/mem"),
    "mounts": reads("/proc/self/mounts"),
    "passwd": reads("/etc/passwd"),
    "others": lambda: os.listdir(".."),
    "programs": lambda: os.listdir("../programs"),
    "out": lambda: open("../x", "w"),
    "shm": lambda: open("/dev/shm/canary", "w"),
    "tmp": lambda: open("/tmp/canary", "w"),
    "link out": lambda: os.link(program, "copy"),
    "move out": lambda: (open("mine", "w").close(), os.rename("mine", "../mine")),
    "truncate": lambda: os.truncate(program, os.stat(program).st_size),
}
for name, attempt in attempts.items():
    try: attempt()
    except OSError as e: print("blocked", name, e.errno)
    else: print("ESCAPE", name)
libc = ctypes.CDLL(None, use_errno=True)
print("blocked ptrace" if libc.ptrace(16, parent, 0, 0) == -1 else "ESCAPE ptrace")
print("done")
