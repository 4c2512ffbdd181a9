"""A learner's function may raise anything, print without end or never come back: run it so that a verdict comes."""

from __future__ import annotations

import ctypes
import io
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from typing import Any, TextIO

from ...untrusted import one_line
from .values import Raised, show

PRINTED = 2_000  # characters that an answer may print
TOO_SLOW = object()


class _Stop(SystemExit):
    """Ends a thread that takes too long; Python reports no SystemExit that leaves a thread."""


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
    raises is an answer. A thread that is too slow is stopped. That fails where Python itself gets no turn, such as in
    a long sleep; the thread is then left alone, and does not keep the program from ending.
    """
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except _Stop:
            pass
        except BaseException as error:  # SystemExit and KeyboardInterrupt of the learner's code too
            found.append(raised(error))

    thread = threading.Thread(target=run, daemon=True)
    with redirect_stdout(_Few(sys.stdout)):
        try:
            thread.start()
            thread.join(seconds)
        finally:
            for _ in range(20):  # code that catches everything catches the first one too
                if not thread.is_alive():
                    break
                ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(_Stop))
                thread.join(0.01)
    return found[0] if found else TOO_SLOW


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
    except Exception:  # an error whose text raises
        return Raised(name, "")
