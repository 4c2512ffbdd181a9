"""A learner's function may raise anything, print without end or never come back: run it so that a verdict comes."""

from __future__ import annotations

import _thread
import ctypes
import io
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TextIO

from ...untrusted import one_line
from .values import Raised, show

PRINTED = 2_000  # characters that an answer may print
TOO_SLOW = object()


class _Few(io.StringIO):
    """Passes on the first characters that are written to it, and drops the rest."""

    def __init__(self, target: TextIO):
        super().__init__()
        self.target, self.left = target, PRINTED

    def write(self, text: str, /) -> int:
        """Write what there is room for."""
        self.target.write(text[: self.left])
        self.left -= len(text[: self.left])
        return len(text)


def limited(work: Callable[[], Any], seconds: float) -> Any:
    """What work() returns, a `Raised` for whatever it raises, or TOO_SLOW after so many seconds.

    It runs in a thread of its own, which works in a notebook, in a test and on every system: so this side can stop
    waiting, and a KeyboardInterrupt on this side is the user's own and goes through, while one that the learner's code
    raises is an answer. A thread that is too slow is stopped.
    """
    found: list[Any] = []
    done = threading.Event()

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:  # SystemExit and KeyboardInterrupt of the learner's code too
            found.append(raised(error))
        finally:
            done.set()

    end = time.monotonic() + seconds
    with redirect_stdout(_Few(sys.stdout)):
        thread = _thread.start_new_thread(run, ())  # unlike threading.Thread, it may end by SystemExit without a word
        try:
            while not done.is_set() and time.monotonic() < end:
                done.wait(min(0.1, seconds))  # in short steps, or Ctrl-C may have to wait for it
            in_time = done.is_set()
        finally:
            _stop(thread, done)
    return found[0] if in_time else TOO_SLOW


def _stop(thread: int, done: threading.Event) -> None:
    """Raise SystemExit in a thread until it has ended, for half a second at most.

    Code that catches everything catches it too, unless it comes just between two rounds; so it is raised often, and the
    threads take turns often. What never gets there, such as a long sleep, is left alone: it costs nothing, and does not
    keep the program from ending.
    """
    interval, end = sys.getswitchinterval(), time.monotonic() + 0.5
    sys.setswitchinterval(1e-5)
    try:
        while not done.is_set() and time.monotonic() < end:
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), ctypes.py_object(SystemExit))
            done.wait(1e-5)
    finally:
        sys.setswitchinterval(interval)


def safely_shown(value: Any) -> str:
    """A value in a message, whatever its own code does when it is to be printed."""
    text = limited(lambda: show(value), 1.0)
    return text if isinstance(text, str) else f"a value of type {type(value).__name__}"


def raised(error: BaseException, function: Any = None) -> Raised:
    """An error as a value, with the line of that function, or of one beside it, from which it came."""
    name = type(error).__name__
    try:
        file = getattr(getattr(function, "__code__", None), "co_filename", None)
        lines = [frame.line for frame in traceback.extract_tb(error.__traceback__) if frame.filename == file]
        return Raised(name, one_line(str(error)), one_line(lines[-1] or "") if lines else "")
    except BaseException:  # an error whose text raises, and whatever that is
        return Raised(name, "")
