"""For the dry run of gpu_first.py: phases that do not end well."""

import os
import signal
import time


def hang() -> None:
    """Deaf to an interrupt, and so is its child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    print(f"process group {os.getpgid(0)}", flush=True)
    os.fork()
    time.sleep(1000)


def die() -> None:
    print("about to die", flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails() -> None:
    raise RuntimeError("planted")
