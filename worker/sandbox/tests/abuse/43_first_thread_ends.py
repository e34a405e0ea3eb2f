# Of a process whose first thread has ended the kernel tells nothing by its number.
import ctypes, os, threading, time
print("begun", flush=True)
def hold():
    held = []
    for i in range(9):
        held.append(b"1" * (64 << 20))
        time.sleep(0.2)
    print("ESCAPE held 576 MiB", flush=True)
    os._exit(0)
threading.Thread(target=hold).start()
ctypes.CDLL(None).syscall({"x86_64": 60, "aarch64": 93}[os.uname().machine], 0)
