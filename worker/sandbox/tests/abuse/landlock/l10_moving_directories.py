import os
os.mkdir("a"); os.mkdir("b"); os.mkdir("a/c")
open("a/f", "w").close()
for source, target in (("a/c", "b/c"), ("a/f", "b/f")):
    try: os.rename(source, target); print("ESCAPE moved", source)
    except OSError as e: print("blocked", e.errno)
os.rename("a/f", "a/g")
