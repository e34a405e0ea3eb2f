# What is hard to remove: deeper than a path may be long, and closed to its owner. The next snippet must find nothing of it.
import os
print("begun", flush=True)
for i in range(1500):
    os.mkdir("d" * 200)
    os.chdir("d" * 200)
os.mkdir("closed", 0)
os.umask(0o777)
try: open("file", "w").write("x")
except OSError: pass
