# A child of the snippet's parent would not be counted with the snippet.
import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
CLONE_PARENT, SIGCHLD = 0x8000, 17
number = {"x86_64": 56, "aarch64": 220}[os.uname().machine]
pid = libc.syscall(number, CLONE_PARENT | SIGCHLD, 0, 0, 0, 0)
if pid == 0: os._exit(0)
print("ESCAPE" if pid > 0 else "blocked", ctypes.get_errno())
