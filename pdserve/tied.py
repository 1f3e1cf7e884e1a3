"""`python -m pdserve.tied PID MODULE ARGUMENTS...`: runs a service that ends when PID, which started it, ends; however
that happens: it may be killed, or crash."""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time

POLL_S = 0.2
# What an orderly end may take: whoever waited for answers is gone.
GRACE_S = 5.0


def main() -> None:
    parent, module, *arguments = sys.argv[1:]
    threading.Thread(target=_end_with, args=(int(parent),), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _end_with(parent: int) -> None:
    # Not a pipe whose end would be the sign: whoever the parent forked would hold it open. Nor the kernel's signal at a
    # parent's death, which comes when the thread ends that started this process.
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_S)
    os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
