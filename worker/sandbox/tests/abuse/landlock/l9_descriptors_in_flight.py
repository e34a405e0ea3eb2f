import array, socket
a, b = socket.socketpair()
f = open("f", "wb")
try: a.sendmsg([b"x"], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [f.fileno()]))]); print("ESCAPE sent")
except OSError as e: print("blocked", e.errno)
