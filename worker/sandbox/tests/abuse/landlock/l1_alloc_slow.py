import os, time
for i in range(12):
    try: child = os.fork()
    except BlockingIOError: break  # other snippets of the same user may have taken its place
    if child == 0:
        x = []
        try:
            for j in range(200): x.append(os.urandom(1 << 20))
        except MemoryError: pass
        time.sleep(60)
print("parent waits", flush=True)
time.sleep(60)
