"""Run something in a copy of this process that may die: what kill and disk tests are made of."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable


def in_a_fork(what: Callable[[], object]) -> int:
    """Exit status of a fork that runs `what`: 0 done, 1 an exception (printed), that of sys.exit, negative: the signal that killed it."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            what()
            status = 0
        except SystemExit as stop:
            status = int(stop.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    _, code = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(code)
