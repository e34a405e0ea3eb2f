import socket, struct, ctypes
a, b = socket.socketpair()
code = ctypes.create_string_buffer(struct.pack("HBBI", 6, 0, 0, 0xFFFFFFFF))
program = struct.pack("HxxxxxxP", 1, ctypes.addressof(code))
for name, level, option, value in (("filter", 1, 26, program), ("buffer", 1, 7, struct.pack("i", 1 << 28))):
    try: a.setsockopt(level, option, value); print("ESCAPE", name)
    except OSError as e: print("blocked", name, e.errno)
print("done")
