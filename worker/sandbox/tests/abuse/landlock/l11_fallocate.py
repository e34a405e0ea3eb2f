import ctypes, os
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("f", os.O_RDWR | os.O_CREAT)
KEEP_SIZE = 1
r = libc.fallocate(fd, KEEP_SIZE, ctypes.c_long(0), ctypes.c_long(128 << 20))
print("ESCAPE" if r == 0 else "blocked", os.fstat(fd).st_blocks)
