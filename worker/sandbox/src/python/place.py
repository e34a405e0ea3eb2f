"""Where a snippet runs: in namespaces of its own, or, on a node without them, in a directory and a process group.

Both kinds answer the same questions. The zygote asks `flags` for the clone, whether it `prepares` a child for the next request,
and `adopt`, `reap` and `end`; its child, before any code of a snippet exists in it, `enter` and `rules`.
"""

import os
import select
import sys

import isolation
import leftovers

SHM_BYTES = 16 * isolation.MIB
# Not zero: mapped for writing it is shared memory that is counted for nobody.
WRITABLE_DEVICES = ("null", "full")
# How long a warden that lives may take to end its zygote.
WARDEN_MILLISECONDS = 10_000


class Namespaces:
    """The zygote is in a jail, and each of its children gets namespaces in it: what they leave ends with those."""

    flags = isolation.NEW_NAMESPACES
    prepares = True

    def __init__(self):
        self.ids = os.getuid(), os.getgid()  # in a new namespace nobody has one

    def adopt(self, process):
        """Takes note of a child."""

    def enter(self, tmp_bytes):
        """Makes the child's ids, its /tmp and its /proc."""
        uid, gid = self.ids
        isolation.write_once("/proc/self/setgroups", b"deny")
        isolation.write_once("/proc/self/uid_map", b"%d %d 1" % (uid, uid))
        isolation.write_once("/proc/self/gid_map", b"%d %d 1" % (gid, gid))
        plain = isolation.MS_NOSUID | isolation.MS_NODEV
        isolation.mount("tmpfs", "/tmp", plain, f"size={tmp_bytes},nr_inodes=4096,mode=700")
        closed = plain | isolation.MS_NOEXEC
        isolation.mount("tmpfs", "/dev/shm", closed, f"size={SHM_BYTES},nr_inodes=64,mode=700")
        isolation.mount("proc", "/proc", closed, "subset=pid")
        os.chdir("/tmp")

    def rules(self, of_first_process=False):
        """Landlock's rules: (path, what may be done below it)."""
        yield "/", isolation.Landlock.READ_ONLY
        yield "/tmp", isolation.Landlock.ALL
        yield "/dev/shm", isolation.Landlock.ALL_BUT_EXECUTE
        for name in WRITABLE_DEVICES:
            yield f"/dev/{name}", isolation.Landlock.DEVICE

    def reap(self, process, known):
        """The wait status and the resources of a child that has ended; its namespaces ended with it."""
        return os.wait4(process, 0)[1:]

    def end(self):
        """Ends everything: its pid namespace ends with the zygote."""


class Directory:
    """The node as it is: a directory of the child's own, and Landlock for everything else.

    Its processes keep to one group and one subreaper, so that they can be found. When the zygote ends, the kernel ends the
    child, and the warden what the child has made (warden.py).
    """

    flags = 0
    # The limit of tasks, and so what to prepare for, changes from request to request.
    prepares = False

    def __init__(self, home, readable, warden):
        self.home, self.readable, self.warden = home, readable, warden
        self.removed = 0
        self.zygote = os.getpid()
        self.own = None

    def adopt(self, process):
        """Makes a child's process group, as the child does: whoever comes first."""
        try:
            os.setpgid(process, process)
        except (ProcessLookupError, PermissionError):
            pass  # it has ended

    def enter(self, tmp_bytes):
        """Makes the child's directory. How much is in it, the supervisor watches."""
        isolation.become_subreaper()
        isolation.end_with_parent(self.zygote)
        self.own = f"{self.home}/{os.getpid()}"
        os.mkdir(self.own, 0o700)
        os.chdir(self.own)
        os.environ.update(HOME=self.own, TMPDIR=self.own)
        if "tempfile" in sys.modules:
            sys.modules["tempfile"].tempdir = None
        sys.path[sys.path.index("/tmp")] = self.own

    def rules(self, of_first_process=False):
        """Landlock's rules. A session's first process, which runs no code of it, sees how much memory its heads take."""
        for path in self.readable:
            yield path, isolation.Landlock.READ_ONLY if os.path.isdir(path) else isolation.Landlock.PROGRAM
        for name in WRITABLE_DEVICES:
            yield f"/dev/{name}", isolation.Landlock.DEVICE
        for name in ("zero", "random", "urandom"):
            yield f"/dev/{name}", isolation.Landlock.READ
        # Nothing moves from one directory to another, unseen by whoever counts what is in them.
        yield self.own, isolation.Landlock.ALL & ~isolation.Landlock.REFER
        if of_first_process:
            yield "/proc", isolation.Landlock.READ

    def reap(self, process, known):
        """As above, once nothing of it is left: no process, no file."""
        leftovers.end_group(process)  # it has ended, but is not reaped: the number is still its group's
        _, status, used = os.wait4(process, 0)
        leftovers.reap_group(process)
        leftovers.end_strays(known)  # a session's processes are in groups of their own
        try:
            # Removing much takes time, and may fail: that is the warden's to do, which has nothing else to.
            os.rename(f"{self.home}/{process}", f"{self.home}/{leftovers.GONE}{process}-{self.removed}")
            self.removed += 1
            self.warden.send(b"r")
        except OSError:
            pass  # it had not come to have one; or it stays until the warden removes all
        return status, used

    def end(self):
        """Ends everything, since the supervisor or the warden has ended. The warden would end this process, too; where it has
        ended itself, the files are this one's to remove."""
        leftovers.end_strays()
        warden = select.poll()
        warden.register(self.warden, 0)  # its end is told unasked
        if warden.poll(WARDEN_MILLISECONDS):
            leftovers.remove_home(self.home)
