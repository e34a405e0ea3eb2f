"""A session: turns that share their variables. Process 1 of it is trusted; the code runs in its *heads*.

    process 1 ── head ── (next turn) ──▶ its copy runs the code
                  │                          │ success: the copy is the head, the old one is ended
                  └ stopped meanwhile        └ else:    the copy is ended, and the old head goes on

A head is a process whose memory is the state after the last good turn. For a turn it makes a copy of itself, a child of
process 1 and not of its own, so that process 1 learns how it ends. Process 1 never runs code of the session, cannot be
traced or read by it, and takes its word for nothing but the exit code: what the heads send is a kind, a number and, from
the kernel, the sender. After each turn the head is stopped, and every other process of the heads' group is ended; none can
leave it (leftovers.py).
"""

import os
import random
import select
import signal
import socket
import struct
import threading
import time

import isolation
import leftovers
import script

# From the supervisor (kind, flags), and to it (kind, turn, wait status, peak of resident memory, kept).
ORDER = struct.Struct("<II")
TURN, END_TURN = 1, 2
REPORT = struct.Struct("<IIqQQ")
BEGUN, ENDED = 5, 6
# From a head: (kind, exit code).
NOTE = struct.Struct("<II")
STARTED, DONE = 1, 2
CREDENTIALS = struct.Struct("3i")
# How often orphans are reaped while a turn runs.
REAP_MILLISECONDS = 100
# How long a head may take to stop, and what it made to end: to give back gigabytes takes a moment.
STOP_SECONDS, END_SECONDS = 2, 2
# How long a head waits for a task that it may make.
FORK_SECONDS = 2


class Lost(Exception):
    """The state is gone, and the session with it."""


def serve(supervisor, clone, begin_head):
    """Process 1: serves turns until the supervisor closes the socket; in a head `begin_head` is called. Never returns."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        isolation.check(isolation.libc.prctl(isolation.PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
        keeper = Keeper(supervisor, clone, begin_head)
        supervisor.send(REPORT.pack(BEGUN, 0, 0, 0, 0))
        number = 0
        while True:
            message, descriptors, _, _ = socket.recv_fds(supervisor, 64, 3)
            if not message:
                break
            kind, flags = ORDER.unpack(message)
            if kind != TURN:
                continue  # it ended by itself just before
            number += 1
            status, peak_bytes, kept = keeper.turn(number, flags, descriptors)
            supervisor.send(REPORT.pack(ENDED, number, status, peak_bytes, kept))
    except BaseException:
        pass  # the supervisor sees the socket close, and that every process of the session ends
    os._exit(0)


class Keeper:
    """The head, and what ends everything else."""

    def __init__(self, supervisor, clone, begin_head):
        self.supervisor = supervisor
        self.ended = {}  # process → (wait status, peak of resident memory)
        isolation.become_subreaper()
        self.channel, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.head, _ = isolation.fork(clone, 0)
        if self.head == 0:
            os.setpgid(0, 0)
            supervisor.close()
            self.channel.close()
            be_head(theirs, clone, begin_head)
        os.setpgid(self.head, self.head)
        self.group = self.head
        theirs.close()

    def turn(self, number, flags, descriptors):
        """Has the head's copy run a turn. Returns (wait status, peak of resident memory in bytes, 1 if it is kept)."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        try:
            socket.send_fds(self.channel, [NOTE.pack(number, flags)], [*descriptors, theirs.fileno()])
        finally:
            theirs.close()
            for each in descriptors:
                os.close(each)
        os.kill(self.head, signal.SIGCONT)
        copy, exit_code = self.follow(ours)
        if copy is None:
            raise Lost
        peak_bytes = peak(copy)
        kept = exit_code == 0
        if kept:
            os.kill(copy, signal.SIGSTOP)
            self.head, self.channel = copy, ours
        self.end_all_but_the_head()
        status, peak_at_end = self.ended.pop(copy, (0, 0))
        self.ended.clear()
        return (status if exit_code is None else exit_code << 8), max(peak_bytes, peak_at_end), int(kept)

    def follow(self, ours):
        """Waits for the turn's end. Returns the copy (None if there was none) and its exit code, if it told one."""
        copy, events = None, select.poll()
        events.register(ours, select.POLLIN)
        events.register(self.supervisor, select.POLLIN)
        while True:
            ready = dict(events.poll(REAP_MILLISECONDS))
            self.reap()
            if ours.fileno() in ready:
                kind, code, sender = note(ours)
                if kind == STARTED and copy is None and (sender in self.ended or is_child(sender)):
                    copy = sender
                    os.kill(self.head, signal.SIGSTOP)
                elif kind == DONE and sender == copy:
                    return copy, code & 0xFF
                elif kind is None:  # nobody holds the other end
                    return copy, None
            if copy in self.ended or self.head in self.ended:
                return copy, None
            if self.supervisor.fileno() in ready:
                message = self.supervisor.recv(64)
                if not message:
                    os._exit(0)
                return copy, None

    def reap(self):
        """Takes the exit status of every child that has ended: the copy, and orphans."""
        while True:
            try:
                process, status, used = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if process == 0:
                return
            self.ended[process] = (status, used.ru_maxrss * 1024)

    def end_all_but_the_head(self):
        """Ends every other process of the group, and makes the head's own of it."""
        if not self.wait(self.head_has_stopped, STOP_SECONDS):
            raise Lost
        # From here on the head makes no process.
        try:
            os.setpgid(self.head, os.getpgrp())
            leftovers.end_group(self.group)
            # All are killed. Waiting gives their memory back; what the code hides from that are zombies of the head's own.
            self.wait(self.group_has_ended, END_SECONDS)
            os.setpgid(self.head, self.head)
        except OSError as error:  # it has executed another program
            raise Lost from error
        self.group = self.head

    def wait(self, condition, seconds):
        """Asks until it holds; False if it does not so long."""
        deadline = time.monotonic() + seconds
        while not condition():
            if self.head in self.ended:
                raise Lost
            if time.monotonic() > deadline:
                return False
            time.sleep(0.0002)
        return True

    def head_has_stopped(self):
        """Whether it has, of the signal that it was sent."""
        self.reap()
        try:
            return os.waitid(os.P_PID, self.head, os.WSTOPPED | os.WNOHANG | os.WNOWAIT) is not None
        except ChildProcessError as error:
            raise Lost from error

    def group_has_ended(self):
        """Whether nothing is left of it."""
        self.reap()
        try:
            os.killpg(self.group, 0)
        except ProcessLookupError:
            return True
        return False


def note(ours):
    """A message of a head: (kind, number, sender), all None at the end; a kind of 0 if it makes no sense."""
    message, ancillary, _, _ = ours.recvmsg(NOTE.size + 1, socket.CMSG_SPACE(CREDENTIALS.size))
    if not message:
        return None, None, None
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_CREDENTIALS) and len(message) == NOTE.size:
            return *NOTE.unpack(message), CREDENTIALS.unpack(data[: CREDENTIALS.size])[0]
    return 0, 0, 0


def is_child(process):
    """Whether it is one of this process's that is not reaped."""
    try:
        os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except (ChildProcessError, OverflowError):
        return False
    return True


def peak(process):
    """The most memory it had resident, in bytes; 0 once it has ended."""
    try:
        with open(f"/proc/{process}/status", "rb") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith(b"VmHWM:")), 0)
    except OSError:
        return 0


def be_head(channel, clone, begin_head):
    """The first head, and in its copies all others: waits for turns and runs them. Never returns."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    isolation.check(isolation.libc.prctl(isolation.PR_SET_DUMPABLE, 1, 0, 0, 0), "dumpable")
    begin_head()
    namespace, on_child = script.new_namespace(), signal.SIG_DFL
    while True:
        number, flags, code, channel = next_turn(channel, clone)
        me = os.getpid()
        signal.signal(signal.SIGCHLD, on_child)
        exit_code = script.run(code, namespace, f"<turn {number}>", flags & isolation.ECHO)
        script.settle(other.join for other in threading.enumerate() if waits_for(other))
        if os.getpid() != me:
            os._exit(exit_code)  # a fork of the code's own that came to its end
        nothing = os.open("/dev/null", os.O_WRONLY)
        script.connect(nothing, nothing)
        os.close(nothing)
        on_child = leave_no_zombies()
        channel.send(NOTE.pack(DONE, exit_code))


def leave_no_zombies():
    """Has the kernel reap this head's children, which are about to be ended. Returns what the code had done with them."""
    on_child = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        while os.waitpid(-1, os.WNOHANG) != (0, 0):
            pass
    except ChildProcessError:
        pass
    return signal.SIG_DFL if on_child is None else on_child


def waits_for(thread):
    """As at an interpreter's end."""
    return thread is not threading.main_thread() and not thread.daemon


def copy_of_this(clone):
    """A sibling of this process with its memory; 0 in that. Where others of the same user have too many tasks, it waits, and
    in the end gives up, and with it the session."""
    deadline = time.monotonic() + FORK_SECONDS
    while True:
        try:
            return isolation.fork(clone, isolation.CLONE_PARENT)[0]
        except BlockingIOError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def next_turn(channel, clone):
    """Waits for a turn and returns in a copy of this process, which stays as it is."""
    while True:
        message, descriptors, _, _ = socket.recv_fds(channel, NOTE.size, 4)
        if not message:
            os._exit(0)
        number, flags = NOTE.unpack(message)
        drawn = random.getstate()
        process = copy_of_this(clone)
        if process != 0:
            for each in descriptors:
                os.close(each)
            continue
        random.setstate(drawn)  # a fork seeds it anew
        code, stdout, stderr, own = descriptors
        channel.close()
        channel = socket.socket(fileno=own)
        channel.send(NOTE.pack(STARTED, 0))
        with open(code, "rb") as file:
            source = file.read()
        script.connect(stdout, stderr)
        os.close(stdout)
        os.close(stderr)
        return number, flags, source, channel
