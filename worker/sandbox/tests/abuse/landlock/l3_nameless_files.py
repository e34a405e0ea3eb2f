import os, time
print("begun", flush=True)
held = []
for i in range(8):
    f = open("f", "wb")
    os.unlink("f")
    held.append(f)
    for j in range(60): f.write(b"x" * (1 << 20))
    f.flush()
    time.sleep(0.2)
print("ESCAPE holds 480 MiB without a name")
