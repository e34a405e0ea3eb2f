"""On a node without namespaces: starts the zygote, and ends what it leaves, however it ends.

Executed in the zygote's stead (spawn.rs). It runs no snippet and reads nothing; it waits for the end of the supervisor,
which closes the control socket, or of the zygote. The zygote in turn does this work when the warden ends. So something stays
only where both are killed at the same moment.
"""

import os
import select
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
    reading, writing = os.pipe()
    started = os.fork()
    if started == 0:
        os.setpgid(0, 0)
        os.close(writing)
        isolation.become_subreaper()
        zygote.main(arguments, warden=reading)
    os.close(reading)
    events = select.poll()
    events.register(zygote.CONTROL, 0)  # the end of the other side is told unasked
    events.register(os.pidfd_open(started), select.POLLIN)
    events.poll()
    leftovers.end_strays()
    leftovers.remove(arguments[0])
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
