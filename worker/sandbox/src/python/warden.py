"""On a node without namespaces: starts the zygote, and ends what it leaves, however it ends.

Executed in the zygote's stead (spawn.rs). It runs no snippet and reads nothing of one; it waits for the end of the supervisor,
which closes the control socket, or of the zygote, and removes meanwhile what ended snippets leave in files. The zygote in turn
does this work when the warden ends. So something stays only where both are killed at the same moment.
"""

import os
import select
import socket
import sys

OWN_MODULES = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, OWN_MODULES)
import isolation
import leftovers
import zygote

sys.path.remove(OWN_MODULES)


def main(arguments):
    """Never returns."""
    isolation.become_subreaper()
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    there.setblocking(False)  # the zygote's: where this is busy, it need not be told again
    started = os.fork()
    if started == 0:
        os.setpgid(0, 0)
        here.close()
        isolation.become_subreaper()
        zygote.main(arguments, there)
    there.close()
    home = arguments[0]
    events = select.poll()
    events.register(zygote.CONTROL, 0)  # the end of the other side is told unasked
    events.register(os.pidfd_open(started), select.POLLIN)
    events.register(here, select.POLLIN)
    while [descriptor for descriptor, _ in events.poll()] == [here.fileno()] and here.recv(1):
        leftovers.remove_gone(home)
    leftovers.end_strays()
    leftovers.remove_home(home)
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
