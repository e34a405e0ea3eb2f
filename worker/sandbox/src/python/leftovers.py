"""Ends what a snippet leaves: its processes, its files. For a process whose code is trusted.

Their code cannot leave its process group (where that matters, the seccomp program turns setsid and setpgid into nothing), and
a signal to a group reaches all of it at once, whatever it forks meanwhile: so nothing gets away by being faster.
"""

import os
import signal


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


def remove(path):
    """Removes a directory, whatever is in it: any depth, any mode. Nobody else may be writing to it."""
    aside = f"{path}.removed"
    os.mkdir(aside)
    moved, pending = 0, [path]
    while pending:
        directory = pending.pop()
        for entry in list(os.scandir(directory)):
            if entry.is_dir(follow_symlinks=False):
                # Out of its parent before it is looked into: so no path gets long, and no name of its own meets another.
                os.chmod(entry.path, 0o700)
                moved += 1
                os.rename(entry.path, f"{aside}/{moved}")
                pending.append(f"{aside}/{moved}")
            else:
                os.unlink(entry.path)
        os.rmdir(directory)
    os.rmdir(aside)
