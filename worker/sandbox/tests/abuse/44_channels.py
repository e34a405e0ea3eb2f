# Files of the machine that all may read are no place to signal by, nor to be watched or locked.
import ctypes, fcntl, os
libc = ctypes.CDLL(None, use_errno=True)
f = open(os.__file__, "rb")
for name, attempt in {
    "flock": lambda: fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB),
    "lease": lambda: fcntl.fcntl(f, fcntl.F_SETLEASE, fcntl.F_RDLCK),
    "notice": lambda: fcntl.fcntl(os.open("/usr", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_ACCESS),
}.items():
    try: attempt(); print("ESCAPE", name)
    except OSError as e: print("blocked", name, e.errno)
print("ESCAPE inotify" if libc.inotify_init() >= 0 else "blocked inotify")
print("done")
