"""Ends what a snippet leaves: its processes, its files. For a process whose code is trusted.

Their code cannot leave its process group (where that matters, the seccomp program turns setsid and setpgid into nothing), and
a signal to a group reaches all of it at once, whatever it forks meanwhile: so nothing gets away by being faster.
"""

import os
import signal

# What the name of a directory begins with that nobody uses any more.
GONE = "gone-"


def end_group(group):
    """Kills every process of a group."""
    try:
        os.killpg(group, signal.SIGKILL)
    except ProcessLookupError:
        pass


def reap_group(group):
    """Waits for the end of this process's children in a group; those of theirs become its children when they end."""
    try:
        while True:
            os.waitid(os.P_PGID, group, os.WEXITED)
    except ChildProcessError:
        pass


def children():
    """This process's children; a subreaper's are also those whose parents have ended."""
    with open(f"/proc/self/task/{os.getpid()}/children", encoding="ascii") as file:
        return [int(number) for number in file.read().split()]


def end_strays(known=()):
    """Ends every child that is neither one of the known, nor in the group of one, and its group, until there is none."""
    while strays := [child for child in children() if child not in known and os.getpgid(child) not in known]:
        stray = strays[0]  # the others may end with its group
        group = os.getpgid(stray)
        if group == os.getpgrp():  # it had no time to get one of its own, nor to run anything
            os.kill(stray, signal.SIGKILL)
            os.waitid(os.P_PID, stray, os.WEXITED)
        else:
            end_group(group)
            reap_group(group)


def remove_gone(home):
    """Removes the directories in it that nobody uses any more; what cannot be removed stays for the next time."""
    for name in os.listdir(home):
        if name.startswith(GONE):
            try:
                remove(f"{home}/{name}")
            except OSError:
                pass


def remove_home(home):
    """Removes the whole directory of a zygote."""
    while names := os.listdir(home):
        remove(f"{home}/{names[0]}")  # what it moves stays within
    os.rmdir(home)


def remove(path):
    """Removes a directory, whatever is in it: any depth, any mode. Nobody else may be writing to it."""
    moved, pending = 0, [path]
    while pending:
        directory = pending.pop()
        for entry in sorted(os.scandir(directory), key=lambda entry: entry.is_dir(follow_symlinks=False)):
            if entry.is_dir(follow_symlinks=False):
                try:
                    os.rmdir(entry.path)
                    continue
                except OSError:
                    pass  # it is not empty
                # Out of its parent before it is looked into: so no path gets long. By now there are no files any more, so that
                # there is room for its name.
                os.chmod(entry.path, 0o700)
                moved += 1
                os.rename(entry.path, f"{path}.{moved}")
                pending.append(f"{path}.{moved}")
            else:
                os.unlink(entry.path)
        os.rmdir(directory)
