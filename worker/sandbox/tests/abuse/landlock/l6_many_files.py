import os, time
print("begun", flush=True)
for i in range(20000):
    os.mkdir(f"d{i}")
time.sleep(1)
print("ESCAPE made 20000 directories")
