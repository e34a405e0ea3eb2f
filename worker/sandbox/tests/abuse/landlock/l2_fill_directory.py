import time
print("begun", flush=True)
for i in range(8):
    with open(f"f{i}", "wb") as f:
        for j in range(60): f.write(b"x" * (1 << 20))
    time.sleep(0.2)
print("ESCAPE wrote 480 MiB")
