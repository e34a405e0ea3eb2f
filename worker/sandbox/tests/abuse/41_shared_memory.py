# Pages of a shared mapping live on while a page of it is mapped, and nobody counts them meanwhile. Bounded: 600 MiB.
import ctypes, mmap
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.madvise.argtypes = libc.munmap.argtypes = None
SIZE, held = 4 << 20, 0
def hold(flags, fd):
    global held
    at = libc.mmap(None, SIZE, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if at in (None, ctypes.c_void_p(-1).value):
        print("blocked", ctypes.get_errno())
        return False
    ctypes.memset(at, 1, SIZE)
    libc.madvise(ctypes.c_void_p(at), ctypes.c_size_t(SIZE), 4)
    libc.munmap(ctypes.c_void_p(at + 4096), ctypes.c_size_t(SIZE - 4096))
    held += SIZE
    return True
for flags in (mmap.MAP_SHARED | mmap.MAP_ANONYMOUS, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x40000):
    for _ in range(75):
        if not hold(flags, -1): break
try:
    with open("/dev/zero", "r+b", 0) as zero:
        for _ in range(75):
            if not hold(mmap.MAP_SHARED, zero.fileno()): break
except OSError as e: print("blocked /dev/zero", e.errno)
print("ESCAPE holds" if held else "none held", held)
