import mmap, os, time
libc = __import__("ctypes").CDLL(None, use_errno=True)
libc.mmap.restype = __import__("ctypes").c_void_p
print("begun", flush=True)
for i in range(8):
    fd = os.open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL)
    os.unlink("f")
    for j in range(60): os.write(fd, b"x" * (1 << 20))
    libc.mmap(None, 4096, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    os.close(fd)
    time.sleep(0.2)
print("ESCAPE holds 480 MiB by a page each")
