"""Ctrl-C and SIGTERM: finish what is under way, save, and say how to go on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A training stopped because a signal asked it to, with its state saved; `signal` is that signal's number."""

    def __init__(self, message: str, number: int = signal.SIGINT):
        super().__init__(message)
        self.signal = number


@contextmanager
def finishing_first() -> Iterator[Callable[[], int]]:
    """While inside, Ctrl-C and SIGTERM only take a note; yields a function that gives the signal's number, 0 for none.

    The second signal raises KeyboardInterrupt at once. Outside the main thread, where Python lets nobody handle
    signals, nothing changes. The earlier handlers are put back at the end.
    """
    asked = 0

    def _take_note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt("stopped at once")
        asked = number
        # os.write, since print may be what was interrupted
        with suppress(OSError):
            os.write(2, b"\nfinishing this update, then saving; once more stops at once\n")

    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    earlier = {number: signal.signal(number, _take_note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in earlier.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: not one of Python's
