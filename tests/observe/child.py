"""A child of a program that uses the module: it begins anew, works and waits to be killed."""

from __future__ import annotations

import os
import sys
import time

from tests import p11


def fork() -> int:
    """The child's process id."""
    parent = os.getpid()
    child = os.fork()
    if child:
        return child
    os.close(1)
    module = p11.Module(sys.argv[1])
    module.initialize()
    session = module.open(module.slots(present=False)[-1])
    for _ in range(60):
        session.random(8)
    while os.getppid() == parent:
        time.sleep(0.05)
    os._exit(0)
